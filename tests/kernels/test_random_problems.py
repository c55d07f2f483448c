"""Two thousand random problems of both operators: any shape, memory layout, dtype, temperature, kind of maps and NaN.

They are the same in every run. `hypothesis` prints the smallest problem that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amflow_kernels import testing as tt
from amflow_kernels.impl.reference import Reference
from amflow_kernels.problem import MapPairs
from tests.kernels import conformance
from tests.kernels.conformance import FACTORS, MATMUL_FACTORS, OPERATORS, X_LAYOUTS, Case, MatmulCase, Subject

pytestmark = pytest.mark.slow

SHARED_MEMORY = ("none", "batch", "windows of a sequence")
BAD_NUMBERS = ("none", "none", "none", "NaN in q", "NaN in k", "+inf logit")


@dataclass(frozen=True)
class SharedMemory:
    """What a random case has besides a case of the tables.

    Attributes:
        shared: which frames share memory: none, those of all clips (stride 0), or all, as overlapping windows.
        bad: a number that makes some rows of some maps NaN.
    """

    shared: str = "none"
    bad: str = "none"

    def frame_pairs(self) -> dict[str, Tensor]:
        frames: dict[str, Tensor] = super().frame_pairs()  # type: ignore[misc]
        if self.shared == "batch":
            frames = {name: x[:1].expand_as(x) for name, x in frames.items()}
        elif self.shared != "none":
            frames = {name: windows_of_a_sequence(x) for name, x in frames.items()}
        q, k = frames["q"], frames["k"]
        first = (0,) * (q.dim() - 2)
        if self.bad == "NaN in q":
            q[(*first, -1, 0)] = math.nan
        elif self.bad == "NaN in k":
            k[(*first, 0, -1)] = math.nan
        elif self.bad == "+inf logit":
            k[(*first, -1, 0)] = math.inf
        return frames

    def logit_error(self, problem: MapPairs) -> float:
        if self.shared == "windows of a sequence":  # frames that have little in common
            return tt.logit_error(problem)
        return super().logit_error(problem)  # type: ignore[misc, no-any-return]

    def incoming(self, shape: tuple[int, ...]) -> Tensor:
        gradient: Tensor = super().incoming(shape)  # type: ignore[misc]
        return windows_of_a_sequence(gradient) if self.shared == "windows of a sequence" else gradient


@dataclass(frozen=True)
class RandomFlow(SharedMemory, Case):
    def __str__(self) -> str:
        return f"{super().__str__()}-shared {self.shared}-{self.bad}"


@dataclass(frozen=True)
class RandomProduct(SharedMemory, MatmulCase):
    def __str__(self) -> str:
        return f"{super().__str__()}-shared {self.shared}-{self.bad}"


def windows_of_a_sequence(x: Tensor) -> Tensor:
    """A tensor like x whose frames, heads and rows overlap in memory, as those of torch.Tensor.unfold."""
    D = x.shape[-1]
    strides = [*range(x.dim() - 1, 1, -1), 1]  # in rows
    rows = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[:-1], strides, strict=True))
    memory = x.contiguous().flatten()
    memory = memory.repeat(math.ceil(rows * D / memory.numel()))
    return memory.as_strided(x.shape, [stride * D for stride in strides] + [1])


def sizes(most: int) -> st.SearchStrategy[int]:
    """Mostly small: all that is special about a size happens up to 20."""
    return st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(1, most))


@st.composite
def random_flow(draw: st.DrawFn, most: int = 90, dtypes: Sequence[torch.dtype] = tuple(FACTORS["dtype"])) -> RandomFlow:
    Nq, Nk = draw(sizes(most)), draw(sizes(most))
    layout = draw(st.sampled_from(tt.LAYOUTS))
    lag = draw(st.integers(0, 3))
    return RandomFlow(
        tokens=(Nq, Nq) if layout == "fused_qkv" else (Nq, Nk),
        D=draw(st.one_of(sizes(2 * most), st.sampled_from([64, 128, 256]))),
        frames=(draw(st.integers(lag + 1, 6)) if lag else 2 * draw(st.integers(1, 3)), lag),
        layout=layout,
        logits=draw(st.sampled_from([kind for kind in FACTORS["logits"] if kind != "one-hot"])),
        temperature=draw(st.one_of(st.floats(1 / 64, 1), st.floats(1, 10), st.just(1 / 64))),
        dtype=draw(st.sampled_from(dtypes)),
        groups=draw(st.sampled_from([(1,), (2,), (3,), (1, 3), (3, 1), (2, 2)])),
        head_reduction=draw(st.sampled_from(FACTORS["head_reduction"])),
        dflow=draw(st.sampled_from(FACTORS["dflow"])),
        needs=draw(st.sampled_from(FACTORS["needs"])),
        B=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
        shared=draw(st.sampled_from(SHARED_MEMORY)),
        bad=draw(st.sampled_from(BAD_NUMBERS)),
    )


@st.composite
def random_product(draw: st.DrawFn, most: int = 90, **options: Any) -> RandomProduct:
    operator = draw(st.sampled_from(list(OPERATORS)))
    flow = vars(draw(random_flow(most, **options))) | {"head_reduction": "none"}
    flow |= {"needs": draw(st.sampled_from(MATMUL_FACTORS["needs"]))}
    if operator.startswith("M"):
        flow["temperature"] = 1.0
    return RandomProduct(
        **flow,
        operator=operator,
        C=draw(st.one_of(sizes(most), st.sampled_from([64, 256] if most > 50 else [33]))),
        x_layout=draw(st.sampled_from(X_LAYOUTS)),
        x_float=draw(st.booleans()),
    )


def check_finite_part(found: Tensor, exact: Tensor, budget: Tensor | float) -> None:
    """The same elements are NaN, and the others are within their budget."""
    assert torch.equal(found.isnan(), exact.isnan()), "not the elements are NaN that a bad row moves"
    error = (found.double() - exact).abs().nan_to_num(0.0)
    assert (error <= budget).all(), f"off by {(error / budget).max().item():.3g} times the budget"


def check_finite_gradients(
    case: RandomFlow | RandomProduct,
    incoming: Tensor,
    impl: str,
    exact: Sequence[Tensor],
    ties: Sequence[Tensor],
) -> None:
    """The same elements are NaN, and the others are within their budget."""
    grads = conformance.gradients(case.problem(), case.needed(), incoming, impl)
    masked: list[list[Tensor | None]] = [[], [], []]
    for grad, want, tie in zip(grads, (x for x in exact if x.numel()), ties, strict=True):
        if grad is None:
            continue
        assert torch.equal(grad.isnan(), want.isnan()), "not the gradients are NaN that a bad row moves"
        for tensors, x in zip(masked, (grad, want, tie), strict=True):
            tensors.append(x.masked_fill(want.isnan(), 0.0))
    tt.assert_grads(*masked)  # type: ignore[arg-type]


def check_flow(case: RandomFlow, impl: str) -> None:
    if case.bad == "none":
        conformance.check_flow(case, impl)
        conformance.check_flow_gradients(case, impl)
        return
    problem = case.problem()
    double = in_double(problem)
    exact, saved = Reference().forward(double)
    largest = max(1.0, exact.nan_to_num(0.0).max().item())
    finite = tt.with_inputs(problem, [x.nan_to_num(0.0, 0.0, 0.0) for x in tt.inputs_of(problem)])
    check_finite_part(tt.run(problem, impl), exact, tt.flow_budget(largest, case.temperature, tt.logit_error(finite)))
    if case.bad != "+inf logit":  # its gradients hold 0 * inf
        dflow = case.incoming(problem.flow_shape)
        exact_grads = Reference().backward(double, dflow.double(), saved, [x is not None for x in problem.frames])
        check_finite_gradients(case, dflow, impl, exact_grads, tt.grad_tie(problem, dflow))


def check_product(case: RandomProduct, impl: str) -> None:
    if case.bad == "none":
        conformance.check_product(case, impl)
        conformance.check_product_gradients(case, impl)
        return
    problem = case.problem()
    double = in_double(problem)
    exact, budget = Reference().matmul(double), tt.matmul_budget(problem)
    check_finite_part(tt.run(problem, impl), exact, budget.nan_to_num(math.inf))
    if case.bad != "+inf logit":
        dy = case.incoming(problem.product_shape)
        needs = [x is not None for x in (*problem.frames, problem.x)]
        exact_grads = Reference().matmul_backward(double, dy.double(), needs)
        dx_budget = tt.matmul_budget(replace(problem, x=dy.contiguous(), transpose=not problem.transpose))
        ties = (*tt.matmul_tie(problem, dy), dx_budget)
        check_finite_gradients(case, dy, impl, exact_grads, ties)


def in_double(problem: Any) -> Any:
    return tt.with_inputs(problem, [x.double() for x in tt.inputs_of(problem)])


# How many flows and products each implementation computes, and limits where it runs slowly here: 2,000 problems in all.
COUNTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "cpu": (700, 500, {}),
    "chunked": (250, 200, {}),
    "reference": (100, 100, {}),
    "triton": (60, 40, {"most": 12, "dtypes": conformance.SUBJECTS["triton"].dtypes}),
    "cuda": (50, 0, {"most": 12}),
}


def run_random(count: int, cases: st.SearchStrategy[Any], check: Callable[[Any, str], None], impl: str) -> None:
    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(case=cases)
    def run(case: Any) -> None:
        check(case, impl)

    run()


def test_random_flows_are_within_their_budgets(subject: Subject) -> None:
    count, _, limits = COUNTS[subject.name]
    run_random(count, random_flow(**limits), check_flow, subject.name)


@pytest.mark.operator
def test_random_products_are_within_their_budgets(subject: Subject) -> None:
    _, count, limits = COUNTS[subject.name]
    run_random(count, random_product(**limits), check_product, subject.name)
