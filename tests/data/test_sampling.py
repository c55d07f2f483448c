"""Sampling the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from amflow_models.data import dense, uniform, views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

totals, counts, strides = st.integers(1, 200), st.integers(1, 20), st.integers(1, 6)


def check_indices(indices: Tensor, total: int, shape: tuple[int, ...]) -> None:
    assert indices.dtype == torch.int64
    assert indices.shape == shape
    assert indices.min() >= 0
    assert indices.max() < total
    assert (indices.diff() >= 0).all()


@given(totals, counts, strides, st.integers(0, 2**63))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_samples_are_ascending_in_range_and_repeatable(total: int, frames: int, stride: int, seed: int) -> None:
    for sample in (
        lambda generator: uniform(total, frames, generator),
        lambda generator: dense(total, frames, stride, generator),
    ):
        check_indices(sample(None), total, (frames,))
        drawn = [sample(Generator().manual_seed(seed)) for _ in range(2)]
        check_indices(drawn[0], total, (frames,))
        assert torch.equal(*drawn)
    if total >= (frames - 1) * stride + 1:
        assert (dense(total, frames, stride, Generator().manual_seed(seed)).diff() == stride).all()
    if total >= frames:
        assert (uniform(total, frames).diff() > 0).all()
        assert (uniform(total, frames, Generator().manual_seed(seed)).diff() >= 0).all()
    else:  # all frames, as evenly as possible
        times = uniform(total, frames).bincount(minlength=total)
        assert times.min() >= 1
        assert times.max() - times.min() <= 1


@given(totals, counts, st.integers(1, 10), st.none() | strides)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_views_cover_the_video_and_one_view_is_the_middle(
    total: int, frames: int, clips: int, stride: int | None
) -> None:
    indices = views(total, frames, clips, stride)
    check_indices(indices, total, (clips, frames))
    one = uniform(total, frames) if stride is None else dense(total, frames, stride)
    assert torch.equal(views(total, frames, 1, stride)[0], one)
    if stride is not None and total >= (frames - 1) * stride + 1:
        assert (indices.diff() == stride).all()
        if clips > 1:
            assert indices[0, 0] == 0
            assert indices[-1, -1] == total - 1
    if stride is None and total >= frames * clips:
        assert len(indices.unique()) == frames * clips


@pytest.mark.parametrize(("total", "frames"), [(1, 4), (5, 8), (8, 8), (13, 4), (40, 8)])
def test_random_samples_reach_every_frame(total: int, frames: int) -> None:
    generator = Generator().manual_seed(0)
    for sample in (lambda: uniform(total, frames, generator), lambda: dense(total, frames, 2, generator)):
        assert set(torch.cat([sample() for _ in range(300)]).tolist()) == set(range(total))


def test_random_frames_are_uniform_within_their_parts() -> None:
    """And the middle frames are the documented ones."""
    generator = Generator().manual_seed(0)
    drawn = torch.stack([uniform(12, 3, generator) for _ in range(4000)])
    for part in range(3):
        times = drawn[:, part].bincount(minlength=12)[4 * part : 4 * part + 4]
        assert times.sum() == 4000
        assert (times - 1000).abs().max() < 150
    assert uniform(12, 3).tolist() == [2, 6, 10]
    assert dense(12, 3, 2).tolist() == [3, 5, 7]
    assert views(12, 3, 2, 2).tolist() == [[0, 2, 4], [7, 9, 11]]
    assert views(12, 3, 2).tolist() == [[1, 5, 9], [3, 7, 11]]


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        (lambda: uniform(0, 4), "total"),
        (lambda: uniform(4, 0), "frames"),
        (lambda: dense(4, 4, 0), "stride"),
        (lambda: views(4, 4, 0), "clips"),
    ],
)
def test_numbers_below_one_are_refused(sample: Callable[[], Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        sample()
