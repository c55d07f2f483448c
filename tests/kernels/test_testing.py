"""`amflow_kernels.testing`: the tools that the other tests measure with can be trusted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import testing as tt
from amflow_kernels.impl import reference
from amflow_kernels.problem import MatmulProblem, Problem
from tests.kernels.conformance import OPERATORS


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


def test_clips_have_the_promised_statistics() -> None:
    """Two frames differ by `frame_step` standard deviations, whatever their distance; logits have `logit_std`."""
    q, k = tt.make_qk(2, 5, (2,), 200, 200, 64, frame_step=0.1, logit_std=4.0, dtype=torch.float64)
    for distance in (1, 4):
        step = (q[:, distance:] - q[:, :-distance]).std() / q.std()
        assert 0.095 < step < 0.105
    assert 3.8 < (q @ k.mT / 8).std() < 4.2


def test_poisoned_memory_is_nan_and_the_switches_are_restored() -> None:
    """Uninitialised memory is NaN inside, and the global switches are as before outside, even after an error."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    with tt.poison_allocations():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(1000).isnan().all()
    with pytest.raises(ValueError, match="base"), tt.poison_allocations():
        int("1", base=99)
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


def sign_with_ties_flipped(x: Tensor) -> Tensor:
    return x.sgn() * torch.where(x.abs() < 1e-7, -1, 1)


@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_no_wrong_sign_moves_a_gradient_beyond_grad_tie(lag: int, head_reduction: str) -> None:
    """Flipping the sign of every tie moves no element of any gradient by more, and some by nearly as much.

    Ties are made by hand: frames 2 and 3 are frames 0 and 1 but for one token that moves by next to nothing.
    """
    q, k = tt.make_qk(1, 4, (2,), 6, 5, 3, dtype=torch.float64)
    q[:, 2:], k[:, 2:] = q[:, :2], k[:, :2]
    k[:, 2:, :, 0] += 1e-8
    options: dict[str, Any] = {"temperature": 0.5, "head_reduction": head_reduction}
    if lag:
        problem = Problem(q, k, lag=lag, **options)
    else:
        problem = Problem(q[:, :2], k[:, :2], q_b=q[:, 2:], k_b=k[:, 2:], **options)
    dflow = tt.make_dflow(problem.flow_shape, dtype=torch.float64)
    tie = tt.grad_tie(problem, dflow)
    arguments = (problem, dflow, torch.empty(0), [x is not None for x in problem.frames])
    exact = reference.Reference().backward(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.torch, "sign", sign_with_ties_flipped)
        flipped = reference.Reference().backward(*arguments)
    for i, bound in enumerate(tie):
        moved = (flipped[i] - exact[i]).abs()
        assert (moved <= bound + 1e-12 * exact[i].abs().max()).all()
        if lag != 1:  # with lag 1 no two of the frames compared are alike
            assert moved.norm() > 0.1 * bound.norm()
        else:
            assert bound.norm() == 0


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lag", [0, 1])
def test_no_wrong_sign_moves_a_gradient_beyond_matmul_tie(lag: int, operator: str) -> None:
    """As for `grad_tie`; the second frame of a pair is the first but for one token."""
    q, k = tt.make_qk(1, 2, (2,), 6, 5, 3, dtype=torch.float64)
    q[:, 1:], k[:, 1:] = q[:, :1], k[:, :1]
    k[:, 1:, :, 0] += 1e-8
    transpose, softmax = OPERATORS[operator]
    frames = {"q": q, "k": k} if lag else {"q": q[:, :1], "k": k[:, :1], "q_b": q[:, 1:], "k_b": k[:, 1:]}
    x = tt.make_features(q[:, :1], k[:, :1], 4, lag=0, transpose=transpose, dtype=torch.float64)
    temperature = 0.7 if softmax else 1.0
    problem = MatmulProblem(**frames, x=x, transpose=transpose, softmax=softmax, temperature=temperature)
    dy = torch.randn(problem.product_shape, dtype=torch.float64)
    tie = tt.matmul_tie(problem, dy)
    arguments = (problem, dy, [f is not None for f in problem.frames] + [False])
    exact = reference.Reference().matmul_backward(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.torch, "sign", sign_with_ties_flipped)
        flipped = reference.Reference().matmul_backward(*arguments)
    for i, bound in enumerate(tie):
        moved = (flipped[i] - exact[i]).abs()
        assert (moved <= bound + 1e-12 * exact[i].abs().max()).all()
        assert moved.norm() > 0.1 * bound.norm()


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_check_of_a_product_sees_small_errors(operator: str) -> None:
    """It rejects a product that is wrong in one element, by little more than float32 allows."""
    q, k = tt.make_qk(1, 3, (2,), 60, 50, 16)
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(q, k, 7, lag=1, transpose=transpose)
    problem = MatmulProblem(q, k, x=x, transpose=transpose, softmax=softmax, temperature=0.7 if softmax else 1.0)
    y, budget = tt.oracle_matmul(problem), tt.matmul_budget(problem)
    assert budget.max() < 5e-5 * y.abs().max()
    tt.assert_matmul(y, y, budget)
    for wrong in (1.1 * budget[0, 1, 1, 3, 2], math.nan):
        off = y.clone()
        off[0, 1, 1, 3, 2] += wrong
        with pytest.raises(AssertionError, match="the product is off by"):
            tt.assert_matmul(off, y, budget)


def test_the_checks_of_a_flow_see_small_errors() -> None:
    """The checks reject a flow, a centred flow and gradients that are wrong by little more than the budget."""
    q, k = tt.make_qk(1, 3, (2,), 60, 50, 16)
    dflow = tt.make_dflow((1, 2, 2, 50))
    problem = Problem(q, k, center=True)
    exact, grads, tie = tt.oracle_flow(problem), tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow)
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


def test_the_budget_of_a_flow_grows_with_its_largest_value_and_with_errors_of_the_logits() -> None:
    """Not with its mean Nq / Nk; and a logit error moves A by a quarter of itself at most, and M by half."""
    assert tt.flow_budget(0.3) == tt.flow_budget(1.0) == 5e-7
    assert tt.flow_budget(40.0, 0.1) == pytest.approx(2e-4)
    assert tt.flow_budget(1.0, logit_error=1e-6) == pytest.approx(1e-6)
    q, k = tt.make_qk(1, 2, (1,), 4, 5, 8)
    logits = 8**-0.5 * q.abs() @ k.abs().mT
    assert tt.logit_error(Problem(q, k)) == pytest.approx(2**-23 * logits.max().item())
    pair = Problem(q[:, :1], k[:, :1], q_b=2 * q[:, 1:], k_b=k[:, 1:])
    assert tt.logit_error(pair) == pytest.approx(2**-23 * max(logits[:, 0].max(), 2 * logits[:, 1].max()).item())


def test_cancelling_terms_widen_the_budget_of_a_gradient_only_where_they_cancel_to_a_fortieth() -> None:
    exact, tie = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    plain = tt.grad_budget(exact, tie, torch.float32)
    assert plain == tt.grad_budget(exact, tie, torch.float32, 40 * exact) == pytest.approx(4e-5)
    assert tt.grad_budget(exact, tie, torch.float32, 1000 * exact) == pytest.approx(8000 * 2**-23)
