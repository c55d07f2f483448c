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
from test_api import x as zeros
from test_ops import assert_all_close
from torch import Tensor, library
from torch._dynamo.utils import counters

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair, matmul_ops
from amflow_kernels import testing as tt
from amflow_kernels.impl import reference

pytestmark = pytest.mark.capability

MustRun = Callable[[str, Callable[[], object]], bool]

OPERATORS = {"M": (False, False), "M^T": (True, False), "P": (False, True), "P^T": (True, True)}  # transpose, softmax
X_LAYOUTS = ("contiguous", "offset", "tokens_first", "shared")

SHARED: dict[str, list[Any]] = {
    "tokens": [(1, 1), (2, 2), (17, 17), (65, 65), (197, 197), (16, 64), (64, 17), (130, 257), (1, 70), (70, 1)],
    "C": [1, 3, 4, 16, 64, 256],
    "D": [1, 17, 64, 128],
    "frames": [(2, 1), (3, 2), (5, 2), (8, 1), (2, 0), (6, 0)],  # (T, lag); 0: T / 2 pairs
    "layout": list(tt.LAYOUTS),
    "x_layout": list(X_LAYOUTS),
    "logits": ["plain", "negative", "zero", "large", "still"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "x_float": [True, False],  # x in float32, or in the dtype of q
    "groups": [(1,), (3,), (2, 3)],
    "dy": ["contiguous", "expanded", "transposed"],
    "needs": ["all", "q", "k", "x", "q and x"],
}  # fmt: skip
TABLES = [
    {**SHARED, "operator": ["M", "M^T"], "temperature": [1.0]},
    {**SHARED, "operator": ["P", "P^T"], "temperature": [1 / 64, 0.3, 1.0, 5.0]},
]


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


ROWS = [matrix.pairwise(table) for table in TABLES]
CASES = [Case(**row, B=1 + seed % 2, seed=seed) for seed, row in enumerate(itertools.chain(*ROWS))]


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
    if case.operator.startswith("M") and y.numel() >= 100:  # of a few sums all may happen to cancel
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


@pytest.mark.parametrize(("table", "rows"), list(zip(TABLES, ROWS, strict=True)), ids=["M", "P"])
def test_rows_are_pairwise(table: dict[str, list[Any]], rows: list[dict[str, Any]]) -> None:
    """Every pair of values of two factors that is possible at all occurs in some row of the operator's matrix."""
    for a, b in itertools.combinations(table, 2):
        seen = {(row[a], row[b]) for row in rows}
        for x, y in itertools.product(table[a], table[b]):
            assert (x, y) in seen or not matrix.allowed({a: x, b: y}), f"{a}={x} never meets {b}={y}"


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


@st.composite
def cases(draw: st.DrawFn) -> Case:
    operator = draw(st.sampled_from(list(OPERATORS)))
    base = draw(matrix.cases())
    shared = ("tokens", "D", "frames", "layout", "dtype", "groups", "B", "seed")
    return Case(
        operator=operator,
        C=draw(st.one_of(st.integers(1, 20), st.integers(21, 256))),
        x_layout=draw(st.sampled_from(X_LAYOUTS)),
        logits=base.logits if base.temperature >= tt.SHARP or base.logits != "large" else "plain",
        temperature=base.temperature if operator.startswith("P") else 1.0,
        x_float=draw(st.booleans()),
        dy=base.dflow,
        needs=draw(st.sampled_from(SHARED["needs"])),
        **{name: getattr(base, name) for name in shared},
    )


@settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(case=cases())
def test_any_problem(impl: str, must_run: MustRun, case: Case) -> None:
    """Whatever the shape, strides, lag, options and dtypes: forward and backward are within their budgets."""
    if must_run(impl, lambda: case.run(case.frames_and_x(), impl=impl)):
        check_forward(case, impl)
        check_backward(case, impl)


def operator_options(operator: str, temperature: float = 0.7) -> dict[str, Any]:
    transpose, softmax = OPERATORS[operator]
    options: dict[str, Any] = {"transpose": transpose, "softmax": softmax}
    return {**options, "temperature": temperature} if softmax else options


def grads_of(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients for a fixed dy that is the same for every batch item, pair and group."""
    return torch.autograd.grad(y, inputs, tt.make_dflow(y.shape[-2:]).to(y.dtype).expand(y.shape))


# --- what is exact


def literal_map(q: Tensor, k: Tensor, scale: float) -> list[list[float]]:
    rows = [[math.exp(scale * sum(a * b for a, b in zip(r, s, strict=True))) for s in k.tolist()] for r in q.tolist()]
    return [[p / sum(row) for p in row] for row in rows]


@pytest.mark.parametrize("operator", OPERATORS)
def test_literal_formula(operator: str) -> None:
    """The public functions equal the formula written out in scalar arithmetic, in both forms."""
    q, k = tt.make_qk(2, 3, (2,), 3, 4, 2, dtype=torch.float64, frame_step=1.0)
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(q, k, 2, lag=2, transpose=transpose, dtype=torch.float64)
    options = {**operator_options(operator), "scale": 0.6}
    y = am_flow_matmul(q, k, x, lag=2, **options)
    pair_y = am_flow_matmul_pair(q[:, :-2], k[:, :-2], q[:, 2:], k[:, 2:], x, **options)
    assert y.dtype == pair_y.dtype == torch.float64
    for b, h in itertools.product(range(2), range(2)):
        A, A_next = (literal_map(q[b, t, h], k[b, t, h], 0.6) for t in (0, 2))
        op = [[abs(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(A, A_next, strict=True)]
        if softmax:
            powers = [[math.exp(m / 0.7) for m in row] for row in op]
            op = [[p / sum(row) for p in row] for row in powers]
        if transpose:
            op = [list(column) for column in zip(*op, strict=True)]
        expected = [
            [sum(m * c for m, c in zip(row, column, strict=True)) for column in x[b, 0, h].T.tolist()] for row in op
        ]
        for got in (y, pair_y):
            torch.testing.assert_close(got[b, 0, h], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(17, 17), (70, 197)], ids=str)
def test_identical_frames(
    tokens: tuple[int, int], dtype: torch.dtype, operator: str, impl: str, must_run: MustRun
) -> None:
    """Of equal frames M is exactly 0 and P exactly 1 / Nk, up to the rounding of a sum; dq and dk are exactly 0."""
    q, k = tt.make_qk(1, 4, (2,), *tokens, 40, dtype=dtype, frame_step=0)
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(q, k, 5, lag=2, transpose=transpose)
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    options = {**operator_options(operator), "lag": 2, "impl": impl}
    if not must_run(impl, lambda: am_flow_matmul(*inputs, **options)):
        return
    y = am_flow_matmul(*inputs, **options)
    dq, dk, dx = grads_of(y, inputs)
    assert torch.count_nonzero(dq) == torch.count_nonzero(dk) == 0
    if softmax:
        rows = x.detach().double().sum(-2, keepdim=True) / tokens[1]
        assert torch.equal(y, y[..., :1, :].expand_as(y))
        torch.testing.assert_close(y.detach().double(), rows.expand_as(y), rtol=3e-7, atol=3e-7)
    else:
        assert torch.count_nonzero(y) == torch.count_nonzero(dx) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(257, 257), (64, 196)], ids=str)
def test_ones_give_the_flow(tokens: tuple[int, int], dtype: torch.dtype, impl: str, must_run: MustRun) -> None:
    """P^T 1 is the flow, P 1 is 1, and M adds up to the same by rows and by columns."""
    Nq, Nk = tokens
    q, k = tt.make_qk(1, 4, (3,), Nq, Nk, 64, dtype=dtype)
    queries, keys = torch.ones(1, 3, 3, Nq, 1), torch.ones(1, 3, 3, Nk, 1)
    if not must_run(impl, lambda: am_flow_matmul(q, k, keys, impl=impl)):
        return
    flow = am_flow_matmul(q, k, queries, transpose=True, softmax=True, temperature=0.5, impl=impl).squeeze(-1)
    tt.assert_flow(flow, tt.oracle_flow(q, k, temperature=0.5, center=True), Nq, temperature=0.5)
    same = am_flow(q, k, temperature=0.5, impl=impl)
    torch.testing.assert_close(flow, same, rtol=0, atol=2 * tt.flow_budget(Nq, Nk, 0.5))
    ones = am_flow_matmul(q, k, keys, softmax=True, impl=impl)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=5e-7)
    by_query, by_key = (am_flow_matmul(q, k, x, transpose=t, impl=impl) for x, t in ((keys, False), (queries, True)))
    torch.testing.assert_close(by_query.sum(-2), by_key.sum(-2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("operator", ["P", "P^T"])
def test_constants_have_no_gradient(operator: str, must_run: MustRun) -> None:
    """As the rows of P sum to 1, features that are equal for all keys give the CPU kernels a dq and dk of exactly 0."""
    q, k = (t.requires_grad_() for t in tt.make_qk(1, 3, (2,), 33, 70, 24))
    transpose, _ = OPERATORS[operator]
    x = tt.make_features(q, k, 3, lag=1, transpose=transpose)
    if not transpose:
        x = x[..., :1, :].expand_as(x)
    if must_run("cpu", lambda: am_flow_matmul(q, k, x, impl="cpu", **operator_options(operator))):
        y = am_flow_matmul(q, k, x, impl="cpu", **operator_options(operator))
        dy = torch.randn(3).expand_as(y) if transpose else torch.randn(y.shape)
        for grad in torch.autograd.grad(y, (q, k), dy):
            assert torch.count_nonzero(grad) == 0


# --- the same bits


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "C"), [((1, 5, (1,), 197, 130, 24), 16), ((2, 3, (3, 2), 65, 70, 24), 7)])
def test_any_number_of_threads(
    shape: tuple[Any, ...], C: int, dtype: torch.dtype, operator: str, must_run: MustRun
) -> None:
    """The CPU kernels give the same bits on 1, 2, 3 and 5 threads, few work items or many."""
    q, k = tt.make_qk(*shape, dtype=dtype)
    x = tt.make_features(q, k, C, lag=1, transpose=OPERATORS[operator][0], dtype=dtype)
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    options = {**operator_options(operator), "impl": "cpu"}
    if not must_run("cpu", lambda: am_flow_matmul(*inputs, **options)):
        return
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        y = am_flow_matmul(*inputs, **options)
        results.append((y, *grads_of(y, inputs)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("C", [2, 24])
@pytest.mark.parametrize("operator", OPERATORS)
def test_batch_does_not_matter(operator: str, C: int, must_run: MustRun) -> None:
    """A clip gives the same bits alone, among others, in a longer clip and in pair form."""
    q, k = tt.make_qk(3, 7, (4,), 70, 197, 40)
    x = tt.make_features(q, k, C, lag=1, transpose=OPERATORS[operator][0])
    options = {**operator_options(operator), "impl": "cpu"}
    if not must_run("cpu", lambda: am_flow_matmul(q, k, x, **options)):
        return
    y = am_flow_matmul(q, k, x, **options)
    assert torch.equal(am_flow_matmul(q[1:2], k[1:2], x[1:2], **options), y[1:2])
    assert torch.equal(am_flow_matmul(q[:, 2:5], k[:, 2:5], x[:, 2:4], **options), y[:, 2:4])
    assert torch.equal(am_flow_matmul_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], x, **options), y)


@pytest.mark.parametrize("which", range(5))
def test_only_the_gradients_asked_for(which: int, impl: str, must_run: MustRun) -> None:
    """Only inputs that require grad get one, and it is the one they get when all require it."""
    q, k = tt.make_qk(1, 6, (2,), 17, 19, 8)
    frames = (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
    inputs = [t.contiguous() for t in (*frames, tt.make_features(*frames[:2], 5, lag=0))]
    if not must_run(impl, lambda: am_flow_matmul_pair(*inputs, impl=impl)):
        return
    grads: list[list[Tensor | None]] = []
    for needed in (range(5), (which,)):
        asked = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        am_flow_matmul_pair(*asked, softmax=True, impl=impl).square().sum().backward()
        grads.append([t.grad for t in asked])
    every, one = grads
    assert [g is not None for g in one] == [i == which for i in range(5)]
    assert torch.equal(one[which], every[which])


# --- NaN


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["NaN in q", "NaN in k", "+inf logit", "all -inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(5, 7), (70, 150)], ids=str)
def test_nan_rule(
    tokens: tuple[int, int], dtype: torch.dtype, kind: str, operator: str, impl: str, must_run: MustRun
) -> None:
    """A bad map row makes NaN of exactly the results that use it: its own row, or transposed every row of its pair."""
    b, t, h, lag = 1, 2, 1, 2
    q, k = tt.make_qk(2, 6, (3,), *tokens, 8, dtype=dtype)
    transpose, _ = OPERATORS[operator]
    x = tt.make_features(q, k, 3, lag=lag, transpose=transpose)
    options = {**operator_options(operator), "lag": lag, "impl": impl}
    if not must_run(impl, lambda: am_flow_matmul(q, k, x, **options)):
        return
    clean = am_flow_matmul(q, k, x, **options)
    matrix._poison(kind, q[b, t, h], k[b, t, h])
    rows = slice(None) if transpose or kind == "NaN in k" else 3  # row 3 of the map, or with such a key all of them
    expected, touched = torch.zeros_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
    for pair in (t - lag, t):
        expected[b, pair, h, rows] = True
        touched[b, pair, h] = kind != "NaN in q"  # the other kinds change the logits of other rows too
    y = am_flow_matmul(q, k, x, **options)
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(y[~(expected | touched)], clean[~(expected | touched)])


@pytest.mark.parametrize("operator", OPERATORS)
def test_minus_inf_logit_weighs_nothing(operator: str, impl: str, must_run: MustRun) -> None:
    """Logits of -inf are weights of 0: the product stays finite and is the oracle's."""
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 8)
    x = tt.make_features(q, k, 3, lag=1, transpose=OPERATORS[operator][0])
    options = operator_options(operator)
    if not must_run(impl, lambda: am_flow_matmul(q, k, x, impl=impl, **options)):
        return
    finite = q.clone(), k.clone()
    q[0, 1, 0, :, 0] = -1
    k[0, 1, 0, [0, 2, 69], 0] = math.inf
    y, exact_y = am_flow_matmul(q, k, x, impl=impl, **options), tt.oracle_matmul(x, q, k, **options)
    assert exact_y.isfinite().all()
    tt.assert_matmul(y, exact_y, tt.matmul_budget(x, *finite, **options))


# --- what is refused, and what is empty

BAD_FEATURES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "not a tensor": ([1.0], {}, TypeError, r"x: expected a torch\.Tensor, got list"),
    "integer": (zeros(2, 2, 2, 5, 3, dtype=torch.int64), {}, TypeError, r"x: expected float32 or.*got torch\.int64"),
    "another dtype": (zeros(2, 2, 2, 5, 3).half(), {}, TypeError, r"x: expected float32 or the dtype of q, .*float16"),
    "another device": (zeros(2, 2, 2, 5, 3).to("meta"), {}, ValueError, r"x: expected the device of q, cpu, got meta"),
    "all frames": (zeros(2, 3, 2, 5, 3), {}, ValueError, r"x: expected features of the keys.*\(2, 2, 2, 5, C\), got"),
    "heads": (zeros(2, 2, 1, 5, 3), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 1, 5, 3\)"),
    "queries": (zeros(2, 2, 2, 4, 3), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 2, 4, 3\)"),
    "keys": (zeros(2, 2, 2, 5, 3), {"transpose": True}, ValueError, r"x: expected features of the queries.*2, 4, C\)"),
    "no features": (zeros(2, 2, 2, 5), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 2, 5\)"),
    "C is 0": (zeros(2, 2, 2, 5, 0), {}, ValueError, r"x: expected from 1 to 256 features.*got 0"),
    "C is 257": (zeros(2, 2, 2, 5, 257), {}, ValueError, r"x: expected from 1 to 256 features.*got 257"),
    "strided": (zeros(2, 2, 2, 3, 5).mT, {}, ValueError, r"x: expected a contiguous last dimension, got strides"),
    "transpose": (zeros(2, 2, 2, 5, 3), {"transpose": 1}, TypeError, r"transpose: expected a bool, got int"),
    "softmax": (zeros(2, 2, 2, 5, 3), {"softmax": None}, TypeError, r"softmax: expected a bool, got NoneType"),
    "temperature of M": (zeros(2, 2, 2, 5, 3), {"temperature": 0.5}, ValueError, r"temperature: expected 1 without"),
    "temperature": (zeros(2, 2, 2, 5, 3), {"softmax": True, "temperature": 0}, ValueError, r"temperature: .*1/64"),
    "scale": (zeros(2, 2, 2, 5, 3), {"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
    "impl": (zeros(2, 2, 2, 5, 3), {"impl": "gpu"}, ValueError, r"impl: expected None or one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_input(name: str) -> None:
    """Bad features or options raise the same error in both forms; it names the argument and says what is expected."""
    x, options, error, message = BAD_FEATURES[name]
    q, k = zeros(2, 3, 2, 4, 6), zeros(2, 3, 2, 5, 6)
    with pytest.raises(error, match=message):
        am_flow_matmul(q, k, x, **options)
    with pytest.raises(error, match=message):
        am_flow_matmul_pair(q[:, 1:], k[:, 1:], q[:, 1:], k[:, 1:], x, **options)


def test_bad_frames() -> None:
    """Frames are checked as am_flow checks them, and options are keyword-only."""
    q, x = zeros(2, 3, 2, 5, 4), zeros(2, 2, 2, 5, 3)
    with pytest.raises(ValueError, match=r"k: expected the shape of q"):
        am_flow_matmul(q, q[:1], x)
    with pytest.raises(ValueError, match=r"q: expected more frames .* than lag = 3, got T = 3"):
        am_flow_matmul(q, q, x, lag=3)
    with pytest.raises(ValueError, match=r"k_b: expected the shape of q_b"):
        am_flow_matmul_pair(q, q, q, q[:1], x)
    with pytest.raises(TypeError, match="positional"):
        am_flow_matmul(q, q, x, True)  # type: ignore[misc]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty(shape: tuple[int, int], operator: str, impl: str) -> None:
    """No clips (B = 0) or no pairs (P = 0) give an empty product and empty gradients, wherever it runs."""
    B, P = shape
    transpose, _ = OPERATORS[operator]
    q, k = torch.zeros(B, P, 2, 5, 4, requires_grad=True), torch.zeros(B, P, 2, 6, 4, requires_grad=True)
    x = torch.zeros(B, P, 2, 5 if transpose else 6, 3, requires_grad=True)
    y = am_flow_matmul_pair(q, k, q, k, x, impl=impl, **operator_options(operator))
    assert y.shape == (B, P, 2, 6 if transpose else 5, 3)
    grads = torch.autograd.grad(y.sum(), (q, k, x))
    assert [g.shape for g in grads] == [q.shape, k.shape, x.shape]
    if P:
        assert am_flow_matmul(q, k, x[:, 1:], impl=impl, **operator_options(operator)).shape[:2] == (B, P - 1)


# --- autograd and the ops


@pytest.mark.reference
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_gradcheck(lag: int, operator: str) -> None:
    """The reference's backward is the derivative of its forward, by finite differences in float64."""
    q, k = tt.make_qk(1, 4, (2,), 3, 5, 2, dtype=torch.float64, frame_step=1.0)
    frames = (q, k) if lag else (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
    transpose, _ = OPERATORS[operator]
    x = tt.make_features(*frames[:2], 2, lag=lag, transpose=transpose, dtype=torch.float64)
    inputs = tuple(t.clone().requires_grad_() for t in (*frames, x))
    options = {**operator_options(operator), "impl": "reference"}

    def function(*inputs: Tensor) -> Tensor:
        return am_flow_matmul(*inputs, lag=lag, **options) if lag else am_flow_matmul_pair(*inputs, **options)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=False)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lag", [0, 1])
def test_matmul_tie_bounds_a_wrong_sign(lag: int, operator: str) -> None:
    """Flipping the sign of every tie moves no element of any gradient by more than `matmul_tie`, and some by nearly it.

    Ties are made by hand: the second frame of a pair is the first but for one token that moves by next to nothing.
    """
    q, k = tt.make_qk(1, 2, (2,), 6, 5, 3, dtype=torch.float64)
    q[:, 1:], k[:, 1:] = q[:, :1], k[:, :1]
    k[:, 1:, :, 0] += 1e-8
    transpose, softmax = OPERATORS[operator]
    frames = (q, k, None, None) if lag else (q[:, :1], k[:, :1], q[:, 1:], k[:, 1:])
    x = tt.make_features(q[:, :1], k[:, :1], 4, lag=0, transpose=transpose, dtype=torch.float64)
    options = {**operator_options(operator), "lag": lag}
    dy = torch.randn(1, 1, 2, 5 if transpose else 6, 4, dtype=torch.float64)
    tie = tt.matmul_tie(dy, x, *frames, **options)
    needs = [f is not None for f in frames] + [False]
    arguments = (dy, *frames, x, 3**-0.5, lag, options.get("temperature", 1.0), transpose, softmax, needs)
    exact_grads = reference.am_flow_matmul_backward(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.torch, "sign", lambda x: x.sgn() * torch.where(x.abs() < 1e-7, -1, 1))
        flipped = reference.am_flow_matmul_backward(*arguments)
    for i, bound in enumerate(tie):
        moved = (flipped[i] - exact_grads[i]).abs()
        assert (moved <= bound + 1e-12 * exact_grads[i].abs().max()).all()
        assert moved.norm() > 0.1 * bound.norm()


@pytest.mark.parametrize("operator", OPERATORS)
def test_budget_sees_small_errors(operator: str) -> None:
    """The check rejects a product that is wrong in one element, by little more than float32 allows."""
    q, k = tt.make_qk(1, 3, (2,), 60, 50, 16)
    options = operator_options(operator)
    x = tt.make_features(q, k, 7, lag=1, transpose=options["transpose"])
    y, budget = tt.oracle_matmul(x, q, k, **options), tt.matmul_budget(x, q, k, **options)
    assert budget.max() < 5e-5 * y.abs().max()
    tt.assert_matmul(y, y, budget)
    for wrong in (1.1 * budget[0, 1, 1, 3, 2], math.nan):
        off = y.clone()
        off[0, 1, 1, 3, 2] += wrong
        with pytest.raises(AssertionError, match="the product is off by"):
            tt.assert_matmul(off, y, budget)


def op_arguments(operator: str, lag: int, dtype: torch.dtype, x_dtype: torch.dtype, impl: str) -> tuple[Any, ...]:
    """Arguments of the op amflow::am_flow_matmul."""
    q, k = tt.make_qk(2, 4, (2, 3) if lag == 1 else (2,), 5, 7, 6, dtype=dtype)
    frames = (q, k, None, None) if lag else (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(frames[0], frames[1], 3, lag=lag, transpose=transpose, dtype=x_dtype)
    return (*frames, x, 0.3, lag, 0.5 if softmax else 1.0, transpose, softmax, impl)


OP_SAMPLES = [
    ("M", 1, torch.float32, torch.float32),
    ("M^T", 2, torch.bfloat16, torch.bfloat16),
    ("P", 0, torch.float16, torch.float32),
    ("P^T", 1, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("requires_grad", [(False, False), (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("sample", OP_SAMPLES, ids=str)
def test_opcheck_forward(
    sample: tuple[Any, ...], requires_grad: tuple[bool, bool], impl: str, must_run: MustRun
) -> None:
    """amflow::am_flow_matmul keeps its schema, fake, autograd and dynamic-shape promises."""
    *tensors, scale, lag, temperature, transpose, softmax, impl = op_arguments(*sample, impl)
    needed = (requires_grad[0], requires_grad[1], *requires_grad, requires_grad[1])
    tensors = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    arguments = (*tensors, scale, lag, temperature, transpose, softmax, impl)
    if must_run(impl, lambda: matmul_ops.am_flow_matmul(*arguments)):
        library.opcheck(matmul_ops.am_flow_matmul, arguments)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("sample", OP_SAMPLES, ids=str)
def test_opcheck_backward(
    sample: tuple[Any, ...], needs: tuple[bool, bool, bool], impl: str, must_run: MustRun
) -> None:
    """amflow::am_flow_matmul_backward keeps the same promises, whichever gradients are needed."""
    *frames, x, scale, lag, temperature, transpose, softmax, impl = op_arguments(*sample, impl)
    dy = torch.randn(*x.shape[:-2], (frames[1] if transpose else frames[0]).shape[-2], x.shape[-1])
    needed = [n and t is not None for n, t in zip(needs[:2] * 2, frames, strict=True)] + [needs[2]]
    arguments = (dy, *frames, x, scale, lag, temperature, transpose, softmax, needed, impl)
    if must_run(impl, lambda: matmul_ops.am_flow_matmul_backward(*arguments)):
        library.opcheck(matmul_ops.am_flow_matmul_backward, arguments)


def loss_and_grads(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *args: Any) -> list[Tensor]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    loss = function(*inputs, *args)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def head(q: Tensor, k: Tensor, x: Tensor, impl: str) -> Tensor:
    """What a model makes of the operator: something before it, M^T of M x, something after it, one number."""
    moved = am_flow_matmul(q * 1.5, k + 0.1, x, impl=impl)
    back = am_flow_matmul_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], moved, transpose=True, softmax=True, impl=impl)
    return (back * 3).square().sum()


# B, T, Nq, Nk, C; no two of the first, 2 heads, T - 1 pairs and D = 6 are equal, or PyTorch compiles for equal ones
SHAPES = [(5, 9, 7, 11, 13), (2, 3, 6, 9, 3), (4, 5, 8, 11, 16), (5, 6, 17, 19, 5), (2, 7, 33, 21, 40)]


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_compile_with_any_shape(dynamic: bool | None, graphs: int, impl: str, must_run: MustRun) -> None:
    """One full graph serves every B, T, N and C, forward and backward: no recompiles as the shapes change."""
    problems = []
    for B, T, Nq, Nk, C in SHAPES:
        q, k = tt.make_qk(B, T, (2,), Nq, Nk, 6)
        problems.append((q, k, tt.make_features(q, k, C, lag=1)))
    if not must_run(impl, lambda: head(*problems[0], impl)):
        return
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for inputs in problems:
        assert_all_close(loss_and_grads(compiled, inputs, impl), loss_and_grads(head, inputs, impl))
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_second_order_raises(impl: str, must_run: MustRun) -> None:
    """A gradient of a gradient is refused with a clear message instead of being silently wrong."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    inputs = tuple(t.requires_grad_() for t in (q, k, tt.make_features(q, k, 3, lag=1)))
    if not must_run(impl, lambda: am_flow_matmul(*inputs, impl=impl)):
        return
    dx = torch.autograd.grad(am_flow_matmul(*inputs, impl=impl).square().sum(), inputs[2], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first-order gradients only; a second-order gradient was requested"):
        torch.autograd.grad(dx.sum(), inputs[0])


def test_only_inputs_are_saved(impl: str, must_run: MustRun) -> None:
    """Nothing is kept without grad, and with it the inputs and no map."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    x = tt.make_features(q, k, 3, lag=1)
    if not must_run(impl, lambda: am_flow_matmul(q, k, x, impl=impl)):
        return
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        assert am_flow_matmul(q, k, x, impl=impl).grad_fn is None
        assert not saved
        assert am_flow_matmul(q, k, x.clone().requires_grad_(), impl=impl).requires_grad
    assert [s.shape for s in saved] == [q.shape, k.shape, x.shape]


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast(operator: str, impl: str, must_run: MustRun) -> None:
    """Autocast neither casts the inputs nor the result, forward or backward: the bits are the same."""
    q, k = tt.make_qk(1, 3, (2,), 30, 50, 16)
    x = tt.make_features(q, k, 3, lag=1, transpose=OPERATORS[operator][0])
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    options = {**operator_options(operator), "impl": impl}
    if not must_run(impl, lambda: am_flow_matmul(*inputs, **options)):
        return
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = am_flow_matmul(*inputs, **options)
            results.append((y, *grads_of(y, inputs)))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        assert torch.equal(plain, cast)


def test_scratch_is_written_before_it_is_read(cpu_kernels_run: bool, cold_python: Callable[..., Any]) -> None:
    """The properties hold, too, if all memory that malloc hands out holds 3.4e38: no kernel reads unwritten scratch."""
    if not cpu_kernels_run:
        pytest.skip("without AVX2 no native kernel runs, and PyTorch's own allocations are poisoned already")
    matrix.run_with_poisoned_malloc(cold_python, __file__)
