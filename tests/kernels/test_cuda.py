"""The CUDA kernels' own rules: compiled by nvcc, and run on the CPU, lane by lane, with shapes small enough for it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from amflow_kernels import _build, am_flow, am_flow_matmul, explain
from amflow_kernels import testing as tt
from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl import cuda
from amflow_kernels.problem import MapPairs, Problem
from benchmarks.gpu import cuda_report
from tests import simt
from tests.kernels import conformance
from tests.kernels.conformance import Case

SLOW = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16_FIRST = [torch.bfloat16, *(pytest.param(dtype, marks=SLOW) for dtype in (torch.float32, torch.float16))]


@pytest.fixture
def machine(emulated: None) -> Iterator[None]:
    """CPU tensors for impl="cuda"."""
    with simt.machine():
        yield


runs = pytest.mark.usefixtures("machine")


def case_of(tokens: tuple[int, int], dtype: torch.dtype, T: int = 2, D: int = 16, **options: Any) -> Case:
    row = {name: values[0] for name, values in conformance.FACTORS.items()}
    row |= {"tokens": tokens, "dtype": dtype, "frames": (T, 1), "D": D, "temperature": 1.0, **options}
    return Case(**row)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Nk", [16, 40, 104, 264, 640, *(pytest.param(n, marks=SLOW) for n in (17, 64, 72, 88, 144, 200, 400, 577))]
)
def test_rows_of_every_number_of_warps_are_within_budgets(Nk: int, dtype: torch.dtype) -> None:
    """A row takes as many warps as its length needs."""
    conformance.check_flow(case_of((20, Nk), dtype), "cuda")
    conformance.check_flow_gradients(case_of((20, Nk), dtype), "cuda")


@runs
@pytest.mark.parametrize("dtype", BF16_FIRST)
@pytest.mark.parametrize("head_reduction", ["none", pytest.param("mean_map", marks=SLOW)])
def test_the_longest_rows_and_widest_heads_are_within_budgets(dtype: torch.dtype, head_reduction: str) -> None:
    """640 tokens of 128 columns, also where shared memory has room for one slice of them only."""
    case = case_of((17, 640), dtype, D=128, head_reduction=head_reduction)
    for shared in (232448, 150 << 10):
        with simt.machine(shared=shared):
            conformance.check_flow(case, "cuda")
            conformance.check_flow_gradients(case, "cuda")


@runs
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_gradients_stay_finite_beside_a_key_of_weight_zero(dtype: torch.dtype, budget: float) -> None:
    """A key has logits of -inf in one frame: gradients that are finite in the reference are finite here."""
    q, k = tt.make_qk(1, 5, (1,), 33, 40, 16, dtype=dtype)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, 2, :, 7, 0] = -torch.inf
    grads = []
    for impl in ("cuda", "reference"):
        x = q.detach().requires_grad_(), k.detach().requires_grad_()
        flow = am_flow(*x, impl=impl)
        grads.append(torch.autograd.grad(flow, x, tt.make_dflow(flow.shape)))
    for found, expected in zip(*grads, strict=True):
        finite = expected.isfinite()
        assert finite.double().mean() > 0.5
        error = (found - expected)[finite].double().norm() / expected[finite].double().norm()
        assert error < budget


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
def test_the_highest_temperature_gives_no_flow_and_no_nan() -> None:
    """At 1e300 the change is divided away."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 2, (1,), 17, 33, 16))
    flow = am_flow(q, k, temperature=1e300, center=True, impl="cuda")
    assert flow.abs().max() < 1e-30
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert grad.abs().max() < 1e-25


def results(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flow = am_flow(q, k, lag=2, impl="cuda")
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape))]


@runs
@pytest.mark.parametrize("dtype", BF16_FIRST)
def test_chunks_and_pipeline_stages_change_no_bit(dtype: torch.dtype) -> None:
    """The number of pairs that a block takes and the amount that it prefetches influence no result."""
    q, k = tt.make_qk(1, 9, (1,), 20, 300, 72, dtype=dtype)
    expected = results(q, k)
    for processors, shared, plan in (
        (10**6, 232448, "2 stages, 2 buffers"),
        (1, 132 << 10, "2 stages, 1 buffers"),
        (1, 84 << 10, "1 stages, 1 buffers"),
    ):
        with simt.machine(processors, shared):
            assert plan in IMPLEMENTATIONS["cuda"].describe(MapPairs(q, k))[0]
            for one, other in zip(results(q, k), expected, strict=True):
                assert torch.equal(one, other)


@runs
def test_sizes_beyond_the_limits_raise_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with simt.machine(shared=48 << 10), pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        am_flow(q, q, impl="cuda")


@runs
def test_small_shared_memory_has_room_for_512_tokens() -> None:
    """99 KB have room for 512 tokens, in any mode, and not for 577."""
    small = 99 << 10
    with simt.machine(shared=small):
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


WRONG = {
    "at 'barrier 0'": "if (threadIdx.x < 32) sync_block();",
    "1 at 'shuffle 1'": "if (threadIdx.x == 3) shuffle_xor(1, 1);",
    "31 at 'shuffle 1' 1 at 'shuffle 2'": "shuffle_xor(1, threadIdx.x == 3 ? 2 : 1);",
    "do not agree on how many": "sync_some(1, threadIdx.x < 32 ? 32 : 64);",
    "address 1024 of 1024": "store_shared(1024, 1.f);",
    "address 4 is read before it was written": "store_shared(threadIdx.x / 32 * 8, 1.f); load_shared(4);",
    "4 bytes at 2": "store_shared(2, 1.f);",
    "is read before its copy was waited for": "copy_async(0, data); load_shared(0);",
    "a misaligned source": "copy_async(0, data + 1);",
}


RIGHT = """
  copy_async(threadIdx.x * 16, data);
  wait_copies();
  sync_block();
  const float x = load_shared((threadIdx.x ^ 33) * 16), y = load_shared((threadIdx.x ^ 33) * 16 + 8);
  if (x != 1 || y != 1) simt::fail("wrong numbers");
  if (shuffle_xor(float(threadIdx.x), 5) != (threadIdx.x ^ 5)) simt::fail("wrong shuffle");
"""


def test_the_emulated_machine_reports_faults(tmp_path: Path) -> None:
    """Barriers that some lanes miss, lanes that diverge, and misuse of shared memory; correct kernels pass."""
    kernels = {**WRONG, "": RIGHT}
    bodies = "\n".join(f"void kernel{n}() {{ {body} }}" for n, body in enumerate(kernels.values()))
    names = ", ".join(f"kernel{n}" for n in range(len(kernels)))
    (tmp_path / "machine.cpp").write_text(f"""
#include "simt.h"
namespace amflow_cuda {{
alignas(16) float data[8] = {{1, 1, 1, 1, 1, 1, 1, 1}};
{bodies}
}}
int main() {{
  using namespace amflow_cuda;
  for (auto* kernel : {{{names}}}) {{
    const char* wrong = launch(0, kernel, 1, 64, 1024, nullptr);
    std::puts(wrong ? wrong : "");
  }}
}}
""")
    program = str(tmp_path / "machine")
    flags = [
        "-std=c++20",
        "-Wall",
        "-Wno-unused-result",
        f"-I{simt.HERE}",
        str(tmp_path / "machine.cpp"),
        "-o",
        program,
    ]
    subprocess.run([_build.compiler(), *flags], check=True)
    message = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    for expected, found in zip(kernels, message, strict=False):
        assert expected in found, found
        assert expected or not found


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
