"""Pixels of the motion tasks: real photographs, real digits, and frames that depend on nothing but their state.

Nothing here knows the class. A frame is drawn from its own state and from properties that all frames of its clip share,
so frames carry no information on the class if states carry none. All shifts are whole pixels, so that moving parts are
as sharp as still ones, and a frame of a zoom is resampled like the same frame of a pan or of a still clip.
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

EVERY = 6  # every sixth frame of a video serves as a photograph: neighbours hardly differ
ZOOM_RANGE = 3.0  # width of the widest window of the task `camera` over that of the narrowest
LEVELS = 1024  # steps of the zoom, equal in the logarithm


@dataclass(frozen=True)
class Digit:
    """A real handwritten digit as an object; its position is part of the state."""

    sample: int  # index in scikit-learn's `load_digits`, 0 to 1796
    side: int  # pixels
    fill: tuple[float, float, float]  # RGB in [0, 1]
    outline: float  # grey in [0, 1]: dark around light digits and light around dark ones, visible on any background


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn. Only the state changes from frame to frame.

    The columns of `states`: y and x of the window in the mirrored photograph, its zoom level, then y and x of each
    digit. Each is a number modulo its period, so it stays uniform if it starts uniform, however far it moves.
    """

    label: int
    photograph: tuple[str, int]  # video, and number of the frame in it
    photograph_side: int  # pixels to which its short side is resized
    zooms: bool  # whether windows are resampled, as in `camera`
    digits: tuple[Digit, ...]  # one moves in the whole frame, two in its left and its right half
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
    positions = scene.states[:, 3:].unflatten(1, (-1, 2)).tolist()
    layer = torch.stack([_layer(sprites, yx, size) for yx in positions])
    return (video * (1 - layer[:, 3:]) + 255 * layer[:, :3]).round().to(torch.uint8)


def window_side(level: int, size: int) -> int:
    """Width of the window at a zoom level, in photograph pixels; even, so that the window is symmetric."""
    return 2 * round(size / 2 * ZOOM_RANGE ** (level / LEVELS))


@lru_cache(maxsize=16)
def _photographs(clip: str, side: int) -> Tensor:
    """The central square of every `EVERY`-th frame of a video, uint8 (n, 3, side, side)."""
    images = [(255 * image).round().to(torch.uint8) for _, image in iterate_frames(clip_path(clip), EVERY, side)]
    return torch.stack(images)


@lru_cache(maxsize=1)
def _digit_images() -> Tensor:
    """float32 (1797, 8, 8) in [0, 1]."""
    return torch.from_numpy(load_digits().images).float() / 16


def _window(photograph: Tensor, y: int, x: int, side: int) -> Tensor:
    """(3, side, side) around (y, x) in the plane that the photograph and its mirror images tile.

    The plane repeats every two sides without a seam: a torus, on which a pan never meets an edge.
    """
    length = photograph.shape[-1]
    offsets = torch.arange(-(side // 2), side - side // 2)

    def mirrored(start: int) -> Tensor:
        index = (start + offsets) % (2 * length)
        return torch.minimum(index, 2 * length - 1 - index)

    return photograph[:, mirrored(y)[:, None], mirrored(x)]


def _sprite(digit: Digit) -> Tensor:
    """float32 (4, side, side): RGB times coverage, and coverage."""
    image = pad(_digit_images()[digit.sample], (1, 1, 1, 1))  # for the outline
    image = interpolate(image[None, None], digit.side, mode="bicubic", align_corners=False)[0]
    ink = (2 * image - 0.4).clamp(0, 1)  # strokes with narrow edges
    width = max(1, digit.side // 16)
    cover = max_pool2d(ink, 2 * width + 1, 1, width)
    colour = torch.tensor(digit.fill).view(3, 1, 1) * ink + digit.outline * (1 - ink)
    return torch.cat((colour * cover, cover))


def _layer(sprites: list[Tensor], positions: list[list[int]], size: int) -> Tensor:
    """float32 (4, size, size): each digit in its own part of the frame, wrapping around at the edges."""
    parts = torch.zeros(len(sprites), 4, size, size // len(sprites))
    for part, sprite, (y, x) in zip(parts, sprites, positions, strict=True):
        side = sprite.shape[-1]
        part[:, :side, :side] = sprite
        part.copy_(part.roll((y, x), (1, 2)))
    return torch.cat(list(parts), 2)
