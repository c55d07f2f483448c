"""The reference is the formula, its gradient is the formula's, and the tools that measure with it can be trusted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_pair
from amflow_kernels import testing as tt
from amflow_kernels.impl import reference

pytestmark = [pytest.mark.capability, pytest.mark.reference]

REDUCTIONS = ("none", "mean", "mean_map")


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def literal_map(q: list[list[float]], k: list[list[float]], scale: float) -> list[list[float]]:
    """One attention map from plain Python lists: softmax over keys of scale * q k^T."""
    return [softmax([scale * sum(x * y for x, y in zip(row, key, strict=True)) for key in k]) for row in q]


def literal_flow(A: list[list[float]], B: list[list[float]], temperature: float) -> list[float]:
    """flow_j = sum_i P_ij with P = softmax_keys(|A - B| / temperature)."""
    P = [
        softmax([abs(a - b) / temperature for a, b in zip(row_a, row_b, strict=True)])
        for row_a, row_b in zip(A, B, strict=True)
    ]
    return [sum(row[j] for row in P) for j in range(len(P[0]))]


def average(items: Iterable[Any]) -> list[Any]:
    """Mean of nested lists of numbers."""
    items = list(items)
    if isinstance(items[0], list):
        return [average(parts) for parts in zip(*items, strict=True)]
    return sum(items) / len(items)


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize(("lag", "temperature", "scale"), [(1, 1.0, None), (2, 0.3, 0.7), (3, 1 / 64, -1.5)])
def test_literal_formula(head_reduction: str, lag: int, temperature: float, scale: float | None) -> None:
    """The public function equals the formula written out in scalar arithmetic, in both forms, with both group ranks."""
    B, T, H, W, Nq, Nk, D = 2, 4, 2, 2, 3, 4, 2
    q, k = tt.make_qk(B, T, (H, W), Nq, Nk, D, dtype=torch.float64, frame_step=1.0)
    options = {"scale": scale, "temperature": temperature, "head_reduction": head_reduction}
    flow = am_flow(q, k, lag=lag, **options)
    pair_flow = am_flow_pair(q[:, :-lag], k[:, :-lag], q[:, lag:], k[:, lag:], **options)
    assert flow.dtype == torch.float64
    for b, t, w in itertools.product(range(B), range(T - lag), range(W)):
        maps = [
            [literal_map(q[b, s, h, w].tolist(), k[b, s, h, w].tolist(), scale or D**-0.5) for h in range(H)]
            for s in (t, t + lag)
        ]
        if head_reduction == "mean_map":
            expected = literal_flow(average(maps[0]), average(maps[1]), temperature)
        else:
            expected = [literal_flow(maps[0][h], maps[1][h], temperature) for h in range(H)]
            expected = average(expected) if head_reduction == "mean" else expected
        index = (b, t, slice(None), w) if head_reduction == "none" else (b, t, w)
        for got in (flow, pair_flow):
            torch.testing.assert_close(got[index], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("lag", "temperature", "groups"), [(1, 1.0, (2,)), (2, 0.3, (2, 2)), (1, 5.0, (1,)), (0, 1.0, (2,))]
)
def test_gradcheck(head_reduction: str, lag: int, temperature: float, groups: tuple[int, ...], center: bool) -> None:
    """Finite differences confirm the gradients of the public functions in float64; lag 0 stands for the pair form."""
    q, k = tt.make_qk(1, 3 if lag else 4, groups, 2, 3, 2, dtype=torch.float64, frame_step=1.0)
    options = {"temperature": temperature, "head_reduction": head_reduction, "center": center}
    function: Callable[..., Tensor]
    if lag:
        inputs, function = (q, k), lambda q, k: am_flow(q, k, lag=lag, **options)
    else:
        inputs, function = (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2]), lambda *x: am_flow_pair(*x, **options)
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=False)


@pytest.mark.parametrize("dflow_layout", ["contiguous", "expanded", "transposed"])
@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_explicit_backward_is_autograd(head_reduction: str, lag: int, dflow_layout: str) -> None:
    """The backward that is written out equals autograd through the forward, in the frame and the pair form."""
    q, k = tt.make_qk(2, 6, (3, 2), 11, 7, 5, dtype=torch.float64)
    inputs = (q, k, None, None) if lag else (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
    dflow = tt.make_dflow(
        tt.flow_shape(inputs[0], k, lag=lag, head_reduction=head_reduction), layout=dflow_layout, dtype=torch.float64
    )
    expected = tt.oracle_grads(dflow, *inputs, scale=0.6, lag=lag, temperature=0.4, head_reduction=head_reduction)
    got = reference.am_flow_backward(dflow, *inputs, 0.6, lag, 0.4, head_reduction, [True] * 4)
    assert [x.numel() for x in got[len(expected) :]] == [0] * (4 - len(expected))
    for grad, exact in zip(got, expected, strict=False):
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_and_center(head_reduction: str, dtype: torch.dtype) -> None:
    """The flow sums to Nq over the keys, the centred flow to 0, and they differ by Nq / Nk."""
    q, k = tt.make_qk(2, 3, (2,), 30, 50, 16, dtype=dtype)
    flow = am_flow(q, k, head_reduction=head_reduction, impl="reference")
    centred = am_flow(q, k, head_reduction=head_reduction, center=True, impl="reference")
    eps = torch.finfo(flow.dtype).eps
    torch.testing.assert_close(flow.sum(-1), torch.full_like(flow[..., 0], 30), rtol=20 * eps, atol=0)
    torch.testing.assert_close(centred.sum(-1), torch.zeros_like(flow[..., 0]), rtol=0, atol=20 * eps)
    assert torch.equal(centred + 30 / 50, flow)


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_identical_frames(head_reduction: str, dtype: torch.dtype) -> None:
    """Frames that do not differ give exactly Nq / Nk, exactly 0 when centred, and a gradient of exactly 0."""
    q, k = (x.requires_grad_() for x in tt.make_qk(2, 3, (2,), 30, 50, 16, dtype=dtype, frame_step=0))
    flow = am_flow(q, k, head_reduction=head_reduction, impl="reference")
    assert torch.equal(flow, torch.full_like(flow, 30 / 50))
    centred = am_flow(q, k, head_reduction=head_reduction, center=True, impl="reference")
    assert torch.count_nonzero(centred) == 0
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape, dtype=flow.dtype)):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_no_effect(autocast_dtype: torch.dtype) -> None:
    """Under autocast the reference gives the same bits, float32, forward and backward."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 30, 50, 16))
    dflow = tt.make_dflow((1, 2, 2, 50))
    plain = am_flow(q, k, impl="reference")
    with torch.autocast("cpu", dtype=autocast_dtype):
        cast = am_flow(q, k, impl="reference")
        cast_grads = torch.autograd.grad(cast, (q, k), dflow)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    for grad, expected in zip(cast_grads, torch.autograd.grad(plain, (q, k), dflow), strict=True):
        assert torch.equal(grad, expected)


# --- the tools in amflow_kernels/testing.py


@pytest.mark.parametrize("layout", tt.LAYOUTS)
@pytest.mark.parametrize("groups", [(3,), (3, 2)], ids=str)
def test_layouts_hold_the_same_values(layout: str, groups: tuple[int, ...]) -> None:
    """A layout changes strides and offset only (and, for shared keys, the keys of the heads after the first)."""
    q, k = tt.make_qk(2, 3, groups, 5, 5, 4, layout=layout, seed=1)
    plain_q, plain_k = tt.make_qk(2, 3, groups, 5, 5, 4, seed=1)
    assert torch.equal(q, plain_q)
    assert torch.equal(k, plain_k[:, :, :1].expand_as(plain_k) if layout == "shared_keys" else plain_k)
    assert q.stride(-1) == k.stride(-1) == 1
    assert k.is_contiguous() == (layout == "contiguous")
    if layout == "offset":
        assert q.storage_offset() % 2 == 1


def test_clip_statistics() -> None:
    """Two frames differ by `frame_step` standard deviations, whatever their distance; logits have `logit_std`."""
    q, k = tt.make_qk(2, 5, (2,), 200, 200, 64, frame_step=0.1, logit_std=4.0, dtype=torch.float64)
    for distance in (1, 4):
        step = (q[:, distance:] - q[:, :-distance]).std() / q.std()
        assert 0.095 < step < 0.105
    assert 3.8 < (q @ k.mT / 8).std() < 4.2


def test_poison_allocations() -> None:
    """Uninitialised memory is NaN inside, and the global switches are as before outside, even after an error."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    with tt.poison_allocations():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(1000).isnan().all()
    with pytest.raises(ValueError, match="base"), tt.poison_allocations():
        int("1", base=99)
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_grad_tie_bounds_a_wrong_sign(lag: int, head_reduction: str) -> None:
    """Flipping the sign of every tie moves no element of any gradient by more than `grad_tie`, and some by nearly it.

    Ties are made by hand: frames 2 and 3 are frames 0 and 1 but for one token that moves by next to nothing.
    """
    q, k = tt.make_qk(1, 4, (2,), 6, 5, 3, dtype=torch.float64)
    q[:, 2:], k[:, 2:] = q[:, :2], k[:, :2]
    k[:, 2:, :, 0] += 1e-8
    inputs = (q, k, None, None) if lag else (q[:, :2], k[:, :2], q[:, 2:], k[:, 2:])
    options: dict[str, Any] = {"lag": lag, "temperature": 0.5, "head_reduction": head_reduction}
    dflow = tt.make_dflow(tt.flow_shape(inputs[0], k, lag=lag, head_reduction=head_reduction), dtype=torch.float64)
    tie = tt.grad_tie(dflow, *inputs, **options)
    arguments = (dflow, *inputs, 3**-0.5, lag, 0.5, head_reduction, [x is not None for x in inputs])
    exact = reference.am_flow_backward(*arguments)

    def sign_with_ties_flipped(x: Tensor) -> Tensor:
        return x.sign() * torch.where(x.abs() < 1e-7, -1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.torch, "sign", sign_with_ties_flipped)
        flipped = reference.am_flow_backward(*arguments)
    for i, bound in enumerate(tie):
        moved = (flipped[i] - exact[i]).abs()
        assert (moved <= bound + 1e-12 * exact[i].abs().max()).all()
        if lag != 1:  # with lag 1 no two of the frames compared are alike
            assert moved.norm() > 0.1 * bound.norm()
        else:
            assert bound.norm() == 0


def test_checks_see_small_errors() -> None:
    """The checks reject a flow, a centred flow and gradients that are wrong by little more than the budget."""
    q, k = tt.make_qk(1, 3, (2,), 60, 50, 16)
    dflow = tt.make_dflow((1, 2, 2, 50))
    exact = tt.oracle_flow(q, k, center=True)
    grads, tie = tt.oracle_grads(dflow, q, k), tt.grad_tie(dflow, q, k)
    tt.assert_flow(exact + 60 / 50, exact, 60)
    tt.assert_centred(exact, exact, 60, frame_step=0.2)
    tt.assert_grads([g.float() for g in grads], grads, tie)
    wrong = exact.clone()
    wrong[0, 1, 1, 3] += 7e-7
    with pytest.raises(AssertionError, match="off by"):
        tt.assert_flow(wrong + 60 / 50, exact, 60)
    with pytest.raises(AssertionError, match="L2 error"):
        tt.assert_centred(exact * (1 + 2e-5), exact, 60, frame_step=0.2)
    assert all(t.norm() < 1e-3 * g.norm() for t, g in zip(tie, grads, strict=True))
    for i, (grad, ties) in enumerate(zip(grads, tie, strict=True)):
        off = [g.float() for g in grads]
        off[i] = (grad * (1 + 4e-5 + 2 * ties.norm() / grad.norm())).float()
        with pytest.raises(AssertionError, match=f"gradient {i}"):
            tt.assert_grads(off, grads, tie)
        off[i] = torch.full_like(off[i], math.nan)
        with pytest.raises(AssertionError, match=f"gradient {i}"):
            tt.assert_grads(off, grads, tie)
    with pytest.raises(AssertionError, match="off by"):
        tt.assert_flow(torch.full_like(exact, math.nan), exact, 60)
    with pytest.raises(ValueError, match="frame_step"):
        tt.centred_budget(1e-4)
