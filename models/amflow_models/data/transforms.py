"""Transforms of clips before batching: all frames of a clip are transformed alike.

Frames come one by one, and each is resized before the next one is decoded: a clip of large frames is never in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

_DIRECTIONS = {
    *("left", "right", "leftward", "leftwards", "rightward", "rightwards"),
    *("clockwise", "counterclockwise", "anticlockwise"),
}


def names_directions(classes: Iterable[str]) -> bool:
    """Whether a class name mentions left, right or a sense of rotation, so that mirrored clips show another class."""
    return any(_DIRECTIONS & set(re.split(r"[^a-z]+", name.lower())) for name in classes)


class TrainTransform:
    """Random resized crop, horizontal flip and RandAugment (arXiv 1909.13719), in this order.

    Args:
        size: side of the result, in pixels.
        scale: range of the share of the frame's area that a crop has; its aspect ratio is from 3/4 to 4/3.
        flip: mirror half of all clips.
        augment: RandAugment: two operations of magnitude 9 in [0, 30].
    """

    def __init__(self, size: int, *, scale: tuple[float, float], flip: bool, augment: bool) -> None:
        self.crop = v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        steps: list[torch.nn.Module] = []
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if augment:
            steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
        self.steps = torch.nn.Sequential(*steps)

    def __call__(self, frames: Iterable[Tensor], seed: int) -> Tensor:
        """Transforms a clip; the result is a function of its frames and the seed.

        torchvision draws from PyTorch's global CPU generator, whose state is restored afterwards.

        Args:
            frames: T frames of one size, uint8 (3, H, W), or a clip (T, 3, H, W).
            seed: seed of the random choices.

        Returns:
            uint8 (T, 3, size, size).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            place: dict[str, Any] = {}
            cropped = []
            for frame in frames:
                place = place or self.crop.make_params([frame])
                cropped.append(self.crop.transform(frame, place))
            return self.steps(torch.stack(cropped))


def spatial_crops(frames: Iterable[Tensor], size: int, crops: int = 1) -> Tensor:
    """Resizes the short side to `size` and crops squares.

    Args:
        frames: T frames, uint8 (3, H, W), or a clip (T, 3, H, W).
        size: side of the crops, in pixels.
        crops: 1, the centre; 3, the beginning, middle and end of the longer side.

    Returns:
        uint8 (crops, T, 3, size, size).

    Raises:
        ValueError: crops is neither 1 nor 3.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops: expected 1 or 3, got {crops}")
    return torch.stack([_squares(frame, size, crops) for frame in frames], 1)


def _squares(frame: Tensor, size: int, crops: int) -> Tensor:
    height, width = frame.shape[-2:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    frame = v2.functional.resize(frame, shape, interpolation=InterpolationMode.BICUBIC, antialias=True)
    spare = [side - size for side in shape]
    halves = [1] if crops == 1 else [0, 1, 2]  # position of the crop, in halves of the spare pixels
    corners = [(spare[0] * half // 2, spare[1] * half // 2) for half in halves]
    return torch.stack([frame[..., y : y + size, x : x + size] for y, x in corners])
