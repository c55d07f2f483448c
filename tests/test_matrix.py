"""The one matrix: implementation x dtype x shape x layout x options, forward and backward, against the float64 oracle.

Rows are generated so that every two values of any two factors meet in some row. Outputs are poisoned with NaN.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amflow_kernels import am_flow, am_flow_pair
from amflow_kernels import testing as tt

pytestmark = pytest.mark.capability

MustRun = Callable[[str, Callable[[], object]], bool]

FACTORS: dict[str, list[Any]] = {
    "tokens": [
        (1, 1), (2, 2), (17, 17), (197, 197), (257, 257), (261, 261), (577, 577), (1370, 1370),
        (16, 64), (64, 16), (49, 196), (1, 70), (70, 1),
    ],
    "D": [1, 8, 17, 40, 64, 72, 80, 128, 256],
    "frames": [(2, 1), (3, 1), (3, 2), (5, 2), (7, 3), (16, 1), (16, 3), (2, 0), (6, 0)],  # (T, lag); 0: T / 2 pairs
    "layout": list(tt.LAYOUTS),
    "logits": ["plain", "negative", "zero", "large", "still"],
    "temperature": [1 / 64, 0.3, 1.0, 5.0],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "groups": [(1,), (3,), (2, 3)],
    "head_reduction": ["none", "mean", "mean_map"],
    "dflow": ["contiguous", "expanded", "transposed"],
    "needs": ["all", "q", "k"],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One problem: input, options and which gradients are asked for."""

    tokens: tuple[int, int]
    D: int
    frames: tuple[int, int]
    layout: str
    logits: str
    temperature: float
    dtype: torch.dtype
    groups: tuple[int, ...]
    head_reduction: str
    dflow: str
    needs: str
    B: int = 1
    seed: int = 0

    def __str__(self) -> str:
        T, lag = self.frames
        frames = f"T{T}lag{lag}" if lag else f"{T // 2}pairs"
        shape = "x".join(map(str, (self.B, frames, *self.groups, *self.tokens, self.D)))
        dtype = str(self.dtype).removeprefix("torch.")
        options = (self.logits, f"{self.temperature:.3g}", self.head_reduction, self.dflow, self.needs)
        return "-".join((shape, dtype, self.layout, *options))

    @property
    def frame_step(self) -> float:
        return 1e-3 if self.logits == "still" else 0.2

    @property
    def scale(self) -> float | None:
        return {"negative": -(self.D**-0.5), "zero": 0.0}.get(self.logits)

    def inputs(self) -> tuple[Tensor, ...]:
        """(q, k), or (q_a, k_a, q_b, k_b) as every other frame of a clip."""
        T, lag = self.frames
        q, k = tt.make_qk(
            self.B, T, self.groups, *self.tokens, self.D, dtype=self.dtype, frame_step=self.frame_step,
            logit_std=6.0 if self.logits == "large" else 1.0, layout=self.layout, seed=self.seed,
        )  # fmt: skip
        return (q, k) if lag else (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])

    def options(self) -> dict[str, Any]:
        options = {"scale": self.scale, "temperature": self.temperature, "head_reduction": self.head_reduction}
        return {**options, "lag": self.frames[1]} if self.frames[1] else options

    def run(self, inputs: tuple[Tensor, ...], *, impl: str, center: bool = False) -> Tensor:
        function: Callable[..., Tensor] = am_flow if self.frames[1] else am_flow_pair
        return function(*inputs, center=center, impl=impl, **self.options())

    def dflow_tensor(self) -> Tensor:
        shape = (*centred_oracle(self).shape,)
        return tt.make_dflow(shape, layout=self.dflow, seed=self.seed)

    def needed(self) -> list[bool]:
        needed = [self.needs in ("all", "q"), self.needs in ("all", "k")]
        return needed if self.frames[1] else needed * 2


def map_elements(row: dict[str, Any]) -> int:
    """Elements of all attention maps, with the smallest value of every factor that is not chosen yet."""
    Nq, Nk = row.get("tokens", (1, 1))
    return Nq * Nk * row.get("frames", (2, 1))[0] * math.prod(row.get("groups", (1,)))


def allowed(row: dict[str, Any]) -> bool:
    Nq, Nk = row.get("tokens", (1, 1))
    if row.get("logits") == "large" and row.get("temperature", 1.0) < tt.SHARP:
        return False  # beyond what flow_budget promises
    return (row.get("layout") != "fused_qkv" or Nq == Nk) and map_elements(row) <= 4_200_000


def pairwise(
    factors: dict[str, list[Any]], allowed: Callable[[dict[str, Any]], bool] = allowed
) -> list[dict[str, Any]]:
    """Rows in which every allowed pair of values of two factors occurs, by greedy choice."""
    rng = random.Random(0)
    names = list(factors)
    missing: dict[frozenset[tuple[str, Any]], None] = {}
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(factors[a], factors[b]):
            if allowed({a: x, b: y}):
                missing[frozenset({(a, x), (b, y)})] = None
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in rng.sample([n for n in names if n not in row], len(names) - len(row)):
            values = [v for v in rng.sample(factors[name], len(factors[name])) if allowed({**row, name: v})]
            row[name] = max(values, key=lambda v: sum(frozenset({(name, v), x}) in missing for x in row.items()))
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append(row)
    return rows


CASES = [
    Case(**row, B=2 if map_elements(row) < 500_000 else 1, seed=seed) for seed, row in enumerate(pairwise(FACTORS))
]


@cache
def centred_oracle(case: Case) -> Tensor:
    return tt.oracle_flow(*case.inputs(), center=True, **case.options())


@cache
def gradient_oracle(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Exact gradients, ties, and the magnitude where the exact gradients are zero."""
    arguments = (case.dflow_tensor(), *case.inputs())
    exact = tt.oracle_grads(*arguments, **case.options())
    magnitude = tt.grad_magnitude(*arguments, **case.options()) if case.tokens[1] <= 2 else None
    return exact, tt.grad_tie(*arguments, **case.options()), magnitude


def check_forward(case: Case, impl: str) -> None:
    inputs, exact = case.inputs(), centred_oracle(case)
    with tt.poison_allocations():
        flow = case.run(inputs, impl=impl)
        centred = case.run(inputs, impl=impl, center=True)
    tt.assert_flow(flow, exact, case.tokens[0], temperature=case.temperature)
    tt.assert_centred(centred, exact, case.tokens[0], frame_step=case.frame_step, temperature=case.temperature)


def check_backward(case: Case, impl: str) -> None:
    needed = case.needed()
    inputs = tuple(x.detach().requires_grad_(n) for x, n in zip(case.inputs(), needed, strict=True))
    with tt.poison_allocations():
        flow = case.run(inputs, impl=impl)
        asked = [x for x, n in zip(inputs, needed, strict=True) if n]
        got = iter(torch.autograd.grad(flow, asked, case.dflow_tensor()))
    grads = [next(got) if n else None for n in needed]
    assert all(g is None or g.dtype == case.dtype for g in grads)
    tt.assert_grads(grads, *gradient_oracle(case))


def test_rows_are_pairwise() -> None:
    """Every pair of values of two factors that is possible at all occurs in some row of the matrix."""
    rows = [vars(case) for case in CASES]
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(row[a], row[b]) for row in rows}
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            assert (x, y) in seen or not allowed({a: x, b: y}), f"{a}={x} never meets {b}={y}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, impl: str, must_run: MustRun) -> None:
    """Flow and centred flow are within their budgets of the oracle."""
    if must_run(impl, lambda: case.run(case.inputs(), impl=impl)):
        check_forward(case, impl)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, impl: str, must_run: MustRun) -> None:
    """The gradients that were asked for are within their budgets of the oracle, whatever the strides of dflow."""
    if must_run(impl, lambda: case.run(case.inputs(), impl=impl)):
        check_backward(case, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_4096_tokens(dtype: torch.dtype, impl: str, must_run: MustRun) -> None:
    """The budgets hold at the largest number of tokens for which they are promised."""
    row = {name: values[0] for name, values in FACTORS.items()}
    case = Case(**{**row, "tokens": (4096, 4096), "D": 64, "dtype": dtype, "layout": "fused_qkv", "temperature": 1.0})
    if must_run(impl, lambda: case.run(case.inputs(), impl=impl)):
        check_forward(case, impl)


@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
def test_backward_of_sum(head_reduction: str, impl: str, must_run: MustRun) -> None:
    """The gradient of flow.sum(), a dflow of stride 0 everywhere, is zero up to rounding: the sum is always Nq."""
    q, k = (x.requires_grad_() for x in tt.make_qk(2, 3, (2,), 33, 70, 24))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    with tt.poison_allocations():
        grads = torch.autograd.grad(am_flow(q, k, head_reduction=head_reduction, impl=impl).sum(), (q, k))
    shape = tt.flow_shape(q, k, lag=1, head_reduction=head_reduction)
    magnitude = tt.grad_magnitude(torch.ones(shape), q, k, head_reduction=head_reduction)
    zeros = [torch.zeros_like(m) for m in magnitude]
    tt.assert_grads(grads, zeros, zeros, magnitude)


def _poison(kind: str, q: Tensor, k: Tensor) -> None:
    """Makes row 3 of one map NaN through its frame's q (Nq, D) and k (Nk, D), at a positive scale."""
    if kind == "NaN in q":
        q[3, 0] = math.nan
    elif kind == "NaN in k":
        k[-1, -1] = math.nan
    elif kind == "+inf logit":  # and -inf in that key's other logits
        q[:, 0], q[3, 0], k[5, 0] = -1, 1, math.inf
    elif kind == "all -inf":
        q[3, 0], k[:, 0] = -math.inf, k[:, 0].abs() + 0.1
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
@pytest.mark.parametrize("kind", ["NaN in q", "NaN in k", "+inf logit", "all -inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(5, 7), (70, 150)], ids=str)
def test_nan_rule(
    tokens: tuple[int, int], dtype: torch.dtype, kind: str, head_reduction: str, impl: str, must_run: MustRun
) -> None:
    """A bad map row makes NaN of all of the flows that use its map and leaves every other flow as it was."""
    b, t, h, lag = 1, 2, 1, 2
    q, k = tt.make_qk(2, 6, (3,), *tokens, 8, dtype=dtype)
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    clean = am_flow(q, k, lag=lag, head_reduction=head_reduction, impl=impl)
    _poison(kind, q[b, t, h], k[b, t, h])
    expected = clean.clone()
    for pair in (t - lag, t):
        (expected[b, pair, h] if head_reduction == "none" else expected[b, pair]).fill_(math.nan)
    for center in (False, True):
        flow = am_flow(q, k, lag=lag, head_reduction=head_reduction, center=center, impl=impl)
        assert torch.equal(flow.isnan(), expected.isnan())
        if not center:
            assert torch.equal(flow.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("frame", ["a", "b"])
@pytest.mark.parametrize("kind", ["NaN in q", "NaN in k", "+inf logit", "all -inf"])
def test_nan_rule_for_pairs(kind: str, frame: str, impl: str, must_run: MustRun) -> None:
    """In pair form a bad map row of either frame makes NaN of that pair's flow alone."""
    q, k = tt.make_qk(2, 6, (2,), 20, 70, 8)
    frames = [x.clone() for x in (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])]
    if not must_run(impl, lambda: am_flow_pair(*frames, impl=impl)):
        return
    expected = am_flow_pair(*frames, impl=impl)
    expected[0, 1, 1] = math.nan
    q_bad, k_bad = frames[:2] if frame == "a" else frames[2:]
    _poison(kind, q_bad[0, 1, 1], k_bad[0, 1, 1])
    torch.testing.assert_close(am_flow_pair(*frames, impl=impl), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_minus_inf_logit_weighs_nothing(dtype: torch.dtype, scale: float, impl: str, must_run: MustRun) -> None:
    """Logits of -inf are weights of 0: the flow stays finite and is the oracle's."""
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 8, dtype=dtype)
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    q[0, 1, 0, :, 0] = -q[0, 1, 0, :, 0].abs() - 0.1
    k[0, 1, 0, [0, 2, 69], 0] = math.copysign(math.inf, scale)
    exact = tt.oracle_flow(q, k, scale=scale, center=True)
    tt.assert_flow(am_flow(q, k, scale=scale, impl=impl), exact, 33)
    tt.assert_centred(am_flow(q, k, scale=scale, center=True, impl=impl), exact, 33, frame_step=0.2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.one_of(st.integers(1, 20), st.integers(21, 150))
    Nq, Nk = draw(sizes), draw(sizes)
    layout = draw(st.sampled_from(tt.LAYOUTS))
    lag = draw(st.integers(0, 3))
    T = draw(st.integers(lag + 1, 6)) if lag else 2 * draw(st.integers(1, 3))
    return Case(
        tokens=(Nq, Nq) if layout == "fused_qkv" else (Nq, Nk),
        D=draw(st.one_of(st.integers(1, 70), st.integers(71, 256))),
        frames=(T, lag),
        layout=layout,
        logits=draw(st.sampled_from(FACTORS["logits"])),
        temperature=draw(st.floats(0.1, 10)),
        dtype=draw(st.sampled_from(FACTORS["dtype"])),
        groups=draw(st.sampled_from([(1,), (2,), (5,), (1, 3), (3, 1), (2, 2)])),
        head_reduction=draw(st.sampled_from(FACTORS["head_reduction"])),
        dflow=draw(st.sampled_from(FACTORS["dflow"])),
        needs=draw(st.sampled_from(FACTORS["needs"])),
        B=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(
    max_examples=120, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(case=cases())
def test_any_problem(impl: str, must_run: MustRun, case: Case) -> None:
    """Whatever the shape, strides, lag, options and dtype: forward and backward are within their budgets."""
    if must_run(impl, lambda: case.run(case.inputs(), impl=impl)):
        check_forward(case, impl)
        check_backward(case, impl)


def test_without_vector_instructions(cold_python: Callable[..., Any]) -> None:
    """Below AVX2 impl='cpu' raises the reason, and impl=None runs the reference with one warning that names it."""
    code = """
import warnings
import torch
from amflow_kernels import am_flow, explain
torch.manual_seed(0)
q, k = torch.randn(2, 1, 3, 2, 9, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    flows = [am_flow(q, k), am_flow(q[:, :2], k[:, :2])]
assert len(caught) == 1, [str(w.message) for w in caught]
assert caught[0].category is RuntimeWarning and "the CPU capability is DEFAULT" in str(caught[0].message)
assert torch.equal(flows[0], am_flow(q, k, impl="reference"))
assert "the CPU capability is DEFAULT" in str(explain(q, k)) and explain(q, k).impl == "reference"
try:
    am_flow(q, k, impl="cpu")
except RuntimeError as error:
    assert "impl='cpu' can't run: the CPU capability is DEFAULT" in str(error), error
else:
    raise AssertionError("impl='cpu' ran")
"""
    cold_python(code, env={"ATEN_CPU_CAPABILITY": "default"})


def run_with_poisoned_malloc(cold_python: Callable[..., Any], file: str) -> None:
    """Runs a file's property test of the CPU kernels in a process where all memory that malloc hands out is 3.4e38."""
    code = f"""
import ctypes, sys
import pytest
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if ctypes.string_at(libc.malloc(1 << 20), 1 << 20) != b"\\x7f" * (1 << 20):
    print("no poison")
    sys.exit()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {file!r}, "-k", "test_any_problem and cpu"]))
"""
    result = cold_python(code, env={"GLIBC_TUNABLES": "glibc.malloc.perturb=128"})
    if "no poison" in result.stdout:
        pytest.skip("this C library can't fill what malloc hands out (GLIBC_TUNABLES)")
    assert "1 passed" in result.stdout


def test_scratch_is_written_before_it_is_read(cpu_kernels_run: bool, cold_python: Callable[..., Any]) -> None:
    """The properties hold, too, if all memory that malloc hands out holds 3.4e38: no kernel reads unwritten scratch."""
    if not cpu_kernels_run:
        pytest.skip("without AVX2 no native kernel runs, and PyTorch's own allocations are poisoned already")
    run_with_poisoned_malloc(cold_python, __file__)
