"""`motion_maps` and `motion_pca` against the dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import motion_maps, motion_pca
from amflow_kernels import testing as tt
from amflow_kernels.impl.reference import attention_maps

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]


def moving_tokens(Nq: int, Nk: int, groups: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float32) -> Any:
    """q and k of four frames: three tokens change much, each more than the next, and the others little."""
    q, k = tt.make_qk(1, 4, groups, Nq, Nk, 32, dtype=dtype, frame_step=0.02, logit_std=2.0)
    generator = torch.Generator().manual_seed(3)
    for token, size in zip(range(3), (1.0, 0.6, 0.36), strict=True):
        k[..., token, :] += (6 * size * torch.randn(1, 4, *groups, 32, generator=generator)).to(dtype)
    return q, k


def dense(q: Tensor, k: Tensor, scale: float | None = None, lag: int = 1, head_reduction: str = "none") -> Tensor:
    A = attention_maps(q.double(), k.double(), q.shape[-1] ** -0.5 if scale is None else scale)
    M = (A[:, :-lag] - A[:, lag:]).abs()
    return M.mean(2) if head_reduction == "mean" else M


@pytest.mark.operator
@pytest.mark.parametrize("tokens", [(35, 20), (65, 65), (197, 197), (150, 230)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.1, "lag": 2, "head_reduction": "mean"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_components_are_those_of_the_dense_matrix(
    tokens: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, impl: str
) -> None:
    """The subspace agrees to 1e-3 rad wherever singular values differ by 1.25; the values and scores agree, too."""
    q, k = moving_tokens(*tokens, dtype=dtype)
    M = dense(q, k, **options)
    mean = M.mean(-2, keepdim=True)
    _, S, Vh = torch.linalg.svd(M - mean, full_matrices=False)
    for rank in (1, 3):
        found = motion_pca(q, k, rank=rank, impl=impl, **options)
        assert [x.dtype for x in found] == [torch.float32] * 4
        V, exact = found.components.double(), Vh.mT[..., :rank]
        angle = torch.linalg.matrix_norm(exact - V @ (V.mT @ exact), ord=2)
        stands_out = S[..., rank] <= 0.8 * S[..., rank - 1]
        assert stands_out.any()
        assert (angle[stands_out] <= 1e-3).all()
        torch.testing.assert_close(V.mT @ V, torch.eye(rank).double().expand(*V.shape[:-2], -1, -1), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.singular_values.double(), S[..., :rank], rtol=1e-3, atol=0)
        torch.testing.assert_close(found.scores.double(), (M - mean) @ V, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.mean.double(), mean.squeeze(-2), rtol=1e-4, atol=1e-7)
        assert (V.gather(-2, V.abs().argmax(-2, keepdim=True)) > 0).all()


def test_same_input_same_result_whatever_the_order_of_clips() -> None:
    """Signs are fixed and random directions are the same in every call."""
    q, k = moving_tokens(120, 120)
    for x, y in zip(motion_pca(q, k), motion_pca(q, k), strict=True):
        assert torch.equal(x, y)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.rand(1)
        torch.manual_seed(5)
        motion_pca(q, k)
        assert torch.equal(torch.rand(1), before)  # the global generator is left alone


def test_float64_stays_autocast_has_no_effect_and_no_clips_give_no_components() -> None:
    """An empty batch gives empty results of the right shapes."""
    q, k = moving_tokens(120, 120)
    plain = motion_pca(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in zip(motion_pca(q, k), plain, strict=True):
            assert torch.equal(x, y)
    exact = motion_pca(q.double(), k.double())
    assert {x.dtype for x in exact} == {torch.float64}
    torch.testing.assert_close(exact.singular_values.float(), plain.singular_values, rtol=1e-4, atol=0)
    assert motion_pca(q[:0], k[:0]).scores.shape == (0, 3, 2, 120, 3)


def test_there_may_be_more_components_than_a_product_has_columns() -> None:
    q, k = moving_tokens(400, 400, groups=(1,))
    found = motion_pca(q[:, :2], k[:, :2], rank=30)
    exact = torch.linalg.svdvals(dense(q[:, :2], k[:, :2]) - dense(q[:, :2], k[:, :2]).mean(-2, keepdim=True))
    torch.testing.assert_close(found.singular_values.double(), exact[..., :30], rtol=1e-3, atol=0)


def test_a_nan_makes_nan_of_its_pair_head_and_window_only() -> None:
    """Components are computed for each pair of frames, head and window."""
    q, k = moving_tokens(20, 35, groups=(2, 3))
    q[0, 0, 1, 2, 5, 0] = float("nan")
    found = motion_pca(q, k)
    assert found.scores.shape == (1, 3, 2, 3, 20, 3)
    assert found.components.shape == (1, 3, 2, 3, 35, 3)
    assert found.singular_values.shape == (1, 3, 2, 3, 3)
    bad = torch.zeros(1, 3, 2, 3, dtype=torch.bool)
    bad[0, 0, 1, 2] = True
    for x in (found.singular_values, found.components.flatten(-2)):
        assert torch.equal(x.isnan().all(-1), bad)
        assert torch.equal(x.isnan().any(-1), bad)


def test_equal_frames_have_no_components() -> None:
    q, k = (x[:, :1].expand(-1, 3, -1, -1, -1) for x in moving_tokens(40, 40))
    found = motion_pca(q, k)
    assert not found.singular_values.any()
    assert not found.scores.any()
    for heat in motion_maps(q, k):
        assert not heat.any()


@pytest.mark.operator
@pytest.mark.parametrize("options", [{}, {"scale": 0.1, "lag": 2}, {"head_reduction": "mean"}], ids=str)
def test_motion_maps_are_row_and_column_sums_of_the_dense_matrix(options: dict[str, Any], impl: str) -> None:
    q, k = moving_tokens(35, 50, groups=(2, 2))
    rows, columns = motion_maps(q, k, impl=impl, **options)
    M = dense(q, k, **options)
    assert rows.dtype == columns.dtype == torch.float32
    # Entries of maps up to 1 in float32: 1e-7 for each that is summed up.
    torch.testing.assert_close(rows.double(), M.sum(-1), rtol=1e-5, atol=50e-7)
    torch.testing.assert_close(columns.double(), M.sum(-2), rtol=1e-5, atol=35e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"rank: expected from 1 to min\(Nq, Nk\) = 5, got 0"),
        ({"rank": 6}, ValueError, r"rank: expected from 1 to min\(Nq, Nk\) = 5, got 6"),
        ({"rank": 2.0}, TypeError, r"rank: expected an int, got float"),
        ({"lag": 3}, ValueError, r"q: expected more frames"),
        ({"head_reduction": "mean_map"}, ValueError, r"head_reduction: expected 'none' or 'mean', got 'mean_map'"),
    ],
)
def test_bad_arguments_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k = tt.make_qk(1, 3, (1,), 5, 7, 4)
    with pytest.raises(error, match=message):
        motion_pca(q, k, **options)
    with pytest.raises(TypeError, match=r"q: expected a torch\.Tensor"):
        motion_maps(None, k)


def test_results_do_not_depend_on_the_default_dtype() -> None:
    q, k = moving_tokens(20, 20)
    expected = [*motion_maps(q, k), *motion_pca(q, k)]
    torch.set_default_dtype(torch.float64)
    try:
        found = [*motion_maps(q, k), *motion_pca(q, k)]
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
