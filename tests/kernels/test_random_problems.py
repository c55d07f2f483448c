"""Two thousand random problems of both operators: any shape, memory layout, dtype, temperature, kind of maps and NaN.

They are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import testing as tt
from amflow_kernels.impl.reference import Reference
from amflow_kernels.problem import MapPairs
from tests.kernels import conformance
from tests.kernels.conformance import (
    BF16,
    FACTORS,
    FP16,
    FP32,
    MATMUL_FACTORS,
    OPERATORS,
    SUBJECTS,
    X_LAYOUTS,
    Case,
    MatmulCase,
    Subject,
)

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


def any_size(draw: Random, most: int) -> int:
    """Mostly small: all that is special about a size happens up to 20."""
    return draw.randint(1, draw.choice((20, 20, most)))


def random_flow(draw: Random, *, most: int = 90) -> RandomFlow:
    Nq, Nk = any_size(draw, most), any_size(draw, most)
    layout, lag = draw.choice(tt.LAYOUTS), draw.randint(0, 3)
    logits, bad = draw.choice([kind for kind in FACTORS["logits"] if kind != "one-hot"]), draw.choice(BAD_NUMBERS)
    if logits == "zero" and bad == "+inf logit":
        bad = "none"  # the kernels for GPUs take a scale of 0 for one of 1e-38, so that 0 * inf is not NaN
    return RandomFlow(
        tokens=(Nq, Nq) if layout == "fused_qkv" else (Nq, Nk),
        D=draw.choice((any_size(draw, 2 * most), *((64, 128, 256) if most > 50 else (64, 65)))),
        frames=(draw.randint(lag + 1, 6) if lag else 2 * draw.randint(1, 3), lag),
        layout=layout,
        logits=logits,
        temperature=draw.choice((draw.uniform(1 / 64, 1), draw.uniform(1, 10), 1 / 64)),
        dtype=draw.choice((FP32, BF16, FP16)),
        groups=draw.choice(((1,), (2,), (3,), (1, 3), (3, 1), (2, 2))),
        head_reduction=draw.choice(FACTORS["head_reduction"]),
        dflow=draw.choice(FACTORS["dflow"]),
        needs=draw.choice(FACTORS["needs"]),
        B=draw.randint(1, 2),
        seed=draw.randrange(2**20),
        shared=draw.choice(SHARED_MEMORY),
        bad=bad,
    )


def random_product(draw: Random, *, most: int = 90) -> RandomProduct:
    operator = draw.choice(list(OPERATORS))
    flow = vars(random_flow(draw, most=most)) | {"head_reduction": "none"}
    flow["needs"] = draw.choice(MATMUL_FACTORS["needs"])
    if operator.startswith("M"):
        flow["temperature"] = 1.0
    return RandomProduct(
        **flow,
        operator=operator,
        C=any_size(draw, most) if most < 50 else draw.choice((any_size(draw, most), 64, 256)),
        x_layout=draw.choice(X_LAYOUTS),
        x_float=draw.random() < 0.5,
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
    magnitudes: Sequence[Tensor],
) -> None:
    """The same elements are NaN, and the others are within their budget."""
    grads = conformance.gradients(case.problem(), case.needed(), incoming, impl)
    masked: list[list[Tensor]] = [[], [], [], []]
    for grad, want, tie, magnitude in zip(grads, (x for x in exact if x.numel()), ties, magnitudes, strict=True):
        if grad is None:
            continue
        assert torch.equal(grad.isnan(), want.isnan()), "not the gradients are NaN that a bad row moves"
        for tensors, x in zip(masked, (grad, want, tie, magnitude), strict=True):
            tensors.append(x.masked_fill(want.isnan(), 0.0).nan_to_num(0.0))  # ties of frames in no pair are NaN
    tt.assert_grads(*masked)


def check_flow(case: RandomFlow, impl: str) -> None:
    problem = case.problem()
    if case.bad == "none":
        if case.logit_error(problem) == 0 and min(*case.tokens, case.D) >= 8:
            conformance.check_flow(case, impl)
        else:  # a few numbers may happen to change so little that nothing relative to their change is promised
            tt.assert_flow(
                tt.run(problem, impl),
                tt.oracle_flow(replace(problem, center=True)),
                problem.Nq,
                temperature=case.temperature,
                logit_error=case.logit_error(problem),
            )
        conformance.check_flow_gradients(case, impl)
        return
    double = in_double(problem)
    exact, saved = Reference().forward(double)
    largest = max(1.0, exact.nan_to_num(0.0).max().item())
    finite = tt.with_inputs(problem, [x.nan_to_num(0.0, 0.0, 0.0) for x in tt.inputs_of(problem)])
    check_finite_part(tt.run(problem, impl), exact, tt.flow_budget(largest, case.temperature, tt.logit_error(finite)))
    if case.bad != "+inf logit":  # its gradients hold 0 * inf
        dflow = case.incoming(problem.flow_shape)
        exact_grads = Reference().backward(double, dflow.double(), saved, [x is not None for x in problem.frames])
        check_finite_gradients(
            case, dflow, impl, exact_grads, tt.grad_tie(problem, dflow), tt.grad_magnitude(problem, dflow)
        )


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
        ties, magnitudes = (*tt.matmul_tie(problem, dy), dx_budget), (*tt.matmul_magnitude(problem, dy), dx_budget)
        check_finite_gradients(case, dy, impl, exact_grads, ties, magnitudes)


def in_double(problem: Any) -> Any:
    return tt.with_inputs(problem, [x.double() for x in tt.inputs_of(problem)])


BATCH = 50
# Batches of flows and of products of each implementation, and limits where it runs slowly here: 2,000 problems in all.
BATCHES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "cpu": (14, 10, {}),
    "chunked": (5, 3, {}),
    "reference": (3, 2, {}),
    "triton": (1, 1, {"most": 12}),
    "cuda": (1, 0, {"most": 12}),
}


def batches(kind: int) -> Any:
    """Parametrises `subject` and the number of a batch; kind 0: flows, 1: products."""
    parameters = [(SUBJECTS[name], batch) for name, counts in BATCHES.items() for batch in range(counts[kind])]
    return pytest.mark.parametrize(("subject", "batch"), parameters, ids=str, indirect=["subject"])


def run_batch(batch: int, subject: Subject, make: Callable[..., Any], check: Callable[[Any, str], None]) -> None:
    """All problems of a batch; the error says which fail, and why."""
    failures = []
    for number in range(BATCH * batch, BATCH * (batch + 1)):
        case = make(Random(number), **BATCHES[subject.name][2])
        try:
            check(case, subject.name)
        except AssertionError as error:
            failures.append(f"{number}: {case}: {str(error).splitlines()[0]}")
    assert not failures, "\n".join(failures)


@batches(0)
def test_random_flows_are_within_their_budgets(subject: Subject, batch: int) -> None:
    run_batch(batch, subject, random_flow, check_flow)


@batches(1)
def test_random_products_are_within_their_budgets(subject: Subject, batch: int) -> None:
    run_batch(batch, subject, random_product, check_product)
