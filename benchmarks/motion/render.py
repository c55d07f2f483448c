"""Pixels of the motion tasks: real photographs, real digits, and frames that are functions of one state alone.

Nothing here knows of classes, and a frame is made from its own state and from what all frames of its clip share. So
where the states tell nothing of the class, the frames can't. All shifts are whole pixels: what moves is as sharp as
what stays, and a frame of a zoom is resampled as the same frame of a pan or of a still is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from amflow_models.cli.offline import clip_path, iterate_frames
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

__all__ = ["EVERY", "LEVELS", "ZOOM_RANGE", "Digit", "Scene", "render", "window_side"]

EVERY = 6  # one frame in so many serves as a photograph: neighbours hardly differ
ZOOM_RANGE = 3.0  # the widest window of the task `camera` is so many times as wide as the narrowest
LEVELS = 1024  # steps of the zoom, equal in the logarithm


@dataclass(frozen=True)
class Digit:
    """A real handwritten digit as an object: its place is part of the state."""

    sample: int  # in scikit-learn's `load_digits`, 0 to 1796
    side: int  # pixels
    fill: tuple[float, float, float]  # RGB in [0, 1]
    outline: float  # grey in [0, 1]: dark around light digits and the other way round, to be seen on any background


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn. Only the state changes from frame to frame.

    The columns of `states`: y and x of the window in the mirrored photograph, its zoom level, then y and x of each
    digit. Each is a number modulo its `periods`, and so uniform wherever it starts uniform, however far it moves.
    """

    label: int
    photograph: tuple[str, int]  # clip and number of the frame in it
    photograph_side: int  # pixels that its short side is resized to
    zooms: bool  # whether windows are resampled, as in `camera`
    digits: tuple[Digit, ...]  # one: anywhere in the frame; two: in the left and the right half
    states: Tensor  # int64 (frames, 3 + 2 * len(digits))
    periods: tuple[int, ...]  # of the columns


def render(scene: Scene, size: int) -> Tensor:
    """The frames, uint8 (frames, 3, size, size)."""
    clip, number = scene.photograph
    photograph = _photographs(clip, scene.photograph_side)[number // EVERY]
    frames = []
    for y, x, level in scene.states[:, :3].tolist():
        side = window_side(level, size) if scene.zooms else size
        window = _window(photograph, y, x, side)
        frames.append(interpolate(window[None], size, mode="bilinear", antialias=True)[0] if scene.zooms else window)
    video = torch.stack(frames)
    if not scene.digits:
        return video
    sprites = [_sprite(digit) for digit in scene.digits]
    places = scene.states[:, 3:].unflatten(1, (-1, 2)).tolist()
    layer = torch.stack([_layer(sprites, yx, size) for yx in places])
    return (video * (1 - layer[:, 3:]) + 255 * layer[:, :3]).round().to(torch.uint8)


def window_side(level: int, size: int) -> int:
    """Side in photograph pixels of the window at a zoom level; even, so that a window is symmetric about its place."""
    return 2 * round(size / 2 * ZOOM_RANGE ** (level / LEVELS))


@lru_cache(maxsize=16)
def _photographs(clip: str, side: int) -> Tensor:
    """One frame in EVERY of a clip, the central square, uint8 (n, 3, side, side)."""
    images = [(255 * image).round().to(torch.uint8) for _, image in iterate_frames(clip_path(clip), EVERY, side)]
    return torch.stack(images)


@lru_cache(maxsize=1)
def _digit_images() -> Tensor:
    """float32 (1797, 8, 8) in [0, 1]."""
    return torch.from_numpy(load_digits().images).float() / 16


def _window(photograph: Tensor, y: int, x: int, side: int) -> Tensor:
    """(3, side, side) about (y, x) of the plane that is tiled with the photograph and its mirror images.

    Mirrored, the plane repeats every two sides without a seam: a torus, on which a pan never meets an edge.
    """
    length = photograph.shape[-1]
    offsets = torch.arange(-(side // 2), side - side // 2)

    def mirrored(start: int) -> Tensor:
        place = (start + offsets) % (2 * length)
        return torch.minimum(place, 2 * length - 1 - place)

    return photograph[:, mirrored(y)[:, None], mirrored(x)]


def _sprite(digit: Digit) -> Tensor:
    """float32 (4, side, side): RGB times coverage, and coverage."""
    image = pad(_digit_images()[digit.sample], (1, 1, 1, 1))  # room for the outline
    image = interpolate(image[None, None], digit.side, mode="bicubic", align_corners=False)[0]
    ink = (2 * image - 0.4).clamp(0, 1)  # strokes with narrow edges
    width = max(1, digit.side // 16)
    cover = max_pool2d(ink, 2 * width + 1, 1, width)
    colour = torch.tensor(digit.fill).view(3, 1, 1) * ink + digit.outline * (1 - ink)
    return torch.cat((colour * cover, cover))


def _layer(sprites: list[Tensor], places: list[list[int]], size: int) -> Tensor:
    """float32 (4, size, size): each digit in its own part of the frame, around whose edges it wraps."""
    parts = torch.zeros(len(sprites), 4, size, size // len(sprites))
    for part, sprite, (y, x) in zip(parts, sprites, places, strict=True):
        side = sprite.shape[-1]
        part[:, :side, :side] = sprite
        part.copy_(part.roll((y, x), (1, 2)))
    return torch.cat(list(parts), 2)
