"""The rules that every implementation of the flow keeps, each once."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amflow_kernels import am_flow, am_flow_pair
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem
from tests.kernels import conformance
from tests.kernels.conformance import BF16, FACTORS, FP16, FP32, Case, Subject, small_case

REDUCTIONS = ("none", "mean", "mean_map")
DTYPES = (FP32, BF16, FP16)


# ---------------------------------------------------------------------------------------------------- values


def test_forward_is_within_its_budget(subject: Subject, flow_case: Case) -> None:
    conformance.check_flow(flow_case, subject.name)


def test_gradients_are_within_their_budget(subject: Subject, flow_case: Case) -> None:
    conformance.check_flow_gradients(flow_case, subject.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_hold_at_the_lowest_temperature(seed: int, dtype: torch.dtype, impl: str) -> None:
    """Weights of 1e-28 meet exponentials of 1e27: their product with the rest must not underflow, however small dflow.

    A dflow that is 2^-40 times as large gives exactly such a gradient, but for numbers below the normal ones: a tensor
    core may take them for 0, also as the second part of a number that is split in two.
    """
    case = small_case(logits="cut", temperature=1 / 64, dtype=dtype, seed=seed)
    conformance.check_flow_gradients(case, impl)
    if dtype == FP32:
        problem = case.problem()
        dflow = case.incoming(problem.flow_shape)
        large, small = (conformance.gradients(problem, [True] * 2, dflow * unit, impl) for unit in (1, 2.0**-40))
        for one, other in zip(large, small, strict=True):
            torch.testing.assert_close(other * 2.0**40, one, rtol=1e-5, atol=2.0**40 * torch.finfo(FP32).tiny)
            assert one.abs().median() > 2.0**70 * torch.finfo(FP32).tiny


def test_the_highest_temperature_gives_no_flow_and_no_nan(impl: str) -> None:
    """At 1e300 the change is divided away."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 2, (1,), 17, 33, 16))
    flow = am_flow(q, k, temperature=1e300, center=True, impl=impl)
    assert flow.abs().max() < 1e-30
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert grad.abs().max() < 1e-25


@pytest.mark.parametrize("temperature", FACTORS["temperature"])
@pytest.mark.parametrize("logits", FACTORS["logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.subjects("reference", "cpu")  # the tables of the others, which are slower, have these pairs
def test_budgets_hold_for_every_kind_of_map_at_every_temperature(
    logits: str, temperature: float, dtype: torch.dtype, impl: str
) -> None:
    case = small_case(tokens=(40, 70), D=64, logits=logits, temperature=temperature, dtype=dtype)
    conformance.check_flow(case, impl)
    conformance.check_flow_gradients(case, impl)


@pytest.mark.parametrize(
    "tokens", [(65, 70), (577, 577), pytest.param((4096, 130), marks=pytest.mark.slow), (100, 1370)], ids=str
)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_equal_rows_do_not_add_up_their_rounding_errors(
    tokens: tuple[int, int], temperature: float, dtype: torch.dtype, impl: str
) -> None:
    """One-hot keys make logits exact, so that nothing but the maps and sums is rounded, in every row alike."""
    Nq, Nk = tokens
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        row, change = (torch.randn(shape, generator=generator) for shape in ((1, 1, 1, 1, 128), (1, 2, 1, 1, 128)))
        q = (row + change).repeat(1, 1, 1, Nq, 1).to(dtype)
        k = (40 * torch.eye(Nk, 128, dtype=dtype)).repeat(1, 2, 1, 1, 1)
        problem = Problem(q, k, temperature=temperature)
        exact = tt.oracle_flow(replace(problem, center=True))
        tt.assert_flow(tt.run(problem, impl), exact, Nq, temperature=temperature)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("head_reduction", ["none", "mean_map"])
def test_what_all_keys_have_in_common_cancels_in_the_gradient(
    head_reduction: str, dtype: torch.dtype, impl: str
) -> None:
    """In DINOv2's first block it is several times as large as what tells the keys apart. Gradients of logits rounded to
    16 bits no longer sum to 0 over the keys, so it would not cancel in dq.
    """
    q, k = tt.make_qk(1, 2, (1,), 40, 70, 16)
    k = k + 7 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    problem = Problem(q.to(dtype), k.to(dtype), head_reduction=head_reduction)
    dflow = tt.make_dflow(problem.flow_shape)
    grads = conformance.gradients(problem, [True, True], dflow, impl)
    exact, tie = tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow)
    tt.assert_grads(grads, exact, tie, tt.grad_magnitude(problem, dflow))


@pytest.mark.slow
@pytest.mark.subjects("cpu")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_budgets_hold_up_to_4096_tokens(dtype: torch.dtype, impl: str) -> None:
    row = {name: values[0] for name, values in FACTORS.items()}
    row |= {"tokens": (4096, 4096), "D": 64, "dtype": dtype, "layout": "fused_qkv", "temperature": 1.0}
    conformance.check_flow(Case(**row), impl)


@pytest.mark.parametrize("subject_name", [s.name for s in conformance.SUBJECTS.values() if s.all_rows is None])
def test_every_two_values_of_any_two_factors_meet_in_a_case(subject_name: str) -> None:
    subject = conformance.SUBJECTS[subject_name]
    factors = {**FACTORS, **subject.factors, "dtype": list(subject.dtypes)}
    rows = [vars(case) for case in conformance.flow_cases(subject)]
    names = list(factors)
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            seen = {(row[a], row[b]) for row in rows}
            for x in factors[a]:
                for y in factors[b]:
                    allowed = subject.takes_row({a: x, b: y}, subject.most_work)
                    assert (x, y) in seen or not allowed, f"{a}={x} never meets {b}={y}"


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "fused_qkv", "shared_keys"])
@pytest.mark.parametrize("tokens", [(17, 17), (197, 197)], ids=str)
def test_equal_frames_give_exactly_one_and_no_gradient(
    tokens: tuple[int, int], layout: str, dtype: torch.dtype, head_reduction: str, impl: str
) -> None:
    """The same frame gives the same map bits: flow exactly Nq / Nk, centred exactly 0, gradient exactly 0."""
    q, k = tt.make_qk(1, 4, (2,), *tokens, 40, dtype=dtype, layout=layout, frame_step=0)
    flow, dq, dk = flow_and_grads(Problem(q, k, lag=2, head_reduction=head_reduction), impl)
    assert torch.equal(flow, torch.ones_like(flow))
    centred = am_flow(q, k, lag=2, head_reduction=head_reduction, center=True, impl=impl)
    for x in (centred, dq, dk):
        assert torch.count_nonzero(x) == 0


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_frames_are_exact_for_other_numbers_of_queries(
    dtype: torch.dtype, head_reduction: str, impl: str
) -> None:
    q, k = (x[:, :1].expand(-1, 3, -1, -1, -1) for x in tt.make_qk(1, 1, (2,), 33, 70, 24, dtype=dtype))
    flow, dq, dk = flow_and_grads(Problem(q.contiguous(), k.contiguous(), head_reduction=head_reduction), impl)
    assert torch.equal(flow, torch.full_like(flow, 33 / 70))
    assert torch.count_nonzero(dq) == torch.count_nonzero(dk) == 0


@pytest.mark.subjects(
    "cpu", "neon", "neon_bf16", "triton", "cuda"
)  # the reference hands strides to BLAS, which promises no such thing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["offset", "tokens_first"])
def test_equal_frames_in_other_memory_are_exact(layout: str, dtype: torch.dtype, impl: str) -> None:
    """Equal values at other addresses, with other strides and alignment, still give exactly Nq / Nk in pair form."""
    q, k = tt.make_qk(1, 2, (2,), 66, 71, 33, dtype=dtype)
    q_b, k_b = tt.make_qk(1, 2, (2,), 66, 71, 33, dtype=dtype, layout=layout)
    assert torch.equal(q, q_b)
    assert torch.count_nonzero(am_flow_pair(q, k, q_b, k_b, center=True, impl=impl)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_of_zero_gives_even_maps_and_no_gradient(dtype: torch.dtype, impl: str) -> None:
    q, k = tt.make_qk(1, 3, (1,), 20, 49, 16, dtype=dtype)
    flow, dq, dk = flow_and_grads(Problem(q, k, scale=0.0, center=True), impl)
    for x in (flow, dq, dk):
        assert torch.count_nonzero(x) == 0


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
def test_gradient_of_the_sum_is_zero(head_reduction: str, impl: str) -> None:
    """For flow.sum(), a dflow of stride 0 everywhere, up to rounding: the sum is always Nq."""
    q, k = (x.requires_grad_() for x in tt.make_qk(2, 3, (2,), 33, 70, 24))
    problem = Problem(q, k, head_reduction=head_reduction)
    with tt.poison_allocations():
        grads = torch.autograd.grad(tt.run(problem, impl).sum(), (q, k))
    magnitude = tt.grad_magnitude(problem, torch.ones(problem.flow_shape))
    zeros = [torch.zeros_like(m) for m in magnitude]
    tt.assert_grads(grads, zeros, zeros, magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frames_in_no_pair_have_a_gradient_of_zero(dtype: torch.dtype, impl: str) -> None:
    """With lag 3 of five frames the third is in no pair: its gradient is 0, whatever was in memory."""
    q, k = tt.make_qk(1, 5, (2,), 17, 40, 16, dtype=dtype)
    with tt.poison_allocations():
        _, *grads = flow_and_grads(Problem(q, k, lag=3), impl)
    for grad in grads:
        assert torch.count_nonzero(grad[:, 2]) == 0
        assert grad[:, [0, 1, 3, 4]].ne(0).any(-1).all()


# ---------------------------------------------------------------------------------------------------- NaN, infinities


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", conformance.BAD_ROWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [(5, 70), (70, 150)], ids=str)
def test_a_bad_map_row_makes_nan_of_exactly_its_flows(
    tokens: tuple[int, int], dtype: torch.dtype, kind: str, head_reduction: str, impl: str
) -> None:
    b, t, h, lag = 1, 2, 1, 2
    q, k = tt.make_qk(2, 5, (2,), *tokens, 8, dtype=dtype)
    options: dict[str, Any] = {"lag": lag, "head_reduction": head_reduction, "impl": impl}
    clean = am_flow(q, k, **options)
    conformance.make_bad_row(kind, q[b, t, h], k[b, t, h])
    expected = clean.clone()
    for pair in (t - lag, t):
        (expected[b, pair, h] if head_reduction == "none" else expected[b, pair]).fill_(math.nan)
    flow = am_flow(q, k, **options)
    torch.testing.assert_close(flow, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(am_flow(q, k, center=True, **options).isnan(), expected.isnan())


@pytest.mark.parametrize("frame", ["a", "b"])
@pytest.mark.parametrize("kind", conformance.BAD_ROWS)
def test_a_bad_map_row_makes_nan_of_its_pair(kind: str, frame: str, impl: str) -> None:
    q, k = tt.make_qk(1, 4, (2,), 20, 70, 8)
    frames = [x.clone() for x in (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])]
    expected = am_flow_pair(*frames, impl=impl)
    expected[0, 1, 1] = math.nan
    q_bad, k_bad = frames[:2] if frame == "a" else frames[2:]
    conformance.make_bad_row(kind, q_bad[0, 1, 1], k_bad[0, 1, 1])
    torch.testing.assert_close(am_flow_pair(*frames, impl=impl), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_of_minus_infinity_weighs_nothing(dtype: torch.dtype, scale: float, impl: str) -> None:
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 8, dtype=dtype)
    q[0, 1, 0, :, 0] = -q[0, 1, 0, :, 0].abs() - 0.1
    k[0, 1, 0, [0, 2, 69], 0] = math.copysign(math.inf, scale)
    exact = tt.oracle_flow(Problem(q, k, scale=scale, center=True))
    tt.assert_flow(am_flow(q, k, scale=scale, impl=impl), exact, 33)
    tt.assert_centred(am_flow(q, k, scale=scale, center=True, impl=impl), exact, 33, frame_step=0.2)


# ---------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("kind", conformance.BAD_ROWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_bad_map_row_makes_nan_of_the_gradients_that_it_moves(kind: str, dtype: torch.dtype, impl: str) -> None:
    """Those of its query, and of all keys, in its own frame and in those that it is paired with; of no others."""
    q, k = tt.make_qk(1, 5, (2,), 20, 33, 8, dtype=dtype)
    clean = flow_and_grads(Problem(q, k), impl)[1:]
    conformance.make_bad_row(kind, q[0, 2, 1], k[0, 2, 1])
    conformance.check_bad_gradients(kind, flow_and_grads(Problem(q, k), impl)[1:], clean)


def flow_and_grads(problem: Problem, impl: str) -> tuple[Tensor, ...]:
    """The flow, dq and dk for a fixed dflow that is the same for every batch item, pair and group."""
    inputs = [x.detach().requires_grad_() for x in tt.inputs_of(problem)]
    flow = tt.run(tt.with_inputs(problem, inputs), impl)
    dflow = tt.make_dflow((problem.Nk,)).expand(flow.shape)
    return flow.detach(), *torch.autograd.grad(flow, inputs, dflow)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(("flow", "dq", "dk")[: len(got)], got, expected, strict=True):
        assert torch.equal(x, y), f"{name}: {torch.count_nonzero(x != y)} of {x.numel()} elements differ"


@pytest.mark.subjects("reference", "cpu")  # the other two machines run one call at a time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concurrent_calls_have_the_bits_of_single_ones(dtype: torch.dtype, impl: str) -> None:
    problems = []
    for i in range(4):
        q, k = tt.make_qk(1, 3, (2,), 64 + 33 * i, 70, 32, dtype=dtype, seed=i)
        problems.append(Problem(q, k, head_reduction=REDUCTIONS[i % 3]))
    expected = [flow_and_grads(problem, impl) for problem in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(len(problems))

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(4):
                assert_same_bits(flow_and_grads(problems[i], impl), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_autocast_changes_no_bit(dtype: torch.dtype, impl: str) -> None:
    """It casts neither inputs nor results, forward or backward."""
    q, k = tt.make_qk(1, 3, (2,), 30, 50, 16, dtype=dtype)
    expected = flow_and_grads(Problem(q, k), impl)
    for autocast in (BF16, FP16):
        with torch.autocast("cpu", dtype=autocast):
            got = flow_and_grads(Problem(q, k), impl)
        assert got[0].dtype == FP32
        assert_same_bits(got, expected)


@pytest.mark.subjects("reference", "cpu", "cuda")  # Triton's tiled kernels take it
def test_an_unneeded_log_sum_exp_changes_no_bit(impl: str) -> None:
    """Implementations that compute their own row sums ignore the one given."""
    q, k = tt.make_qk(1, 3, (2,), 5, 7, 4)
    wrong = torch.zeros(1, 3, 2, 5)
    assert torch.equal(am_flow(q, k, lse=wrong, impl=impl), am_flow(q, k, impl=impl))


# ---------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("head_reduction", ["none", "mean_map"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 5, 4), (2, 0, 2, 5, 4), (0, 0, 2, 5, 4)], ids=str)
def test_no_clips_or_no_pairs_give_an_empty_flow(shape: tuple[int, ...], head_reduction: str, impl: str) -> None:
    B, P, H, N, _ = shape
    tail = (H, N) if head_reduction == "none" else (N,)
    q = torch.zeros(shape, requires_grad=True)
    flows = [(am_flow_pair(q, q, q, q, head_reduction=head_reduction, impl=impl), (B, P, *tail))]
    if P:
        flows.append((am_flow(q, q, head_reduction=head_reduction, impl=impl), (B, P - 1, *tail)))
    for flow, expected in flows:
        assert flow.shape == expected
        assert flow.dtype == torch.float32
        (grad,) = torch.autograd.grad(flow.sum(), q)
        assert grad.shape == shape


def test_nothing_is_saved_without_grad_and_no_map_with_it(impl: str) -> None:
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    am_flow(q, k, impl=impl)
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert am_flow(q, k, impl=impl).grad_fn is None
        assert am_flow_pair(q, k, q, k, impl=impl).grad_fn is None
        with torch.no_grad():
            assert not am_flow(q.clone().requires_grad_(), k, impl=impl).requires_grad
        with torch.inference_mode():
            assert not am_flow(q.clone().requires_grad_(), k, impl=impl).requires_grad
        assert not saved
        assert am_flow(q, k.clone().requires_grad_(), impl=impl).requires_grad
    elements = sum(s.numel() for s in saved)
    assert elements <= q.numel() + k.numel() + 3 * 3 * 2 * 7  # the inputs and up to three numbers for each query


@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(
    needed: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    q, k = tt.make_qk(1, 4, (1,), 17, 40, 16, dtype=dtype)
    frames = [q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2]]
    grads: list[list[Tensor | None]] = []
    for wanted in ((1, 1, 1, 1), needed):
        inputs = [x.detach().clone().requires_grad_(bool(n)) for x, n in zip(frames, wanted, strict=True)]
        flow = am_flow_pair(*inputs, impl=impl)
        flow.backward(tt.make_dflow(flow.shape))
        grads.append([x.grad for x in inputs])
    for every, some, n in zip(*grads, needed, strict=True):
        assert (some is not None) == bool(n)
        assert some is None or torch.equal(some, every)


def test_second_order_gradients_raise(impl: str) -> None:
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 7, 9, 8))
    (dq,) = torch.autograd.grad(am_flow(q, k, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="AM flow has first-order gradients only; a second-order gradient"):
        torch.autograd.grad(dq.sum(), k)


def loss(q: Tensor, k: Tensor, impl: str) -> Tensor:
    """What a model makes of a flow: something before it, something after it, one number."""
    flow = am_flow(q * 1.5, k + 0.1, center=True, impl=impl)
    paired = am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], impl=impl)
    return (flow * 3).square().sum() + paired.square().mean()


def loss_and_grads(function: Any, q: Tensor, k: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    result = function(q, k)
    result.backward()  # not autograd.grad, which reentrant checkpointing refuses
    return [result.detach(), q.grad, k.grad]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool, impl: str) -> None:
    q, k = tt.make_qk(1, 3, (2,), 17, 19, 8)
    got = loss_and_grads(lambda q, k: checkpoint(loss, q, k, impl, use_reentrant=use_reentrant), q, k)
    for x, y in zip(got, loss_and_grads(lambda q, k: loss(q, k, impl), q, k), strict=True):
        assert torch.equal(x, y)


def test_a_second_backward_needs_retain_graph(impl: str) -> None:
    """With it the second backward adds the same gradient again; without it the inputs are let go."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    result = am_flow(q, k, impl=impl).square().sum()
    result.backward(retain_graph=True)
    once = q.grad.clone()
    result.backward()
    assert torch.equal(q.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_inputs_changed_before_the_backward_raise(impl: str) -> None:
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    result = am_flow(q, k, impl=impl).square().sum()
    with torch.no_grad():
        q += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_inputs_are_freed_without_the_garbage_collector(impl: str) -> None:
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    gc.collect()
    gc.disable()
    try:
        freed: list[bool] = []
        product = q * 1.0
        weakref.finalize(product, freed.append, True)
        flow = am_flow(product, k, impl=impl)
        flow.sum().backward()
        del product, flow
        assert freed
    finally:
        gc.enable()
