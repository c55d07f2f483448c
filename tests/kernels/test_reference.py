"""The reference is the formula, and its gradient is the formula's: then the other tests may measure with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair
from amflow_kernels import testing as tt
from amflow_kernels.impl.reference import Reference
from amflow_kernels.problem import MatmulProblem, Problem
from tests.kernels.conformance import OPERATORS

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
def test_the_flow_is_the_formula_in_scalar_arithmetic(
    head_reduction: str, lag: int, temperature: float, scale: float | None
) -> None:
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
def test_gradients_are_finite_differences(
    head_reduction: str, lag: int, temperature: float, groups: tuple[int, ...], center: bool
) -> None:
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
def test_the_explicit_backward_is_autograd_through_the_forward(
    head_reduction: str, lag: int, dflow_layout: str
) -> None:
    """In the frame and the pair form (lag 0)."""
    problem = problem_of(*tt.make_qk(2, 6, (3, 2), 11, 7, 5, dtype=torch.float64), lag, head_reduction)
    dflow = tt.make_dflow(problem.flow_shape, layout=dflow_layout, dtype=torch.float64)
    expected = tt.oracle_grads(problem, dflow)
    got = Reference().backward(problem, dflow, torch.empty(0), [True] * 4)
    assert [x.numel() for x in got[len(expected) :]] == [0] * (4 - len(expected))
    for grad, exact in zip(got, expected, strict=False):
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)


def problem_of(q: Tensor, k: Tensor, lag: int, head_reduction: str) -> Problem:
    """The clip, or for lag 0 the pairs of every other frame with the next."""
    options: dict[str, Any] = {"scale": 0.6, "temperature": 0.4, "head_reduction": head_reduction}
    if lag:
        return Problem(q, k, lag=lag, **options)
    return Problem(q[:, ::2], k[:, ::2], q_b=q[:, 1::2], k_b=k[:, 1::2], **options)


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_flow_sums_to_the_number_of_queries(head_reduction: str, dtype: torch.dtype) -> None:
    """The centred flow sums to 0, and they differ by Nq / Nk."""
    q, k = tt.make_qk(2, 3, (2,), 30, 50, 16, dtype=dtype)
    flow = am_flow(q, k, head_reduction=head_reduction, impl="reference")
    centred = am_flow(q, k, head_reduction=head_reduction, center=True, impl="reference")
    eps = torch.finfo(flow.dtype).eps
    torch.testing.assert_close(flow.sum(-1), torch.full_like(flow[..., 0], 30), rtol=20 * eps, atol=0)
    torch.testing.assert_close(centred.sum(-1), torch.zeros_like(flow[..., 0]), rtol=0, atol=20 * eps)
    assert torch.equal(centred + 30 / 50, flow)


def operator_options(operator: str) -> dict[str, Any]:
    transpose, softmax = OPERATORS[operator]
    return {"transpose": transpose, "softmax": softmax, "temperature": 0.7 if softmax else 1.0}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_motion_operator_is_the_formula_in_scalar_arithmetic(operator: str) -> None:
    """In both forms."""
    q, k = tt.make_qk(2, 3, (2,), 3, 4, 2, dtype=torch.float64, frame_step=1.0)
    options = {**operator_options(operator), "scale": 0.6}
    x = tt.make_features(q, k, 2, lag=2, transpose=options["transpose"], dtype=torch.float64)
    y = am_flow_matmul(q, k, x, lag=2, **options)
    pair_y = am_flow_matmul_pair(q[:, :-2], k[:, :-2], q[:, 2:], k[:, 2:], x, **options)
    assert y.dtype == pair_y.dtype == torch.float64
    for b, h in itertools.product(range(2), range(2)):
        A, A_next = (literal_map(q[b, t, h].tolist(), k[b, t, h].tolist(), 0.6) for t in (0, 2))
        op = [[abs(a - c) for a, c in zip(*rows, strict=True)] for rows in zip(A, A_next, strict=True)]
        if options["softmax"]:
            op = [softmax([m / 0.7 for m in row]) for row in op]
        if options["transpose"]:
            op = [list(column) for column in zip(*op, strict=True)]
        expected = torch.tensor(op, dtype=torch.float64) @ x[b, 0, h]
        for got in (y, pair_y):
            torch.testing.assert_close(got[b, 0, h], expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_gradients_of_the_motion_operator_are_finite_differences(lag: int, operator: str) -> None:
    q, k = tt.make_qk(1, 4, (2,), 3, 5, 2, dtype=torch.float64, frame_step=1.0)
    frames = {"q": q, "k": k, "lag": lag}
    if not lag:
        frames = {"q": q[:, ::2], "k": k[:, ::2], "q_b": q[:, 1::2], "k_b": k[:, 1::2]}
    options = operator_options(operator)
    x = tt.make_features(frames["q"], frames["k"], 2, lag=lag, transpose=options["transpose"], dtype=torch.float64)
    problem = MatmulProblem(**frames, x=x, **options)
    inputs = tuple(t.clone().requires_grad_() for t in tt.inputs_of(problem))

    def function(*inputs: Tensor) -> Tensor:
        return tt.run(tt.with_inputs(problem, inputs), "reference")

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=False)
