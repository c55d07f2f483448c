"""Transforms of clips, uint8 (T, 3, H, W), before batching: all frames of a clip are transformed alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        ]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if augment:
            steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
        self.steps = torch.nn.Sequential(*steps)

    def __call__(self, clip: Tensor, seed: int) -> Tensor:
        """Transforms a clip; the result is a function of clip and seed.

        torchvision draws from PyTorch's global CPU generator, whose state is restored afterwards.

        Args:
            clip: uint8 (T, 3, H, W).
            seed: seed of the random choices.

        Returns:
            uint8 (T, 3, size, size).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.steps(clip)


def spatial_crops(clip: Tensor, size: int, crops: int = 1) -> Tensor:
    """Resizes the short side to `size` and crops squares.

    Args:
        clip: uint8 (T, 3, H, W).
        size: side of the crops, in pixels.
        crops: 1, the centre; 3, the beginning, middle and end of the longer side.

    Returns:
        uint8 (crops, T, 3, size, size).

    Raises:
        ValueError: crops is neither 1 nor 3.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops: expected 1 or 3, got {crops}")
    height, width = clip.shape[-2:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    clip = v2.functional.resize(clip, shape, interpolation=InterpolationMode.BICUBIC, antialias=True)
    spare = [side - size for side in shape]
    halves = [1] if crops == 1 else [0, 1, 2]  # position of the crop, in halves of the spare pixels
    corners = [(spare[0] * half // 2, spare[1] * half // 2) for half in halves]
    return torch.stack([clip[..., y : y + size, x : x + size] for y, x in corners])
