"""The CUDA kernels' own rules, and those of a forward whose gradients Triton makes.

The kernels are compiled by nvcc, and run on the CPU, lane by lane, with shapes small enough for it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from amflow_kernels import _build, am_flow, am_flow_matmul, dispatch, explain
from amflow_kernels import testing as tt
from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl import cuda
from amflow_kernels.problem import MapPairs, Problem
from benchmarks.gpu import cuda_report
from tests.kernels import conformance
from tests.kernels.conformance import small_case
from tests.kernels.op_calls import call_flow_op
from tests.ptx import cuda as executed

SLOW = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16_FIRST = [torch.bfloat16, *(pytest.param(dtype, marks=SLOW) for dtype in (torch.float32, torch.float16))]


@pytest.fixture
def machine(cuda_compiled: None, quick_interpreter: None, hardware_products: None) -> Iterator[None]:
    """CPU tensors for impl="cuda"."""
    with executed.gpu():
        yield


runs = pytest.mark.usefixtures("machine")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Nk", [16, 40, 104, 264, 640, *(pytest.param(n, marks=SLOW) for n in (17, 64, 72, 88, 144, 200, 400, 577))]
)
def test_rows_of_every_number_of_warps_are_within_budgets(Nk: int, dtype: torch.dtype) -> None:
    """A row takes as many warps as its length needs."""
    conformance.check_flow(small_case(tokens=(20, Nk), dtype=dtype, temperature=1.0), "cuda")


@runs
@pytest.mark.parametrize("dtype", BF16_FIRST)
@pytest.mark.parametrize("head_reduction", ["none", pytest.param("mean_map", marks=SLOW)])
def test_the_longest_rows_and_widest_heads_are_within_budgets(dtype: torch.dtype, head_reduction: str) -> None:
    """640 tokens of 128 columns, also where shared memory has room for one slice of them only."""
    case = small_case(tokens=(17, 640), D=128, dtype=dtype, temperature=1.0, head_reduction=head_reduction)
    for shared in (232448, 150 << 10):
        with executed.gpu(shared=shared):
            conformance.check_flow(case, "cuda")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_change_no_bit_of_each_other(dtype: torch.dtype) -> None:
    """Queries that are equal in both frames add exactly nothing, whatever the other queries do."""
    q, k = tt.make_qk(1, 2, (1,), 32, 257, 64, dtype=dtype, logit_std=6.0)
    k[:, 1] = k[:, 0]
    q[:, 1, :, :8] = q[:, 0, :, :8]
    q[:, 1, :, 16:] = q[:, 0, :, 16:]
    alone = am_flow(q[..., 8:16, :], k, center=True, impl="cuda")
    assert alone.norm() > 1e-3
    assert torch.equal(am_flow(q, k, center=True, impl="cuda"), alone)


@runs
@pytest.mark.parametrize("dtype", BF16_FIRST)
def test_chunks_and_pipeline_stages_change_no_bit(dtype: torch.dtype) -> None:
    """The number of pairs that a block takes and the amount that it prefetches influence no result."""
    q, k = tt.make_qk(1, 9, (1,), 20, 300, 72, dtype=dtype)
    expected = am_flow(q, k, lag=2, impl="cuda")
    for processors, shared, plan in (
        (10**6, 232448, "2 stages, 2 buffers"),
        (1, 132 << 10, "2 stages, 1 buffers"),
        (1, 84 << 10, "1 stages, 1 buffers"),
    ):
        with executed.gpu(processors, shared):
            assert plan in IMPLEMENTATIONS["cuda"].describe(MapPairs(q, k))[0]
            assert torch.equal(am_flow(q, k, lag=2, impl="cuda"), expected)


@runs
def test_sizes_beyond_the_limits_raise_before_any_work() -> None:
    """The errors name the limits."""
    q = torch.zeros(1, 2, 1, 641, 8)
    with pytest.raises(ValueError, match="impl='cuda': expected at most 640 tokens in a frame, got 641"):
        am_flow(q, q, impl="cuda")
    q = torch.zeros(1, 2, 1, 8, 129)
    with pytest.raises(ValueError, match="impl='cuda': expected a head dimension of at most 128, got 129"):
        am_flow(q, q, impl="cuda")
    q = torch.zeros(1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="impl='cuda': the CUDA kernels have no products"):
        am_flow_matmul(q, q, torch.zeros(1, 1, 1, 8, 3), impl="cuda")
    q = torch.zeros(1, 2, 1, 640, 128)
    with executed.gpu(shared=48 << 10), pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        am_flow(q, q, impl="cuda")


@runs
def test_small_shared_memory_has_room_for_512_tokens() -> None:
    """99 KB have room for 512 tokens, in any mode, and not for 577."""
    small = 99 << 10
    with executed.gpu(shared=small):
        for bytes_, mean_map, temperature, N in product((2, 4), (False, True), (0.1, 1), (257, 400, 512, 577)):
            message = cuda._ops().describe(N, N, 64, bytes_, mean_map, temperature, small)
            assert (int(message.split(" buffers, ")[1].split()[0]) <= small) == (N <= 512), message


def test_expm1_rounded_to_16_bits_breaks_the_budgets() -> None:
    """Why columns are not summed on tensor cores: rounding expm1 to scaled float16 breaks both budgets by itself."""
    for logit_std, center in ((1.0, True), (6.0, False)):
        q, k = tt.make_qk(1, 3, (4,), 257, 257, 64, dtype=torch.bfloat16, logit_std=logit_std)
        exact = tt.oracle_flow(Problem(q, k, center=True))
        A = torch.softmax(q.double() @ k.double().mT / 8, -1)
        e = torch.expm1((A[:, 1:] - A[:, :-1]).abs())
        w = 1 / (257 + e.sum(-1, keepdim=True))
        scale = 2.0 ** math.floor(math.log2(60000 / e.max()))
        for rounded, fits in ((e, True), ((e * scale).half().double() / scale, False)):
            sums = (w * rounded).sum(-2)
            error = sums - sums.mean(-1, keepdim=True) - exact
            size, budget = (error.norm() / exact.norm(), 1e-5) if center else (error.abs().max(), 5e-7)
            assert (size <= budget) == fits


@runs
def test_explain_describes_the_strips() -> None:
    """It says how rows and keys are divided."""
    q = torch.zeros(1, 2, 1, 257, 64, dtype=torch.bfloat16)
    message = str(explain(q, impl="cuda"))
    assert "am_flow runs 'cuda': asked for" in message
    assert "forward by strips: 5 blocks of 4 x 16 rows, 2 x 136 keys, 2 stages" in message
    assert "gradients: 'triton' makes them" in message


def test_only_gpu_tensors_are_taken_and_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors raise; for GPU tensors `not_chosen` says why impl=None takes another implementation."""
    q = torch.zeros(1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="impl='cuda': expected tensors on cuda, got cpu"):
        am_flow(q, q, impl="cuda")
    assert "cuda kernels: " in str(explain())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert (
        IMPLEMENTATIONS["cuda"].not_chosen(MapPairs(q, q))
        == "only where it is asked for: no measurement shows it faster on sm_90"
    )
    monkeypatch.setattr(cuda, "CHOSEN_ON", frozenset({90}))
    assert IMPLEMENTATIONS["cuda"].not_chosen(MapPairs(q, q)) is None


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch may multiply float32 as TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("machine", "tf32")
@pytest.mark.parametrize("D", [16, pytest.param(70, marks=SLOW)])
@pytest.mark.parametrize("logits", ["sharp", pytest.param("plain", marks=SLOW)])
def test_gradients_follow_the_precision_of_float32_products(D: int, logits: str) -> None:
    """Where PyTorch may multiply float32 as TF32, the gradients are those of q and k in TF32.

    Row sums of the forward, whose products are exact, would be wrong for these maps. The kernels round the gradients of
    the logits to TF32, too, which has as many digits as float16.
    """
    case = small_case(tokens=(33, 40), D=D, logits=logits, temperature=1.0)
    problem = case.problem()
    dflow = case.incoming(problem.flow_shape)
    in_tf32 = tt.with_inputs(
        problem, [(x.view(torch.int32) & -(1 << 13)).view(torch.float32) for x in (problem.q, problem.k)]
    )
    exact, tie = tt.oracle_grads(in_tf32, dflow), tt.grad_tie(in_tf32, dflow)
    conformance.check_flow(case, "cuda")  # the forward stays within the budgets of float32
    for grad, expected, share in zip(
        conformance.gradients(problem, [True, True], dflow, "cuda"), exact, tie, strict=True
    ):
        assert grad is not None
        assert (grad - expected).norm() <= tt.grad_budget(expected, share, torch.float16)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "function": am_flow,
    "op": lambda q, k, impl: call_flow_op(q, k, impl=impl),
    "compiled": torch.compile(am_flow, fullgraph=True, backend="aot_eager"),
}


@runs
@pytest.mark.parametrize("call", CALLS)
def test_without_triton_only_gradients_raise(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They raise in the forward, before any work; a flow without gradients needs no Triton."""
    q = torch.randn(1, 3, 2, 7, 6)
    torch._dynamo.reset()
    expected = CALLS[call](q, q, impl="cuda")
    monkeypatch.setattr(IMPLEMENTATIONS["triton"], "unavailable", lambda: "Triton is not installed")
    assert torch.equal(CALLS[call](q, q, impl="cuda"), expected)
    message = "impl='cuda' can't run with inputs that need gradients: 'triton' makes them: Triton is not installed"
    assert "gradients: 'triton' makes them: Triton is not installed" in str(explain(q, q, impl="cuda"))
    monkeypatch.setattr(IMPLEMENTATIONS["cuda"], "forward", lambda _: pytest.fail("the forward ran"))
    with pytest.raises(Exception, match=re.escape(message)):
        CALLS[call](q.clone().requires_grad_(), q, impl="cuda")


@runs
def test_what_triton_refuses_raises_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says whose gradients they are, and why they can't be had."""
    q = torch.randn(1, 3, 2, 7, 6, requires_grad=True)
    monkeypatch.setattr(IMPLEMENTATIONS["triton"], "devices", ("cuda",))
    with pytest.raises(RuntimeError, match="'triton' makes them: expected tensors on cuda, got cpu"):
        am_flow(q, q, impl="cuda")


@runs
def test_chosen_by_device_it_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl=None takes these kernels only where Triton can make the gradients; the op has room for what Triton saves."""
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda", "triton"))
    monkeypatch.setattr(IMPLEMENTATIONS["cuda"], "not_chosen", lambda _: None)
    case = small_case(tokens=(9, 7))
    problem = case.problem()
    dflow = case.incoming(problem.flow_shape)
    assert explain(problem.q, problem.k).impl == "cuda"
    pairs = [conformance.gradients(problem, [True, True], dflow, impl) for impl in (None, "cuda")]
    for chosen, asked_for in zip(*pairs, strict=True):
        assert torch.equal(chosen, asked_for)
    monkeypatch.setattr(IMPLEMENTATIONS["triton"], "unavailable", lambda: "Triton is not installed")
    explanation = explain(problem.q, problem.k)
    assert explanation.impl == "chunked"
    assert explanation.reason == "cuda: 'triton' makes them: Triton is not installed; triton: Triton is not installed"


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_compiled")
def test_sm_90_has_the_ptx_that_the_tests_execute(tmp_path: Path) -> None:
    """That of sm_80, but for the name of the architecture."""
    texts = []
    for architecture in ("80", "90a"):
        file = tmp_path / f"{architecture}.ptx"
        flags = [*_build._NVCC_FLAGS, f"-arch=compute_{architecture}", "-DAMFLOW_DTYPE=bf16", "-ptx", "-o", str(file)]
        source = str(_build.source_dir() / "cuda" / "forward.cu")
        subprocess.run([str(executed.nvcc()), *flags, source], check=True)
        text = file.read_text().replace(f"sm_{architecture}", "sm_80")
        texts.append(re.sub(r"_GLOBAL__N__\w+?am_flow", "am_flow", text))  # with the number of nvcc's process
    assert texts[0] == texts[1]


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_it_no_worse_than_reported(tmp_path: Path, cold_python: Callable[..., Any]) -> None:
    """A process without a GPU can load the library; its kernels are no worse than the committed report."""
    built = cuda_report.build(tmp_path)
    cold_python(f"import torch; torch.ops.load_library({str(built)!r}); torch.ops.amflow_cuda.forward")
    found = cuda_report.rows(built)
    assert not cuda_report.regressions(found, json.loads(cuda_report.RESULT.read_text()))


def test_torch_cuda_arch_list_is_read_as_pytorch_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that can't be read is an error that says why."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    assert _build.architectures() == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100",
    ]  # fmt: skip
    for word, message in (("Hopper", "got 'Hopper'"), ("7.5", "need compute capability 8.0 or more, got 7.5")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", word)
        with pytest.raises(_build.BuildError, match=message):
            _build.architectures()


def test_a_missing_nvcc_is_reported_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says where nvcc was looked for."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=r"nvcc, which was not found in \$CUDA_HOME/bin"):
        _build.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(_build.BuildError, match="CUDA_HOME is not set"):
        _build.nvcc()
