"""The rules of every implementation, kept by the Triton kernels as compiled: their PTX is executed.

The plain run has one case for every kernel. The slow tier reaches both sides of every switch between kernels or
configurations, and a part of the case tables; the mark `exhaustive` has their other rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem
from tests.kernels import conformance
from tests.kernels import test_conformance as rules
from tests.kernels import test_matmul_conformance as matmul_rules
from tests.kernels.conformance import BF16, FP16, FP32, Case, MatmulCase, Subject, small_case
from tests.ptx import worker

pytest.importorskip("triton", reason="Triton is not installed")

SLOW = pytest.mark.slow
DTYPES = [BF16, FP16, FP32]
ARCHITECTURES = [80, pytest.param(90, marks=SLOW)]


def executed(row: conformance.Row) -> float:
    """Elements of maps, several of which the machine computes in a microsecond."""
    heads = row.get("groups", (1,))[0] if row.get("head_reduction") == "mean_map" else 1
    return conformance.map_elements(row) * heads * max(64, row.get("D", 1)) / 64


TRITON = Subject(
    "triton",
    work=executed,
    most_work=150_000,
    most_matmul_work=30_000,
    fast=False,
    factors={
        "tokens": [(17, 17), (33, 70), (65, 65), (20, 257), (257, 20), (197, 197), (24, 330), (330, 24), (30, 700)],
        "D": [8, 17, 64, 72, 256],
        "frames": [(2, 1), (5, 2), (9, 1), (4, 0)],
        "logits": ["plain", "negative", "still", "large", "cut", "one-hot"],
        "groups": [(1,), (3,), (2, 2)],
    },
    matmul_factors={
        "tokens": [(17, 17), (33, 70), (70, 33), (130, 20)],
        "C": [1, 17, 64, 70],
        "D": [8, 64, 72],
        "frames": [(2, 1), (5, 2), (4, 0)],
        "logits": ["plain", "negative", "cut"],
        "groups": [(1,), (2, 2)],
        "dflow": ["contiguous", "expanded"],
        "needs": ["all", "q and x"],
    },
)
SLOW_ROWS = 10  # of each case table
KERNELS: dict[str, tuple[Case, set[str]]] = {  # cases that together run every kernel
    "strips": (
        small_case(tokens=(20, 66), D=16, dtype=BF16, temperature=1.0, frames=(3, 1)),
        {"strip", "bwd_strip_q", "bwd_strip_k"},
    ),
    "tiles": (
        small_case(tokens=(20, 40), D=24, dtype=FP32, temperature=1.0),
        {"rows", "weights", "fwd", "bwd_rows", "bwd_dq", "bwd_dk"},
    ),
    "mean maps": (
        small_case(tokens=(20, 40), D=16, dtype=BF16, head_reduction="mean_map", groups=(2,)),
        {"rows", "weights", "fwd", "bwd_rows", "bwd_rho", "bwd_dq", "bwd_dk"},
    ),
}
MATMUL_KERNELS = {"matmul_q", "matmul_k", "rows", "weights", "bwd_rows", "bwd_dq", "bwd_dk"}


def matmul_case(**options: Any) -> MatmulCase:
    row = {name: values[0] for name, values in conformance.FACTORS.items()}
    return MatmulCase(**{**row, "tokens": (17, 19), "D": 16, "C": 3, "operator": "P", **options})


def names(gpu: worker.Remote) -> set[str]:
    """The kernels that were executed."""
    return {launch.kernel.removeprefix("am_flow_").removesuffix("_kernel") for launch in gpu.launches}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KERNELS)
def test_flow_and_gradients_are_within_their_budgets(kind: str, architecture: int) -> None:
    case, kernels = KERNELS[kind]
    with worker.gpu(architecture) as gpu:
        conformance.check_flow(case, "triton")
        conformance.check_flow_gradients(case, "triton")
    assert names(gpu) == kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_gradients_are_within_their_budgets(architecture: int) -> None:
    case = matmul_case(dtype=FP16, temperature=1.0)
    with worker.gpu(architecture) as gpu:
        conformance.check_product(case, "triton")
        conformance.check_product_gradients(case, "triton")
    assert names(gpu) == MATMUL_KERNELS


def test_the_plain_run_has_every_kernel() -> None:
    from amflow_kernels.impl.triton.kernels import backward, forward, matmul, strip, strip_backward

    modules = (backward, forward, matmul, strip, strip_backward)
    every = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    cases = [*(kernels for _, kernels in KERNELS.values()), MATMUL_KERNELS]
    assert {f"am_flow_{name}_kernel" for name in set.union(*cases)} == every


# ---------------------------------------------------------------------------------------------------- case tables


def rows(cases: list[Any]) -> list[Any]:
    """The rows of a table, most of them marked exhaustive."""
    step = math.ceil(len(cases) / SLOW_ROWS)
    marks = [SLOW if n % step == 0 else pytest.mark.exhaustive for n in range(len(cases))]
    return [pytest.param(case, id=str(case), marks=mark) for case, mark in zip(cases, marks, strict=True)]


@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("case", rows(conformance.flow_cases(TRITON)))
def test_every_row_of_the_table_is_within_its_budgets(case: Case) -> None:
    conformance.check_flow(case, "triton")
    conformance.check_flow_gradients(case, "triton")


@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("case", rows(conformance.matmul_cases(TRITON)))
def test_every_row_of_the_operators_table_is_within_its_budgets(case: MatmulCase) -> None:
    conformance.check_product(case, "triton")
    conformance.check_product_gradients(case, "triton")


# Keys, or queries, on both sides of every switch: of strips, of their tiles and single keys, and to tiles.
FORWARD_SWITCHES = [15, 16, 17, 18, 33, 63, 64, 65, 66, 128, 129, 130, 192, 193, 224, 225, 255, 256, 257, 258, 262, 263]
FORWARD_SWITCHES += [320, 321, 512, 513, 577, 640, 641]
BACKWARD_SWITCHES = [18, 32, 33, 64, 65, 66, 128, 129, 192, 193, 256, 257, 320]


@pytest.mark.slow
@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("keys", FORWARD_SWITCHES)
def test_flows_are_right_on_both_sides_of_every_switch(keys: int) -> None:
    case = small_case(tokens=(18, keys), D=16, dtype=BF16, temperature=1.0)
    problem = replace(case.problem(), center=True)
    exact = conformance.centred_oracle(case)
    tt.assert_centred(tt.run(problem, "triton"), exact, 18, frame_step=case.frame_step)


@pytest.mark.slow
@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "tokens", [*zip(BACKWARD_SWITCHES, reversed(BACKWARD_SWITCHES), strict=True), (321, 18), (18, 321)], ids=str
)
def test_gradients_are_right_on_both_sides_of_every_switch(tokens: tuple[int, int], dtype: torch.dtype) -> None:
    """One kernel depends on the number of queries, the other on that of keys."""
    conformance.check_flow_gradients(small_case(tokens=tokens, D=16, dtype=dtype, temperature=1.0), "triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [  # for which sm_90 has other strips, tiles or matrix instructions
        *(((70, n), BF16) for n in (129, 197, 256, 262, 577, 700)),
        ((257, 70), BF16), ((70, 257), FP16), ((70, 700), FP16), ((130, 140), FP32),
    ],
    ids=str,
)  # fmt: skip
def test_flow_and_gradients_of_sm_90_are_within_their_budgets(tokens: tuple[int, int], dtype: torch.dtype) -> None:
    case = small_case(tokens=tokens, D=64, dtype=dtype, temperature=1.0)
    with worker.gpu(90):
        conformance.check_flow(case, "triton")
        conformance.check_flow_gradients(case, "triton")


# ---------------------------------------------------------------------------------------------------- exactness


def results(problem: Problem, architecture: int, **options: int) -> tuple[torch.Tensor, ...]:
    with worker.gpu(architecture, **options):
        return rules.flow_and_grads(problem, "triton")


@pytest.mark.parametrize(
    ("architecture", "tokens", "dtype", "head_reduction"),
    [
        (80, (20, 66), BF16, "none"),
        *(pytest.param(90, (40, n), BF16, "none", marks=SLOW) for n in (129, 257)),
        pytest.param(90, (40, 140), FP32, "mean_map", marks=SLOW),
        *(
            pytest.param(80, tokens, dtype, head_reduction, marks=SLOW)
            for tokens, dtype, head_reduction in (
                *((tokens, BF16, "none") for tokens in ((17, 17), (65, 65), (33, 257), (20, 400), (30, 700))),
                *((tokens, FP16, "none") for tokens in ((33, 257), (30, 700))),
                ((33, 70), FP32, "none"), ((20, 70), FP32, "mean_map"), ((20, 70), BF16, "mean_map"),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_and_what_hardware_leaves_open_change_no_exactness(
    architecture: int, tokens: tuple[int, int], dtype: torch.dtype, head_reduction: str
) -> None:
    """Equal frames give exactly Nq / Nk and no gradient, and chunks of pairs change no bit, whatever is fused."""
    q, k = tt.make_qk(1, 5, (2,), *tokens, 16, dtype=dtype)
    q[:, 2], k[:, 2] = q[:, 1], k[:, 1]
    q[:, 4], k[:, 4] = q[:, 3], k[:, 3]
    problem = Problem(q, k, head_reduction=head_reduction)
    still = torch.full_like(rules.flow_and_grads(problem, "reference")[0][:, 1], tokens[0] / tokens[1])
    for seed in range(3):
        flow, *grads = results(problem, architecture, seed=seed, processors=1)
        assert torch.equal(flow[:, 1], still)
        assert torch.equal(flow[:, 3], still)
        for x, y in zip((flow, *grads), results(problem, architecture, seed=seed, processors=10**6), strict=True):
            assert torch.equal(x, y)
        pair = Problem(q[:, [1, 3]], k[:, [1, 3]], q_b=q[:, [2, 4]], k_b=k[:, [2, 4]], head_reduction=head_reduction)
        with worker.gpu(architecture, seed=seed):
            assert torch.count_nonzero(tt.run(replace(pair, center=True), "triton")) == 0
            inputs = [x.detach().requires_grad_() for x in tt.inputs_of(pair)]
            paired = tt.run(tt.with_inputs(pair, inputs), "triton")
            for grad in torch.autograd.grad(paired, inputs, tt.make_dflow(paired.shape)):
                assert torch.count_nonzero(grad) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_frames_in_other_memory_are_exact(dtype: torch.dtype) -> None:
    for layout in ("offset", "tokens_first"):
        rules.test_equal_frames_in_other_memory_are_exact(layout, dtype, "triton")


@pytest.mark.slow
@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize("operator", conformance.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_frames_have_no_motion(dtype: torch.dtype, operator: str) -> None:
    matmul_rules.test_equal_frames_give_exactly_zero_and_no_gradient((17, 17), dtype, operator, "triton")


# ---------------------------------------------------------------------------------------------------- other rules


@pytest.mark.usefixtures("sm_80")
@pytest.mark.parametrize(
    "dtype",
    [*(pytest.param(dtype, marks=SLOW) for dtype in (BF16, FP32)), pytest.param(FP16, marks=pytest.mark.exhaustive)],
    ids=str,
)
class TestRules:
    """Rules of the flow, each at one size."""

    def test_gradients_hold_at_the_lowest_temperature(self, dtype: torch.dtype) -> None:
        for seed in (1, 2):
            rules.test_gradients_hold_at_the_lowest_temperature(seed, dtype, "triton")

    def test_frames_in_no_pair_have_a_gradient_of_zero(self, dtype: torch.dtype) -> None:
        rules.test_frames_in_no_pair_have_a_gradient_of_zero(dtype, "triton")

    def test_scale_of_zero_gives_even_maps_and_no_gradient(self, dtype: torch.dtype) -> None:
        rules.test_scale_of_zero_gives_even_maps_and_no_gradient(dtype, "triton")

    @pytest.mark.parametrize("head_reduction", ["none", "mean_map"])
    def test_a_bad_map_row_makes_nan_of_exactly_its_flows(self, head_reduction: str, dtype: torch.dtype) -> None:
        for kind in conformance.BAD_ROWS:
            rules.test_a_bad_map_row_makes_nan_of_exactly_its_flows((5, 70), dtype, kind, head_reduction, "triton")

    def test_a_bad_map_row_makes_nan_of_the_gradients_that_it_moves(self, dtype: torch.dtype) -> None:
        for kind in conformance.BAD_ROWS:
            rules.test_a_bad_map_row_makes_nan_of_the_gradients_that_it_moves(kind, dtype, "triton")

    def test_a_logit_of_minus_infinity_weighs_nothing(self, dtype: torch.dtype) -> None:
        for scale in (0.3, -0.3):
            rules.test_a_logit_of_minus_infinity_weighs_nothing(dtype, scale, "triton")


@pytest.mark.slow
@pytest.mark.usefixtures("sm_80")
def test_given_log_sum_exps_spare_a_pass(sm_80: worker.Remote) -> None:
    q, k = tt.make_qk(1, 3, (2,), 33, 70, 24)
    lse = torch.logsumexp(24**-0.5 * (q @ k.mT), -1)
    flow = am_flow(q, k, lse=lse, impl="triton")
    tt.assert_flow(flow, tt.oracle_flow(Problem(q, k, center=True)), 33)
    assert names(sm_80) == {"weights", "fwd"}
