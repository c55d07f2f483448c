"""Sampling the frames of a clip: functions from the number of frames of a video to indices.

In all of them `total` is the number of frames of the video and `frames` the number of frames to take (T). Indices are
int64, in ascending order, in [0, total). If the video has fewer frames than are taken, frames repeat evenly.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def uniform(total: int, frames: int, generator: Generator | None = None) -> Tensor:
    """One frame of each of `frames` equal parts of the video, as in TSN (arXiv 1608.00859).

    Args:
        generator: takes a random frame of each part; None takes the one in its middle.

    Returns:
        (frames,). A part that is shorter than a frame yields the frame that contains it.

    Raises:
        ValueError: total or frames is below 1.
    """
    check_least(1, total=total, frames=frames)
    if generator is None:
        return _spread(total, frames, 0.5)
    return _spread(total, frames, torch.rand(frames, generator=generator, dtype=torch.float64))


def dense(total: int, frames: int, stride: int, generator: Generator | None = None) -> Tensor:
    """Every `stride`-th frame from a starting point.

    Args:
        generator: takes a random starting point; None takes the clip in the middle of the video.

    Returns:
        (frames,). A video that is shorter than the clip is sampled by `uniform`.

    Raises:
        ValueError: total, frames or stride is below 1.
    """
    check_least(1, total=total, frames=frames, stride=stride)
    spare = total - _span(frames, stride)
    if spare < 0:
        return uniform(total, frames, generator)
    start = spare // 2 if generator is None else int(torch.randint(spare + 1, (), generator=generator))
    return start + stride * torch.arange(frames)


def views(total: int, frames: int, clips: int, stride: int | None = None) -> Tensor:
    """Several clips of one video, over which a model's predictions are averaged in testing.

    Args:
        clips: number of clips. One clip is that of `uniform` or `dense` without a generator.
        stride: for dense clips, which start at equal distances from the first to the last possible frame; videos that
            are too short are sampled as in `dense`. None: uniform clips, which take different frames of the same parts,
            at equal distances.

    Returns:
        (clips, frames).

    Raises:
        ValueError: a number is below 1.
    """
    check_least(1, total=total, frames=frames, clips=clips, stride=1 if stride is None else stride)
    if stride is None or total < _span(frames, stride):
        return torch.stack([_spread(total, frames, (clip + 0.5) / clips) for clip in range(clips)])
    spare = total - _span(frames, stride)
    starts = [spare // 2] if clips == 1 else [clip * spare // (clips - 1) for clip in range(clips)]
    return torch.tensor(starts)[:, None] + stride * torch.arange(frames)


def _span(frames: int, stride: int) -> int:
    return (frames - 1) * stride + 1


def _spread(total: int, frames: int, offsets: Tensor | float) -> Tensor:
    """One frame of each of `frames` equal parts; `offsets` are positions within the parts, in [0, 1)."""
    indices = (torch.arange(frames, dtype=torch.float64) + offsets) * total / frames
    return indices.long().clamp_(max=total - 1)  # an offset just below 1 may round up


def check_least(least: int, **numbers: int) -> None:
    """Raises a ValueError that names the first argument below `least`."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
