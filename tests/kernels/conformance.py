"""The implementations under test, the case tables, and the checks against the float64 oracle.

A new implementation is one row of `SUBJECTS`; a new option is one factor of `FACTORS`. Rows of the tables are generated
so that every two values of any two factors meet in some row.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import dispatch
from amflow_kernels import testing as tt
from amflow_kernels.impl.chunked import Chunked
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

FACTORS: dict[str, list[Any]] = {
    "tokens": [
        (1, 1), (2, 2), (17, 17), (197, 197), (257, 257), (261, 261), (577, 577), (1370, 1370),
        (16, 64), (64, 16), (49, 196), (1, 70), (70, 1),
    ],
    "D": [1, 8, 17, 40, 64, 72, 80, 128, 256],
    "frames": [(2, 1), (3, 1), (3, 2), (5, 2), (7, 3), (16, 1), (16, 3), (2, 0), (6, 0)],  # (T, lag); 0: T / 2 pairs
    "layout": list(tt.LAYOUTS),
    "logits": ["plain", "negative", "zero", "still", "flat", "large", "sharp", "cut", "one-hot", "equal rows",
               "equal large"],
    "temperature": [1 / 64, 0.1, 0.3, 1.0, 5.0],
    "dtype": [FP32, BF16, FP16],
    "groups": [(1,), (3,), (2, 3)],
    "head_reduction": ["none", "mean", "mean_map"],
    "dflow": ["contiguous", "expanded", "transposed"],
    "needs": ["all", "q", "k"],
}  # fmt: skip

LOGIT_STD = {"flat": 0.05, "large": 6.0, "sharp": 20.0, "cut": 6.0, "equal large": 6.0}  # of the others 1
FRAME_STEP = {"still": 1e-3, "cut": 2.0}  # of the others 0.2
OPERATORS = {"M": (False, False), "M^T": (True, False), "P": (False, True), "P^T": (True, True)}  # transpose, softmax
X_LAYOUTS = ("contiguous", "offset", "tokens_first", "shared")
MATMUL_FACTORS: dict[str, list[Any]] = {
    "tokens": [(1, 1), (2, 2), (17, 17), (65, 65), (197, 197), (16, 64), (64, 17), (130, 257), (1, 70), (70, 1)],
    "C": [1, 3, 4, 16, 64, 256],
    "D": [1, 17, 64, 128],
    "frames": [(2, 1), (3, 2), (5, 2), (8, 1), (2, 0), (6, 0)],
    "layout": list(tt.LAYOUTS),
    "x_layout": list(X_LAYOUTS),
    "logits": FACTORS["logits"],
    "dtype": FACTORS["dtype"],
    "x_float": [True, False],  # x in float32, or in the dtype of q
    "groups": FACTORS["groups"],
    "dflow": FACTORS["dflow"],
    "needs": ["all", "q", "k", "x", "q and x"],
}


def map_elements(row: Row) -> int:
    """Elements of all attention maps, with the smallest value of every factor that is not chosen yet."""
    Nq, Nk = row.get("tokens", (1, 1))
    return Nq * Nk * row.get("frames", (2, 1))[0] * math.prod(row.get("groups", (1,)))


def interpreted_tiles(row: Row) -> int:
    """Tiles of maps that Triton's interpreter computes, about 5 ms each."""
    (Nq, Nk), (T, _) = row.get("tokens", (1, 1)), row.get("frames", (2, 1))
    groups = row.get("groups", (1,))
    heads = 3 * groups[0] if row.get("head_reduction") == "mean_map" else 1
    steps = math.ceil(row.get("D", 64) / 64)
    return T * math.prod(groups) * heads * math.ceil(Nq / 32) * math.ceil(Nk / 32) * steps


def executed_and_interpreted(row: Row) -> float:
    """Work of the executed kernels, which takes 64 and more multiplications for each element of a map, in tiles of
    Triton's interpreter; or of the interpreter, which makes the gradients."""
    heads = row.get("groups", (1,))[0] if row.get("head_reduction") == "mean_map" else 1
    return max(map_elements(row) * heads * max(64, row.get("D", 1)) / 25_000, interpreted_tiles(row))


def executed_cuda() -> AbstractContextManager[object]:
    """impl="cuda" takes CPU tensors, and its kernels are executed as compiled to PTX."""
    from tests.ptx import cuda

    return cuda.gpu()


def executed_arm(isa: str) -> AbstractContextManager[object]:
    """impl=`isa` executes the CPU kernels for that instruction set of ARM."""
    from tests.arm import executed

    return executed.registered(isa)


@contextmanager
def small_blocks() -> Iterator[None]:
    """impl="chunked" cuts even small problems in every dimension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.IMPLEMENTATIONS, "chunked", Chunked(memory=1 << 20))
        yield


@dataclass(frozen=True, eq=False)
class Subject:
    """An implementation under test, and how large its problems may be here.

    Attributes:
        dtypes: those it takes.
        work: the cost of a row of a case table, and `most_work` the largest that is taken.
        fast: it runs at full speed, so that rules with larger shapes apply.
        matmul: it has the motion operator.
        own_python: False if only its compiled code is its own, so that only the rules of values and bits concern it.
        factors, matmul_factors: in place of those of the tables.
        fixtures: what has to be set up for it.
        plain_rows: how many rows of a case table the plain run takes. `all_rows`: and the slow one; None: all.
        plain_combinations: how many combinations of a rule's parameters the plain run takes; None: all.
            `all_combinations`: and the slow one, others are exhaustive; None: all.
        context: entered around every test.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    work: Callable[[Row], float] = map_elements
    most_work: int = 4_200_000
    most_matmul_work: int = 4_200_000
    fast: bool = True
    matmul: bool = True
    own_python: bool = True
    factors: dict[str, list[Any]] = field(default_factory=dict)
    matmul_factors: dict[str, list[Any]] = field(default_factory=dict)
    fixtures: tuple[str, ...] = ()
    plain_rows: int = 32
    all_rows: int | None = None
    plain_combinations: int | None = None
    all_combinations: int | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def __str__(self) -> str:
        return self.name

    def takes_row(self, row: Row, most_work: int) -> bool:
        """Whether a row of a case table concerns it."""
        return possible(row) and self.work(row) <= most_work

    def takes(self, parameters: Row) -> bool:
        """Whether a test with these parameters concerns it."""
        dtype, tokens = parameters.get("dtype"), parameters.get("tokens", (1, 1))
        if dtype is not None and dtype not in self.dtypes:
            return False
        if self.fast:
            return True
        asked = (*parameters.get("requires_grad", ()), *parameters.get("needs", ()))  # which gradients opcheck wants
        return max(tokens) <= 100 and all(asked) and parameters.get("name") in (None, "clip", "pair")


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("reference", plain_rows=6, all_rows=12, plain_combinations=20),
        Subject(
            "chunked",
            most_work=500_000,
            most_matmul_work=500_000,
            plain_rows=12,
            plain_combinations=6,
            context=small_blocks,
        ),
        Subject("cpu"),
        Subject(
            "triton",
            work=interpreted_tiles,
            most_work=120,
            most_matmul_work=24,
            fast=False,
            factors={
                "tokens": [(1, 1), (17, 17), (65, 65), (33, 70), (70, 33)],
                "D": [1, 17, 64, 72, 256],
                "frames": [(2, 1), (5, 2), (18, 1), (4, 0)],
                "logits": [kind for kind in FACTORS["logits"] if kind != "zero"],
                "groups": [(1,), (3,), (2, 2)],
            },
            matmul_factors={
                "tokens": [(1, 1), (17, 17), (33, 70), (70, 33)],
                "C": [1, 3, 17, 70],
                "D": [1, 17, 64, 72],
                "frames": [(2, 1), (5, 2), (4, 0)],
                "groups": [(1,), (2, 2)],
                "layout": ["contiguous", "fused_qkv", "offset"],
                "x_layout": ["contiguous", "offset"],
                "dflow": ["contiguous", "expanded"],
            },
            fixtures=("quick_interpreter", "hardware_products"),
            plain_rows=8,
            plain_combinations=1,
        ),
        Subject(
            "cuda",
            work=executed_and_interpreted,
            most_work=60,
            fast=False,
            matmul=False,
            factors={
                "tokens": [(1, 1), (17, 17), (65, 65), (33, 70), (70, 33), (197, 197), (49, 196)],
                "D": [1, 8, 17, 40, 64, 72, 80, 128],
                "frames": [(2, 1), (5, 2), (18, 1), (16, 3), (4, 0)],
                "groups": [(1,), (3,), (2, 2)],
            },
            fixtures=("cuda_compiled", "quick_interpreter", "hardware_products"),
            plain_rows=12,
            plain_combinations=2,
            context=executed_cuda,
        ),
        Subject(
            "neon",
            most_work=20_000,
            most_matmul_work=20_000,
            own_python=False,
            fixtures=("arm_compiled",),
            plain_rows=0,
            all_rows=20,
            plain_combinations=0,
            all_combinations=3,
            context=partial(executed_arm, "neon"),
        ),
        Subject(
            "neon_bf16",
            dtypes=(BF16,),  # in other dtypes it runs the same code
            most_work=20_000,
            most_matmul_work=20_000,
            own_python=False,
            fixtures=("arm_compiled",),
            plain_rows=0,
            all_rows=10,
            plain_combinations=0,
            all_combinations=2,
            context=partial(executed_arm, "neon_bf16"),
        ),
    )
}


def possible(row: Row) -> bool:
    """Whether a problem of these values exists."""
    Nq, Nk = row.get("tokens", (1, 1))
    if row.get("logits") == "one-hot" and row.get("D", 64) == 1:
        return False  # numbers have no such maps
    return row.get("layout") != "fused_qkv" or Nq == Nk


def pairwise(factors: dict[str, list[Any]], allowed: Callable[[Row], bool]) -> list[Row]:
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


@dataclass(frozen=True)
class Case:
    """A call of `am_flow` or `am_flow_pair`: its input, its options and which gradients are asked for."""

    tokens: tuple[int, int]
    D: int
    frames: tuple[int, int]
    layout: str
    logits: str
    temperature: float
    dtype: torch.dtype
    groups: tuple[int, ...]
    dflow: str
    needs: str
    head_reduction: str = "none"
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
        """For `centred_budget`: the change of the logits at a logit_std of 1, or less if that is smaller."""
        return FRAME_STEP.get(self.logits, 0.2) * min(1.0, LOGIT_STD.get(self.logits, 1.0))

    def logit_error(self, problem: MapPairs) -> float:
        """For `flow_budget`: 0 unless rounding errors of the logits count, as they do not average out, or are large."""
        counts = self.tokens[0] == 1 or self.logits in ("sharp", "cut", "one-hot", "equal rows", "equal large")
        return tt.logit_error(problem) if counts else 0.0

    def frame_pairs(self) -> dict[str, Tensor]:
        """q and k, and in pair form q_b and k_b, as every other frame of a clip.

        cut: maps are peaked, and frames have nothing in common. one-hot: each row is nearly all on one key, in two
        rows of three on another in each frame. equal: all rows are.
        """
        T, lag = self.frames
        q, k = tt.make_qk(
            self.B, T, self.groups, *self.tokens, self.D, dtype=self.dtype,
            frame_step=FRAME_STEP.get(self.logits, 0.2), logit_std=LOGIT_STD.get(self.logits, 1.0),
            layout=self.layout, seed=self.seed,
        )  # fmt: skip
        if self.logits.startswith("equal"):
            q.copy_(q[..., :1, :].clone().expand_as(q))
        if self.logits == "one-hot":
            row, frame = torch.arange(q.shape[-2]), torch.arange(T)[:, None]
            key = (row + frame * (row % 3 < 2)) % k.shape[-2]
            for t in range(T):
                q[:, t] = 40 * self.D**-0.5 * k[:, t][..., key[t], :]
        return {"q": q, "k": k} if lag else {"q": q[:, ::2], "k": k[:, ::2], "q_b": q[:, 1::2], "k_b": k[:, 1::2]}

    def map_options(self) -> dict[str, Any]:
        scale = {"negative": -(self.D**-0.5), "zero": 0.0}.get(self.logits)
        lag = {"lag": self.frames[1]} if self.frames[1] else {}
        return {"scale": scale, "temperature": self.temperature, **lag}

    def problem(self) -> Problem:
        return Problem(**self.frame_pairs(), **self.map_options(), head_reduction=self.head_reduction)

    def incoming(self, shape: tuple[int, ...]) -> Tensor:
        """The gradient of the result."""
        return tt.make_dflow(shape, layout=self.dflow, seed=self.seed)

    def needed(self) -> list[bool]:
        """Which of the inputs get a gradient."""
        needed = [self.needs in ("all", "q", "q and x"), self.needs in ("all", "k")]
        return needed if self.frames[1] else needed * 2


def small_case(**options: Any) -> Case:
    """A case of few tokens, by itself at the lowest temperature."""
    row = {name: values[0] for name, values in FACTORS.items()}
    return Case(**{**row, "tokens": (8, 9), "D": 16, **options})


@dataclass(frozen=True)
class MatmulCase(Case):
    """A call of `am_flow_matmul` or `am_flow_matmul_pair`."""

    operator: str = "M"
    C: int = 1
    x_layout: str = "contiguous"
    x_float: bool = True

    def __str__(self) -> str:
        x_dtype = "x float32" if self.x_float else "x alike"
        return "-".join((self.operator, super().__str__(), f"C{self.C}", self.x_layout, x_dtype))

    def problem(self) -> MatmulProblem:
        frames = self.frame_pairs()
        transpose, softmax = OPERATORS[self.operator]
        x = tt.make_features(
            frames["q"], frames["k"], self.C, lag=self.frames[1], transpose=transpose, layout=self.x_layout,
            dtype=FP32 if self.x_float else self.dtype, seed=self.seed,
        )  # fmt: skip
        return MatmulProblem(**frames, x=x, **self.map_options(), transpose=transpose, softmax=softmax)

    def needed(self) -> list[bool]:
        return [*super().needed(), self.needs in ("all", "x", "q and x")]


@cache
def flow_cases(subject: Subject) -> list[Case]:
    """The case table of an implementation for the flow."""
    factors = {**FACTORS, **subject.factors, "dtype": list(subject.dtypes)}
    rows = pairwise(factors, lambda row: subject.takes_row(row, subject.most_work))
    return [
        Case(**row, B=2 if subject.fast and map_elements(row) < 500_000 else 1, seed=seed)
        for seed, row in enumerate(_thinned(rows, subject.all_rows))
    ]


@cache
def matmul_cases(subject: Subject) -> list[MatmulCase]:
    """The case table of an implementation for the motion operator."""
    shared = {**MATMUL_FACTORS, **subject.matmul_factors, "dtype": list(subject.dtypes)}
    tables = [
        {**shared, "operator": ["M", "M^T"], "temperature": [1.0]},
        {**shared, "operator": ["P", "P^T"], "temperature": FACTORS["temperature"]},
    ]
    rows = []
    for table in tables:
        rows += pairwise(table, lambda row: subject.takes_row(row, subject.most_matmul_work))
    return [
        MatmulCase(**row, B=1 + seed % 2 if subject.fast else 1, seed=seed)
        for seed, row in enumerate(_thinned(rows, subject.all_rows))
    ]


def _thinned(rows: list[Row], most: int | None) -> list[Row]:
    """At most so many rows, from all over the table."""
    return rows if most is None else rows[:: math.ceil(len(rows) / most)]


def tiers(subject: Subject, cases: list[Any]) -> Iterator[tuple[Any, bool]]:
    """The cases, and whether each belongs to the slow tier."""
    step = math.ceil(len(cases) / max(1, subject.plain_rows))
    for number, case in enumerate(cases):
        yield case, subject.plain_rows == 0 or number % step != 0


# ---------------------------------------------------------------------------------------------------- checks


@cache
def centred_oracle(case: Case) -> Tensor:
    return tt.oracle_flow(replace(case.problem(), center=True))


@cache
def matmul_oracle(case: MatmulCase) -> Tensor:
    return tt.oracle_matmul(case.problem())


def check_flow(case: Case, impl: str) -> None:
    """The flow and the centred flow are within their budgets of the oracle."""
    problem, exact = case.problem(), centred_oracle(case)
    with tt.poison_allocations():
        flow = tt.run(problem, impl)
        centred = tt.run(replace(problem, center=True), impl)
    of_maps: dict[str, float] = {"temperature": case.temperature, "logit_error": case.logit_error(problem)}
    tt.assert_flow(flow, exact, problem.Nq, **of_maps)
    tt.assert_centred(centred, exact, problem.Nq, frame_step=case.frame_step, **of_maps)


def check_flow_gradients(case: Case, impl: str) -> None:
    """The gradients that were asked for are within their budgets of the oracle, whatever the strides of dflow."""
    problem = case.problem()
    dflow = case.incoming(problem.flow_shape)
    grads = gradients(problem, case.needed(), dflow, impl)
    exact, tie = tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow)
    tt.assert_grads(grads, exact, tie, tt.grad_magnitude(problem, dflow))


def check_product(case: MatmulCase, impl: str) -> None:
    """Every element is within `matmul_budget`, and M x as a whole within `centred_budget` if errors average out."""
    problem, exact = case.problem(), matmul_oracle(case)
    with tt.poison_allocations():
        y = tt.run(problem, impl)
    assert y.dtype == FP32
    tt.assert_matmul(y, exact, tt.matmul_budget(problem))
    average = case.logit_error(problem) == 0 and y.numel() >= 100  # a few sums may all happen to cancel
    if case.operator.startswith("M") and average:
        error, norm = (y.double() - exact).norm().item(), exact.norm().item()
        assert error <= tt.centred_budget(case.frame_step) * norm, f"L2 error of {error:.3g} on {norm:.3g}"


def check_product_gradients(case: MatmulCase, impl: str) -> None:
    """Gradients of q and k are within `grad_budget`; that of x is a product with dy, and held to `matmul_budget`."""
    problem = case.problem()
    dy = case.incoming(problem.product_shape)
    *grads, dx = gradients(problem, case.needed(), dy, impl)
    if dx is not None:
        transposed = replace(problem, x=dy.contiguous(), transpose=not problem.transpose)
        tt.assert_matmul(dx, tt.oracle_matmul(transposed), tt.matmul_budget(transposed))
    if any(g is not None for g in grads):
        exact, tie = tt.oracle_matmul_grads(problem, dy), tt.matmul_tie(problem, dy)
        tt.assert_grads(grads, exact, tie, tt.matmul_magnitude(problem, dy))


def gradients(problem: Problem | MatmulProblem, needed: list[bool], incoming: Tensor, impl: str) -> list[Tensor | None]:
    """The gradients of the inputs that need one, and None for the others, computed in poisoned memory."""
    inputs = [x.detach().requires_grad_(n) for x, n in zip(tt.inputs_of(problem), needed, strict=True)]
    with tt.poison_allocations():
        result = tt.run(tt.with_inputs(problem, inputs), impl)
        found = iter(torch.autograd.grad(result, [x for x in inputs if x.requires_grad], incoming))
    grads = [next(found) if n else None for n in needed]
    assert all(g is None or g.dtype == x.dtype for g, x in zip(grads, inputs, strict=True))
    return grads


BAD_ROWS = ("NaN in q", "NaN in k", "+inf logit", "all -inf")


def make_bad_row(kind: str, q: Tensor, k: Tensor) -> None:
    """Makes row 3 of one map NaN through its frame's q (Nq, D) and k (Nk, D), at a positive scale."""
    if kind == "NaN in q":
        q[3, 0] = math.nan
    elif kind == "NaN in k":
        k[-1, -1] = math.nan
    elif kind == "+inf logit":  # and -inf in that key's other logits
        q[:, 0], q[3, 0], k[5, 0] = -1, 1, math.inf
    else:
        assert kind == "all -inf"
        q[3, 0], k[:, 0] = -math.inf, k[:, 0].abs() + 0.1


def check_bad_gradients(kind: str, grads: Sequence[Tensor], clean: Sequence[Tensor]) -> None:
    """dq and dk (1, 5, 2, N, D) of a clip with a bad row in head 1 of frame 2, and of the same clip without it."""
    for grad, before, is_q in zip(grads, clean, (True, False), strict=True):
        rows = slice(3, 4) if is_q and kind != "NaN in k" else slice(None)  # such a key is in all rows of its map
        assert grad[0, 1:4, 1, rows].isnan().all(), "a gradient that the bad row moves is not NaN"
        if kind.startswith("NaN"):  # infinite q or k bring other NaNs, and change other rows
            assert not grad[0, 2, 0].isnan().any(), "a gradient of another head is NaN"
            rest = [i for i in range(grad.shape[-2]) if i not in range(grad.shape[-2])[rows]]
            assert not grad[0, 1:4, 1, rest].isnan().any(), "a gradient of another query is NaN"
        untouched = torch.stack((grad[0, [0, 4], 1], grad[0, [0, 4], 0]))
        assert torch.equal(untouched, torch.stack((before[0, [0, 4], 1], before[0, [0, 4], 0])))
