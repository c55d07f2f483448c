"""The CUDA kernels: compiled by nvcc, and run on the CPU, lane by lane, with shapes small enough for it."""

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
import simt
import test_matrix as matrix
import torch
from test_ops import sample
from torch import library

from amflow_kernels import _build, am_flow, am_flow_matmul, am_flow_pair, explain, ops
from amflow_kernels import testing as tt
from amflow_kernels.impl import cuda
from benchmarks.gpu import cuda_report

FACTORS: dict[str, list[Any]] = {
    **matrix.FACTORS,
    "tokens": [(1, 1), (17, 17), (65, 65), (33, 70), (70, 33), (197, 197), (49, 196)],
    "D": [1, 8, 17, 40, 64, 72, 80, 128],
    "frames": [(2, 1), (5, 2), (18, 1), (16, 3), (4, 0)],
    "groups": [(1,), (3,), (2, 2)],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def allowed(row: dict[str, Any]) -> bool:
    heads = row.get("groups", (1,))[0] if row.get("head_reduction") == "mean_map" else 1
    return matrix.allowed(row) and matrix.map_elements(row) * heads * max(64, row.get("D", 1)) <= 3_000_000


CASES = [matrix.Case(**row, seed=seed) for seed, row in enumerate(matrix.pairwise(FACTORS, allowed))]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels as the host compiler makes them."""
    torch.ops.load_library(str(simt.build(tmp_path_factory.mktemp("simt"))))


@pytest.fixture
def machine(emulated: None) -> Iterator[None]:
    """CPU tensors for impl="cuda"."""
    with simt.machine():
        yield


runs = pytest.mark.usefixtures("machine")


@runs
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: matrix.Case) -> None:
    """Flow, centred flow and the gradients that were asked for are within their budgets of the oracle."""
    matrix.check_forward(case, "cuda")
    matrix.check_backward(case, "cuda")


def problem(tokens: tuple[int, int], dtype: torch.dtype, T: int = 2, D: int = 16, **options: Any) -> matrix.Case:
    row = {name: values[0] for name, values in FACTORS.items()}
    row |= {"tokens": tokens, "dtype": dtype, "frames": (T, 1), "D": D, "temperature": 1.0, **options}
    return matrix.Case(**row)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nk", [16, 17, 40, 64, 72, 88, 104, 144, 200, 264, 400, 577, 640])
def test_every_number_of_warps(Nk: int, dtype: torch.dtype) -> None:
    """Rows of any length, by as many warps as they take."""
    matrix.check_forward(problem((20, Nk), dtype), "cuda")
    matrix.check_backward(problem((20, Nk), dtype), "cuda")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_reduction", ["none", "mean_map"])
def test_longest(dtype: torch.dtype, head_reduction: str) -> None:
    """640 tokens of 128 columns, also where shared memory has room for one slice of them alone."""
    case = problem((17, 640), dtype, D=128, head_reduction=head_reduction)
    for shared in (232448, 150 << 10):
        with simt.machine(shared=shared):
            matrix.check_forward(case, "cuda")
            matrix.check_backward(case, "cuda")


@runs
@pytest.mark.parametrize("kind", ["NaN in q", "NaN in k", "+inf logit", "all -inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
def test_nan_rule(head_reduction: str, dtype: torch.dtype, kind: str) -> None:
    """A bad map row makes NaN of all of the flows that use its map and leaves every other flow as it was."""
    matrix.test_nan_rule((5, 100), dtype, kind, head_reduction, "cuda", lambda *_: True)


@runs
@pytest.mark.parametrize("frame", ["a", "b"])
def test_nan_rule_for_pairs(frame: str) -> None:
    """In pair form a bad map row makes NaN of that pair's flow alone."""
    matrix.test_nan_rule_for_pairs("NaN in q", frame, "cuda", lambda *_: True)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_minus_inf_logit_weighs_nothing(scale: float, dtype: torch.dtype) -> None:
    """Logits of -inf are weights of 0."""
    matrix.test_minus_inf_logit_weighs_nothing(dtype, scale, "cuda", lambda *_: True)


@runs
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_infinite_key(dtype: torch.dtype, budget: float) -> None:
    """A key whose logits are -inf in one frame leaves all gradients finite that are so in the reference."""
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
def test_rows_know_nothing_of_each_other(dtype: torch.dtype) -> None:
    """Queries that are the same in both frames add nothing, to the bit, whatever the others do."""
    q, k = tt.make_qk(1, 2, (1,), 32, 257, 64, dtype=dtype, logit_std=6.0)
    k[:, 1] = k[:, 0]
    q[:, 1, :, :8] = q[:, 0, :, :8]
    q[:, 1, :, 16:] = q[:, 0, :, 16:]
    alone = am_flow(q[..., 8:16, :], k, center=True, impl="cuda")
    assert alone.norm() > 1e-3
    assert torch.equal(am_flow(q, k, center=True, impl="cuda"), alone)


@runs
def test_highest_temperature() -> None:
    """No flow at all is left, and no NaN comes up."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 2, (1,), 17, 33, 16))
    flow = am_flow(q, k, temperature=1e300, center=True, impl="cuda")
    assert flow.abs().max() < 1e-30
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert grad.abs().max() < 1e-25


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
def test_equal_frames(head_reduction: str, dtype: torch.dtype) -> None:
    """Frames that are the same give Nq / Nk exactly, a centred flow of 0 and no gradient at all."""
    q, k = (x[:, :1].expand(-1, 4, -1, -1, -1).contiguous() for x in tt.make_qk(1, 1, (2,), 33, 100, 24, dtype=dtype))
    q, k = q.requires_grad_(), k.requires_grad_()
    for processors in (1, 10**6):
        with simt.machine(processors):
            flow = am_flow(q, k, head_reduction=head_reduction, impl="cuda")
            assert torch.equal(flow, torch.full_like(flow, 33 / 100))
            centred = am_flow(q, k, head_reduction=head_reduction, center=True, impl="cuda")
            assert torch.equal(centred, torch.zeros_like(centred))
            for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
                assert torch.equal(grad, torch.zeros_like(grad))


def results(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flow = am_flow(q, k, lag=2, impl="cuda")
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape))]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_stages_change_no_bit(dtype: torch.dtype) -> None:
    """How many pairs a block takes, and how much it loads ahead, has no influence on any result."""
    q, k = tt.make_qk(1, 9, (1,), 20, 300, 72, dtype=dtype)
    expected = results(q, k)
    for processors, shared, plan in (
        (10**6, 232448, "2 stages, 2 buffers"),
        (1, 132 << 10, "2 stages, 1 buffers"),
        (1, 84 << 10, "1 stages, 1 buffers"),
    ):
        with simt.machine(processors, shared):
            assert plan in cuda.describe_launch(q, k)
            for one, other in zip(results(q, k), expected, strict=True):
                assert torch.equal(one, other)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_in_no_pair(dtype: torch.dtype) -> None:
    """Their gradients are 0."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 5, (2,), 20, 33, 16, dtype=dtype))
    with tt.poison_allocations():
        flow = am_flow(q, k, lag=3, impl="cuda")
        for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
            assert torch.equal(grad[:, 2], torch.zeros_like(grad[:, 2]))
            assert grad[:, [0, 1, 3, 4]].ne(0).any(-1).all()


@runs
@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str)
def test_some_gradients_of_pairs(needed: tuple[int, ...]) -> None:
    """Any of the four, without the others."""
    q, k = tt.make_qk(1, 6, (2,), 20, 33, 16)
    frames = [x.detach().clone() for x in (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])]
    grads = []
    for impl in ("cuda", "reference"):
        asked = [x.requires_grad_(bool(n)) for x, n in zip([x.detach() for x in frames], needed, strict=True)]
        flow = am_flow_pair(*asked, impl=impl)
        wanted = [x for x in asked if x.requires_grad]
        grads.append(torch.autograd.grad(flow, wanted, tt.make_dflow(flow.shape)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_zero(dtype: torch.dtype) -> None:
    """All maps are even: no flow, and no gradient."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 20, 33, 16, dtype=dtype))
    flow = am_flow(q, k, scale=0.0, impl="cuda")
    assert torch.equal(flow, torch.full_like(flow, 20 / 33))
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert not grad.any()


@runs
@pytest.mark.parametrize("name", ["plain", "pair"])
def test_opcheck(name: str) -> None:
    """Both ops keep their schema, fake, autograd and dynamic-shape promises, with what the forward saves."""
    frames, options = sample(name)
    library.opcheck(ops.am_flow, (*frames, None, None, *options, False, "cuda"))
    flow, saved = ops.am_flow(*frames, None, None, *options, False, "cuda")
    needed = [x is not None for x in frames]
    arguments = (tt.make_dflow(flow.shape), *frames, *options, needed, "cuda", saved.detach())
    library.opcheck(ops.am_flow_backward, arguments)


@runs
def test_sizes_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear errors, before any work, for what the kernels do not take."""
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
def test_small_shared_memory() -> None:
    """99 KB have room for 512 tokens, in any mode, and not for 577."""
    small = 99 << 10
    with simt.machine(shared=small):
        for bytes_, mean_map, temperature, N in product((2, 4), (False, True), (0.1, 1), (257, 400, 512, 577)):
            told = cuda._ops().describe(N, N, 64, bytes_, mean_map, temperature, small)
            assert (int(told.split(" buffers, ")[1].split()[0]) <= small) == (N <= 512), told


def test_changes_in_16_bits_are_too_rough() -> None:
    """Why columns are not summed up on tensor cores: rounding expm1 to float16, scaled, alone breaks both budgets."""
    for logit_std, center in ((1.0, True), (6.0, False)):
        q, k = tt.make_qk(1, 3, (4,), 257, 257, 64, dtype=torch.bfloat16, logit_std=logit_std)
        exact = tt.oracle_flow(q, k, center=True)
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
def test_explain() -> None:
    """It tells how rows and keys are cut up."""
    q = torch.zeros(1, 2, 1, 257, 64, dtype=torch.bfloat16)
    told = str(explain(q, impl="cuda"))
    assert "am_flow runs 'cuda': asked for" in told
    assert "forward by strips: 5 blocks of 4 x 16 rows, 2 x 136 keys, 2 stages" in told


def test_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU tensor it raises, and is never chosen; where it might be chosen, `explain` says why it is not."""
    q = torch.zeros(1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="impl='cuda': expected tensors on cuda, got cpu"):
        am_flow(q, q, impl="cuda")
    assert "cuda kernels: " in str(explain())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert ops.IMPLS["cuda"].not_chosen(q) == "only where it is asked for: no measurement shows it faster on sm_90"
    monkeypatch.setattr(cuda, "CHOSEN_ON", frozenset({90}))
    assert ops.IMPLS["cuda"].not_chosen(q) is None


# The machine itself: what is wrong in a kernel is an error.

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


def test_machine(tmp_path: Path) -> None:
    """Barriers that not all reach, lanes that part, and what is wrong with shared memory are told; else all is well."""
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
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    for expected, found in zip(kernels, told, strict=False):
        assert expected in found, found
        assert expected or not found


@pytest.mark.build
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles(tmp_path: Path, cold_python: Callable[..., Any]) -> None:
    """For a GPU that is not here, as a library that a process without one can load, no worse than the report says."""
    built = cuda_report.build(tmp_path)
    cold_python(f"import torch; torch.ops.load_library({str(built)!r}); torch.ops.amflow_cuda.forward")
    found = cuda_report.rows(built)
    assert not cuda_report.regressions(found, json.loads(cuda_report.RESULT.read_text()))


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_CUDA_ARCH_LIST as PyTorch's own extensions read it, or an error that says what is wrong with it."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    assert _build.architectures() == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100",
    ]  # fmt: skip
    for word, told in (("Hopper", "got 'Hopper'"), ("7.5", "need compute capability 8.0 or more, got 7.5")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", word)
        with pytest.raises(_build.BuildError, match=told):
            _build.architectures()


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, and names the remedy."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=r"nvcc, which was not found in \$CUDA_HOME/bin"):
        _build.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(_build.BuildError, match="CUDA_HOME is not set"):
        _build.nvcc()
