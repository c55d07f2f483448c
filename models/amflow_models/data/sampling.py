"""Which frames of a video are taken: indices alone, no pixels.

Everywhere `total` is how many frames the video has and `frames` how many are taken (T). Indices are int64, in order, in
[0, total). A video with fewer frames than are asked for is spread over them: frames come several times, evenly.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def uniform(total: int, frames: int, generator: Generator | None = None) -> Tensor:
    """One frame of each of `frames` equal parts of the video, as in TSN (arXiv 1608.00859).

    Args:
        generator: a random frame of each part; None takes the one in its middle.

    Returns:
        (frames,). A part that is shorter than a frame gives the frame that it lies in.

    Raises:
        ValueError: total or frames is below 1.
    """
    check_least(1, total=total, frames=frames)
    if generator is None:
        return _spread(total, frames, 0.5)
    return _spread(total, frames, torch.rand(frames, generator=generator, dtype=torch.float64))


def dense(total: int, frames: int, stride: int, generator: Generator | None = None) -> Tensor:
    """One frame in `stride`, from somewhere on.

    Args:
        generator: a random start; None takes the clip in the middle of the video.

    Returns:
        (frames,). A video that is shorter than the clip is covered as a whole, as by `uniform`.

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
    """Several clips of one video, to average a model's predictions over in testing.

    Args:
        clips: how many. One is what `uniform` and `dense` give without a generator.
        stride: of dense clips, which start at equal distances from the first to the last possible frame. None: uniform
            clips, which take other frames of the same parts, at equal distances. Videos too short as in `dense`.

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


def _spread(total: int, frames: int, places: Tensor | float) -> Tensor:
    """`places`: within each part, from 0 to 1."""
    indices = (torch.arange(frames, dtype=torch.float64) + places) * total / frames
    return indices.long().clamp_(max=total - 1)  # a place just below 1 may round up


def check_least(least: int, **numbers: int) -> None:
    """Raises ValueError that names the first argument below `least`."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
