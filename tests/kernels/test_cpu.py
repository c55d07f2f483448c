"""The native CPU kernels: bits that depend on nothing but the input, scratch memory, and CPUs that lack AVX2."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import _build, am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair
from amflow_kernels import testing as tt
from amflow_kernels.problem import MatmulProblem, Problem
from tests.kernels.conformance import BF16, FP16, FP32, OPERATORS, ROOT

REDUCTIONS = ("none", "mean", "mean_map")
needs_avx2 = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture
def cpu_kernels(cpu_kernels_run: bool) -> None:
    """The kernels run on this CPU."""
    if not cpu_kernels_run:
        pytest.skip("below AVX2 impl='cpu' raises, which another test asserts")


def result_and_grads(problem: Problem | MatmulProblem, impl: str) -> list[Tensor]:
    """The result and all gradients, for a fixed incoming one that is the same for every batch item, pair and group."""
    inputs = [x.detach().requires_grad_() for x in tt.inputs_of(problem)]
    result = tt.run(tt.with_inputs(problem, inputs), impl)
    last = 1 if isinstance(problem, Problem) else 2
    incoming = tt.make_dflow(result.shape[-last:]).expand(result.shape)
    return [result.detach(), *torch.autograd.grad(result, inputs, incoming)]


def assert_bits_on_any_number_of_threads(problem: Problem | MatmulProblem, impl: str) -> None:
    """With few threads, and with so many that the kernels cut the frames of a clip into parts."""
    results = []
    for threads in (1, 2, 3, 5, 24):
        torch.set_num_threads(threads)
        results.append(result_and_grads(problem, impl))
    for result in results[1:]:
        for n, (got, expected) in enumerate(zip(result, results[0], strict=True)):
            assert torch.equal(got, expected), f"result {n}: {torch.count_nonzero(got != expected)} elements differ"


@pytest.mark.subjects("cpu", "neon", "neon_bf16")
@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("shape", "lag"),
    [
        ((1, 5, (1,), 197, 197, 24), 1),
        ((2, 3, (3, 2), 65, 70, 24), 1),
        ((1, 2, (3,), 577, 130, 8), 1),
        ((1, 9, (1,), 33, 40, 16), 4),  # chains of two and of three frames
        ((1, 5, (2,), 33, 40, 16), 3),  # and of one frame
    ],
)
def test_the_number_of_threads_changes_no_bit_of_a_flow(
    shape: tuple[Any, ...], lag: int, dtype: torch.dtype, head_reduction: str, impl: str
) -> None:
    """Few work items or many, forward and backward."""
    q, k = tt.make_qk(*shape, dtype=dtype)
    assert_bits_on_any_number_of_threads(Problem(q, k, lag=lag, head_reduction=head_reduction), impl)


@pytest.mark.subjects("cpu", "neon", "neon_bf16")
def test_the_number_of_threads_changes_no_bit_of_explicit_pairs(impl: str) -> None:
    q, k = tt.make_qk(1, 3, (2,), 70, 40, 24)
    pairs = {"q_b": q.flip(1) + 0.1, "k_b": k.flip(1)}
    assert_bits_on_any_number_of_threads(Problem(q, k, **pairs), impl)
    x = tt.make_features(q, k, 16, lag=0)
    assert_bits_on_any_number_of_threads(MatmulProblem(q, k, x=x, **pairs), impl)


@pytest.mark.subjects("cpu", "neon", "neon_bf16")
@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "C", "lag"),
    [((1, 5, (1,), 197, 130, 24), 16, 1), ((2, 3, (3, 2), 65, 70, 24), 7, 1), ((1, 9, (1,), 33, 40, 16), 2, 4)],
)
def test_the_number_of_threads_changes_no_bit_of_a_product(
    shape: tuple[Any, ...], C: int, lag: int, dtype: torch.dtype, operator: str, impl: str
) -> None:
    q, k = tt.make_qk(*shape, dtype=dtype)
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(q, k, C, lag=lag, transpose=transpose, dtype=dtype)
    temperature = 0.7 if softmax else 1.0
    problem = MatmulProblem(q, k, x=x, lag=lag, transpose=transpose, softmax=softmax, temperature=temperature)
    assert_bits_on_any_number_of_threads(problem, impl)


def assert_nearly_same(dk: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of sums in another order: a bit of some elements, few of them large."""
    error = (dk.double() - expected.double()).norm() / expected.double().norm()
    assert error <= 2 * torch.finfo(dk.dtype).eps, f"dk differs by {error:.2g}"


@pytest.mark.subjects("cpu", "neon", "neon_bf16")
@pytest.mark.parametrize("head_reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_the_rest_of_the_batch_changes_no_bit_of_a_clip(dtype: torch.dtype, head_reduction: str, impl: str) -> None:
    """A clip gives the same flow and dq by itself, among others, in a longer clip, and head by head.

    How many partial sums make up dk depends on how much other work there is, so its last bits do too.
    """
    q, k = tt.make_qk(3, 7, (4,), 70, 197, 40, dtype=dtype)
    options = {"head_reduction": head_reduction}
    flow, dq, dk = result_and_grads(Problem(q, k, **options), impl)
    for b in range(3):
        one_flow, one_dq, one_dk = result_and_grads(Problem(q[b : b + 1], k[b : b + 1], **options), impl)
        assert torch.equal(one_flow, flow[b : b + 1])
        assert torch.equal(one_dq, dq[b : b + 1])
        assert_nearly_same(one_dk, dk[b : b + 1])
    assert torch.equal(am_flow(q[:, 2:5], k[:, 2:5], impl=impl, **options), flow[:, 2:4])
    assert torch.equal(am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], impl=impl, **options), flow)
    if head_reduction == "none":
        for h in range(4):
            one_flow, one_dq, one_dk = result_and_grads(Problem(q[:, :, h : h + 1], k[:, :, h : h + 1]), impl)
            assert torch.equal(one_flow, flow[:, :, h : h + 1])
            assert torch.equal(one_dq, dq[:, :, h : h + 1])
            assert_nearly_same(one_dk, dk[:, :, h : h + 1])


@pytest.mark.subjects("cpu", "neon", "neon_bf16")
@pytest.mark.parametrize("C", [2, 24])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_rest_of_the_batch_changes_no_bit_of_a_product(operator: str, C: int, impl: str) -> None:
    """By itself, among others, in a longer clip and in pair form."""
    q, k = tt.make_qk(3, 7, (4,), 70, 197, 40)
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(q, k, C, lag=1, transpose=transpose)
    options: dict[str, Any] = {"transpose": transpose, "softmax": softmax, "impl": impl}
    y = am_flow_matmul(q, k, x, **options)
    assert torch.equal(am_flow_matmul(q[1:2], k[1:2], x[1:2], **options), y[1:2])
    assert torch.equal(am_flow_matmul(q[:, 2:5], k[:, 2:5], x[:, 2:4], **options), y[:, 2:4])
    assert torch.equal(am_flow_matmul_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], x, **options), y)


@needs_avx2
@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flows", "products"])
def test_scratch_is_written_before_it_is_read(kind: str, cold_python: Callable[..., Any]) -> None:
    """Random problems are right if all memory that malloc hands out holds 3.4e38: no unwritten scratch is read."""
    code = f"""
import ctypes, sys
import pytest
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if ctypes.string_at(libc.malloc(1 << 20), 1 << 20) != b"\\x7f" * (1 << 20):
    print("no poison")
    sys.exit()
file = {str(ROOT / "tests" / "kernels" / "test_random_problems.py")!r}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "slow", "-k", "{kind} and (cpu-0 or cpu-1)", file]))
"""
    result = cold_python(code, env={"GLIBC_TUNABLES": "glibc.malloc.perturb=128"})
    if "no poison" in result.stdout:
        pytest.skip("this C library can't fill what malloc hands out (GLIBC_TUNABLES)")
    assert re.search(r"\b[1-9][0-9]* passed", result.stdout)


@pytest.mark.fallback
@pytest.mark.skipif(_build.MACHINE == "aarch64", reason="every 64-bit ARM CPU has NEON")
def test_below_avx2_impl_cpu_raises_and_chunked_runs_with_one_warning(cold_python: Callable[..., Any]) -> None:
    """Below AVX2 impl='cpu' raises the reason, and impl=None runs 'chunked' with one warning that names it."""
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
assert torch.equal(flows[0], am_flow(q, k, impl="chunked"))
assert "the CPU capability is DEFAULT" in str(explain(q, k)) and explain(q, k).impl == "chunked"
try:
    am_flow(q, k, impl="cpu")
except RuntimeError as error:
    assert "impl='cpu' can't run: the CPU capability is DEFAULT" in str(error), error
else:
    raise AssertionError("impl='cpu' ran")
"""
    cold_python(code, env={"ATEN_CPU_CAPABILITY": "default"})


@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize(
    ("tokens", "D"), [((32, 32), 32), ((33, 97), 64), ((97, 33), 80), ((70, 193), 40), ((31, 97), 64)]
)
def test_bfloat16_gradients_of_keys_with_a_large_mean(tokens: tuple[int, int], D: int, mean: float) -> None:
    """From 32 tokens and columns on, they may come from rounded gradients of the logits."""
    q, k = tt.make_qk(1, 3, (2,), *tokens, D)
    k = k + mean * torch.randn(D, generator=torch.Generator().manual_seed(1))
    q, k = (x.bfloat16().requires_grad_() for x in (q / (1 + mean), k))
    problem = Problem(q, k)
    dflow = tt.make_dflow(problem.flow_shape)
    grads = torch.autograd.grad(am_flow(q, k, impl="cpu"), (q, k), dflow)
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow))
