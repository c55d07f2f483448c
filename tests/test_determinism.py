"""The same input gives the same bits: for any number of threads, in any batch, from any thread, time after time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_pair
from amflow_kernels import testing as tt

pytestmark = pytest.mark.capability

MustRun = Callable[[str, Callable[[], object]], bool]
REDUCTIONS = ("none", "mean", "mean_map")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flow_and_grads(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The flow, dq and dk of a fixed dflow that is the same for every batch item, pair and group."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flow = am_flow(q, k, **options)
    dflow = tt.make_dflow((k.shape[-2],)).expand(flow.shape)
    return flow.detach(), *torch.autograd.grad(flow, (q, k), dflow)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(("flow", "dq", "dk")[: len(got)], got, expected, strict=True):
        assert torch.equal(x, y), f"{name}: {torch.count_nonzero(x != y)} of {x.numel()} elements differ"


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, (1,), 197, 197, 24), (2, 3, (3, 2), 65, 70, 24), (1, 2, (3,), 577, 130, 8)])
def test_any_number_of_threads(
    shape: tuple[Any, ...], dtype: torch.dtype, head_reduction: str, must_run: MustRun
) -> None:
    """The CPU kernels give the same bits on 1, 2, 3 and 5 threads, few work items or many."""
    q, k = tt.make_qk(*shape, dtype=dtype)
    if not must_run("cpu", lambda: am_flow(q, k, impl="cpu")):
        return
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(flow_and_grads(q, k, head_reduction=head_reduction, impl="cpu"))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", tt.LAYOUTS)
@pytest.mark.parametrize("tokens", [17, 197])
def test_identical_frames(
    tokens: int, layout: str, dtype: torch.dtype, head_reduction: str, impl: str, must_run: MustRun
) -> None:
    """The same frame gives the same map bits: flow exactly Nq / Nk, centred exactly 0, gradient exactly 0."""
    q, k = tt.make_qk(1, 4, (2,), tokens, tokens, 40, dtype=dtype, layout=layout, frame_step=0)
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    flow, dq, dk = flow_and_grads(q, k, lag=2, head_reduction=head_reduction, impl=impl)
    assert torch.equal(flow, torch.ones_like(flow))
    centred = am_flow(q, k, lag=2, head_reduction=head_reduction, center=True, impl=impl)
    for x in (centred, dq, dk):
        assert torch.count_nonzero(x) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_frames_at_other_addresses(dtype: torch.dtype, impl: str, must_run: MustRun) -> None:
    """Equal values in other memory, with other strides and alignment, still give exactly Nq / Nk in pair form."""
    q, k = tt.make_qk(1, 2, (2,), 66, 71, 33, dtype=dtype)
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    for layout in ("offset", "tokens_first"):
        q_b, k_b = tt.make_qk(1, 2, (2,), 66, 71, 33, dtype=dtype, layout=layout)
        assert torch.equal(q, q_b)
        if impl == "cpu":  # the reference hands strides to BLAS, which promises no such thing
            centred = am_flow_pair(q, k, q_b, k_b, center=True, impl=impl)
            assert torch.count_nonzero(centred) == 0


def assert_nearly_same(dk: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of sums in another order: a bit of some elements, few of them large."""
    error = (dk.double() - expected.double()).norm() / expected.double().norm()
    assert error <= 2 * torch.finfo(dk.dtype).eps, f"dk differs by {error:.2g}"


@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_does_not_matter(dtype: torch.dtype, head_reduction: str, must_run: MustRun) -> None:
    """A clip gives the same flow and dq to the bit alone, among others, in a longer clip, and head by head.

    How many partial sums make up dk depends on how much other work there is, so its last bits do too.
    """
    q, k = tt.make_qk(3, 7, (4,), 70, 197, 40, dtype=dtype)
    if not must_run("cpu", lambda: am_flow(q, k, impl="cpu")):
        return
    options = {"head_reduction": head_reduction, "impl": "cpu"}
    whole = flow_and_grads(q, k, **options)
    for b in range(3):
        alone = flow_and_grads(q[b : b + 1], k[b : b + 1], **options)
        assert_same_bits(alone[:2], tuple(x[b : b + 1] for x in whole[:2]))
        assert_nearly_same(alone[2], whole[2][b : b + 1])
    flow = whole[0]
    assert torch.equal(am_flow(q[:, 2:5], k[:, 2:5], **options), flow[:, 2:4])
    assert torch.equal(am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], **options), flow)
    if head_reduction == "none":
        for h in range(4):
            one = flow_and_grads(q[:, :, h : h + 1], k[:, :, h : h + 1], **options)
            assert_same_bits(one[:2], tuple(x[:, :, h : h + 1] for x in whole[:2]))
            assert_nearly_same(one[2], whole[2][:, :, h : h + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concurrent_calls(dtype: torch.dtype, impl: str, must_run: MustRun) -> None:
    """Calls from several Python threads at once, of different shapes, give the bits of calls one after another."""
    problems = [
        (*tt.make_qk(1, 3, (2,), 64 + 33 * i, 70, 32, dtype=dtype, seed=i), REDUCTIONS[i % 3]) for i in range(4)
    ]
    if not must_run(impl, lambda: am_flow(*problems[0][:2], impl=impl)):
        return
    expected = [flow_and_grads(q, k, head_reduction=r, impl=impl) for q, k, r in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(len(problems))

    def work(i: int) -> None:
        q, k, head_reduction = problems[i]
        try:
            start.wait()
            for _ in range(8):
                assert_same_bits(flow_and_grads(q, k, head_reduction=head_reduction, impl=impl), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
