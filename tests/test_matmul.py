"""The motion operator: implementation x operator x dtype x shape x layout against the float64 oracle, and its ops.

The cases, checks and tools are those of test_matrix.py, for an operator that takes features too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import test_matrix as matrix
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import SHAPES, assert_all_close
from torch import Tensor, library
from torch._dynamo.utils import counters

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair, matmul_ops, ops
from amflow_kernels import testing as tt
from amflow_kernels.impl import reference

MustRun = Callable[[str, Callable[[], object]], bool]

OPERATORS = {"M": (False, False), "M^T": (True, False), "P": (False, True), "P^T": (True, True)}  # transpose, softmax
X_LAYOUTS = ("contiguous", "offset", "tokens_first", "shared")

FACTORS: dict[str, list[Any]] = {
    "operator": list(OPERATORS),
    "tokens": [(1, 1), (2, 2), (17, 17), (65, 65), (197, 197), (16, 64), (64, 17), (130, 257), (1, 70), (70, 1)],
    "C": [1, 3, 4, 16, 64, 256],
    "D": [1, 17, 64, 128],
    "frames": [(2, 1), (3, 2), (5, 2), (8, 1), (2, 0), (6, 0)],  # (T, lag); 0: T / 2 pairs
    "layout": list(tt.LAYOUTS),
    "x_layout": list(X_LAYOUTS),
    "logits": ["plain", "negative", "zero", "large", "still"],
    "temperature": [1 / 64, 0.3, 1.0, 5.0],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "x_float": [True, False],  # x in float32, or in the dtype of q
    "groups": [(1,), (3,), (2, 3)],
    "dy": ["contiguous", "expanded", "transposed"],
    "needs": ["all", "q", "k", "x", "q and x"],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One problem: input, options and which gradients are asked for."""

    operator: str
    tokens: tuple[int, int]
    C: int
    D: int
    frames: tuple[int, int]
    layout: str
    x_layout: str
    logits: str
    temperature: float
    dtype: torch.dtype
    x_float: bool
    groups: tuple[int, ...]
    dy: str
    needs: str
    B: int = 1
    seed: int = 0

    def __str__(self) -> str:
        T, lag = self.frames
        shape = "x".join(map(str, (self.B, f"T{T}lag{lag}", *self.groups, *self.tokens, self.D)))
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.x_dtype)]
        options = (self.layout, self.x_layout, self.logits, f"{self.temperature:.3g}", self.dy, self.needs)
        return "-".join((self.operator, shape, f"C{self.C}", *dtypes, *options))

    @property
    def x_dtype(self) -> torch.dtype:
        return torch.float32 if self.x_float else self.dtype

    @property
    def frame_step(self) -> float:
        return 1e-3 if self.logits == "still" else 0.2

    def frames_and_x(self) -> tuple[Tensor, ...]:
        """(q, k, x), or (q_a, k_a, q_b, k_b, x) as every other frame of a clip."""
        T, lag = self.frames
        q, k = tt.make_qk(
            self.B, T, self.groups, *self.tokens, self.D, dtype=self.dtype, frame_step=self.frame_step,
            logit_std=6.0 if self.logits == "large" else 1.0, layout=self.layout, seed=self.seed,
        )  # fmt: skip
        frames = (q, k) if lag else (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
        transpose, _ = OPERATORS[self.operator]
        x = tt.make_features(
            *frames[:2], self.C, lag=lag, transpose=transpose, layout=self.x_layout, dtype=self.x_dtype, seed=self.seed
        )
        return (*frames, x)

    def options(self) -> dict[str, Any]:
        transpose, softmax = OPERATORS[self.operator]
        scale = {"negative": -(self.D**-0.5), "zero": 0.0}.get(self.logits)
        options = {"transpose": transpose, "softmax": softmax, "scale": scale, "temperature": self.temperature}
        return {**options, "lag": self.frames[1]} if self.frames[1] else options

    def run(self, inputs: tuple[Tensor, ...], *, impl: str) -> Tensor:
        function: Callable[..., Tensor] = am_flow_matmul if self.frames[1] else am_flow_matmul_pair
        return function(*inputs, impl=impl, **self.options())

    def dy_tensor(self) -> Tensor:
        return tt.make_dflow((*exact(self).shape,), layout=self.dy, seed=self.seed)

    def needed(self) -> list[bool]:
        frames = [self.needs in ("all", "q", "q and x"), self.needs in ("all", "k")]
        return [*(frames if self.frames[1] else frames * 2), self.needs in ("all", "x", "q and x")]


def allowed(row: dict[str, Any]) -> bool:
    softmax = row.get("operator", "P").startswith("P")
    return matrix.allowed(row) and (softmax or row.get("temperature", 1.0) == 1)


CASES = [Case(**row, B=1 + seed % 2, seed=seed) for seed, row in enumerate(matrix.pairwise(FACTORS, allowed))]


@cache
def exact(case: Case) -> Tensor:
    *frames, x = case.frames_and_x()
    return tt.oracle_matmul(x, *frames, **case.options())


def check_forward(case: Case, impl: str) -> None:
    """Every element is within `matmul_budget`, and M x within `centred_budget` as a whole."""
    *frames, x = case.frames_and_x()
    with tt.poison_allocations():
        y = case.run((*frames, x), impl=impl)
    assert y.dtype == torch.float32
    tt.assert_matmul(y, exact(case), tt.matmul_budget(x, *frames, **case.options()))
    if case.operator.startswith("M"):
        error, norm = (y.double() - exact(case)).norm().item(), exact(case).norm().item()
        assert error <= tt.centred_budget(case.frame_step) * norm, f"L2 error of {error:.3g} on {norm:.3g}"


def check_backward(case: Case, impl: str) -> None:
    """Gradients of q and k are within `grad_budget`; that of x is a product with dy, and held to `matmul_budget`."""
    needed = case.needed()
    inputs = tuple(t.detach().requires_grad_(n) for t, n in zip(case.frames_and_x(), needed, strict=True))
    asked = [t for t, n in zip(inputs, needed, strict=True) if n]
    with tt.poison_allocations():
        got = iter(torch.autograd.grad(case.run(inputs, impl=impl), asked, case.dy_tensor()))
    grads = [next(got) if n else None for n in needed]
    assert all(g is None or g.dtype == t.dtype for g, t in zip(grads, inputs, strict=True))
    (*frames, x), options, dy, dx = inputs, case.options(), case.dy_tensor(), grads.pop()
    if dx is not None:
        turned = {**options, "transpose": not options["transpose"]}
        tt.assert_matmul(dx, tt.oracle_matmul(dy, *frames, **turned), tt.matmul_budget(dy, *frames, **turned))
    if any(g is not None for g in grads):
        tie = tt.matmul_tie(dy, x, *frames, **options)
        # The gradient of P is zero for two keys, which move alike, and for features that are equal for all keys.
        zero = options["softmax"] and (case.tokens[1] == 2 or (options["transpose"] and case.dy == "expanded"))
        magnitude = tt.matmul_tie(dy, x, *frames, **options, ties_only=False) if zero else None
        tt.assert_grads(grads, tt.oracle_matmul_grads(dy, x, *frames, **options), tie, magnitude)


def test_rows_are_pairwise() -> None:
    """Every pair of values of two factors that is possible at all occurs in some row of the matrix."""
    rows = [vars(case) for case in CASES]
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(row[a], row[b]) for row in rows}
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            assert (x, y) in seen or not allowed({a: x, b: y}), f"{a}={x} never meets {b}={y}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, impl: str, must_run: MustRun) -> None:
    """The product is within its budgets of the oracle."""
    if must_run(impl, lambda: case.run(case.frames_and_x(), impl=impl)):
        check_forward(case, impl)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, impl: str, must_run: MustRun) -> None:
    """The gradients that were asked for are within their budgets of the oracle, whatever the strides of dy."""
    if must_run(impl, lambda: case.run(case.frames_and_x(), impl=impl)):
        check_backward(case, impl)
