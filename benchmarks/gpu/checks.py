"""Checks of results that only a GPU can run. Each gives a dict whose entry "failed" maps a name to the reason."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_attention
from amflow_kernels import testing as tt
from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl import cuda
from amflow_kernels.impl.triton import configs
from amflow_kernels.problem import Problem
from benchmarks.providers import attention

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One case of the correctness matrix: how to make a problem, and which implementation has to solve it."""

    tokens: tuple[int, int] = (257, 257)
    D: int = 64
    T: int = 3
    groups: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    frame_step: float = 0.2
    logit_std: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    pair: bool = False
    lse: bool = False  # the rows' log-sum-exps are given
    impl: str = "triton"

    def __str__(self) -> str:
        standard = Case()
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(standard, f.name)}
        options = changed.pop("options", {})
        shown = {"tokens": self.tokens, "dtype": self.dtype, **changed, **options}
        return ", ".join(f"{name} {value}" for name, value in shown.items()).replace("torch.", "")

    def problem(self, device: str) -> Problem:
        """The call of `am_flow` or `am_flow_pair` that this case is."""
        q, k = tt.make_qk(
            1,
            self.T,
            self.groups,
            *self.tokens,
            self.D,
            dtype=self.dtype,
            frame_step=self.frame_step,
            logit_std=self.logit_std,
            layout=self.layout,
            device=device,
        )
        if self.pair:
            return Problem(q[:, :-1], k[:, :-1], q_b=q[:, 1:], k_b=k[:, 1:], **self.options)
        lse = torch.logsumexp(self.D**-0.5 * (q.double() @ k.double().mT), -1).float() if self.lse else None
        return Problem(q, k, lse=lse, **self.options)


def cases() -> list[Case]:
    """Every kernel and every branch of the choice between them, in every dtype."""
    triton = [case for dtype in (torch.bfloat16, torch.float16, torch.float32) for case in _cases_of(dtype)]
    return triton + [replace(case, impl="cuda") for case in triton if not case.lse and fits_cuda(*case.tokens, case.D)]


def _cases_of(dtype: torch.dtype) -> list[Case]:
    cases = []
    for N in (1, 2, 17, 49, 64, 100, 197, 230, 256, 257, 261, 264, 330, 512, 577, 1370):
        cases.append(Case((N, N), dtype=dtype, groups=(1,) if N > 1000 else (2,)))
    cases += [Case((70, 70), D, dtype=dtype) for D in (1, 8, 17, 40, 72, 80, 128, 256)]
    cases += [Case((257, 257), layout=layout, dtype=dtype) for layout in tt.LAYOUTS[1:]]
    cases += [Case((90, 90), 17, layout="offset", dtype=dtype)]
    cases += [Case((16, 64), groups=(2, 3), dtype=dtype), Case((300, 70), dtype=dtype)]
    for N in (257, 600):
        cases += [Case((N, N), dtype=dtype, frame_step=1e-3), Case((N, N), dtype=dtype, logit_std=6.0)]
        cases += [Case((N, N), T=18, dtype=dtype, groups=(1,)), Case((N, N), dtype=dtype, pair=True)]
        cases += [Case((N, N), dtype=dtype, lse=True, logit_std=3.0)]
        options: tuple[dict[str, Any], ...] = (
            {"lag": 2},
            {"temperature": 0.25},
            {"temperature": 3.0},
            {"scale": -0.2},
            {"head_reduction": "mean"},
            {"head_reduction": "mean_map"},
        )
        cases += [Case((N, N), dtype=dtype, T=5, options=option) for option in options]
    return cases


def fits_cuda(Nq: int, Nk: int, D: int) -> bool:
    """Whether the CUDA kernels take these sizes."""
    return max(Nq, Nk) <= cuda.MAX_TOKENS and D <= cuda.MAX_HEAD_DIM


def check(case: Case, device: str) -> None:
    """Raises AssertionError unless flow, centred flow and gradients are within their budgets of the oracle."""
    problem = case.problem(device)
    exact = tt.oracle_flow(replace(problem, center=True))
    inputs = [x.detach().requires_grad_() for x in tt.inputs_of(problem)]
    differentiable = tt.with_inputs(problem, inputs)
    with tt.poison_allocations():
        flow = tt.run(differentiable, case.impl)
        centred = tt.run(replace(differentiable, center=True), case.impl)
        dflow = tt.make_dflow(flow.shape, device=device)
        grads = torch.autograd.grad(flow, inputs, dflow)
        only_q = torch.autograd.grad(tt.run(differentiable, case.impl), inputs[:1], dflow)
    temperature = problem.temperature
    tt.assert_flow(flow.detach(), exact, problem.Nq, temperature=temperature)
    tt.assert_centred(centred.detach(), exact, problem.Nq, frame_step=case.frame_step, temperature=temperature)
    magnitude = tt.grad_magnitude(problem, dflow) if problem.Nk <= 2 else None
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow), magnitude)
    assert torch.equal(only_q[0], grads[0]), "dq differs where dk is not asked for"


def failure(case: Case, device: str) -> str | None:
    """Why a case fails, or None."""
    try:
        check(case, device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def build_cuda() -> dict[str, Any]:
    """Builds the CUDA kernels for this GPU, or loads those that are there."""
    start = perf_counter()
    reason = IMPLEMENTATIONS["cuda"].unavailable()
    return {"seconds": perf_counter() - start, "failed": {"build": reason} if reason else {}}


def correctness(device: str, selected: list[Case]) -> dict[str, Any]:
    """Runs all cases and gives those that failed. Processes share the work, most of which is compiling kernels."""
    slowest_first = sorted(selected, key=lambda case: -case.D * case.dtype.itemsize)
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        reasons = list(pool.map(failure, slowest_first, [device] * len(selected)))
    failed = {str(case): reason for case, reason in zip(slowest_first, reasons, strict=True) if reason}
    return {"cases": len(selected), "failed": failed}


def exactness(device: str, impls: tuple[str, ...]) -> dict[str, Any]:
    """Equal frames give Nq / Nk and no gradient; the same call gives the same bits again, and in chunks of any size."""
    failed: dict[str, str] = {}
    sizes = (100, torch.bfloat16), (197, torch.bfloat16), (257, torch.float16), (600, torch.float32)
    for impl, (N, dtype) in product(impls, sizes):
        failed |= {f"{impl}, {N} {dtype}: {name}": why for name, why in _inexact(device, impl, N, dtype).items()}
    return {"failed": failed}


def _inexact(device: str, impl: str, N: int, dtype: torch.dtype) -> dict[str, str]:
    q, k = tt.make_qk(1, 9, (2,), N, N, 64, dtype=dtype, device=device)
    expected = _flow_and_grads(q, k, impl)
    runs = {"again": _flow_and_grads(q, k, impl)}
    for chunks, processors in (("long", 1), ("short", 10**6)):
        with _processors(q, processors):
            runs[f"{chunks} chunks"] = _flow_and_grads(q, k, impl)
    failed = {name: "other bits" for name, results in runs.items() if not all(map(torch.equal, results, expected))}
    q, k = (x[:, :1].expand(-1, 4, -1, -1, -1).contiguous() for x in (q, k))
    flow, *grads = _flow_and_grads(q, k, impl)
    if not (flow == 1).all():
        failed["equal frames"] = f"flow up to {(flow - 1).abs().max():.3g} off 1"
    for name, grad in zip("qk", grads, strict=True):
        if grad.any():
            failed[f"equal frames, d{name}"] = f"up to {grad.abs().max():.3g}"
    return failed


def _flow_and_grads(q: Tensor, k: Tensor, impl: str) -> list[Tensor]:
    """Flow, dq and dk."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    flow = am_flow(q, k, impl=impl)
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape, device=q.device))]


@contextmanager
def _processors(q: Tensor, processors: int) -> Iterator[None]:
    """Makes launches see this number of multiprocessors, by which they choose the size of chunks."""
    device = configs.Device.of(q.device)
    _, *others = cuda._device(q)
    with (
        mock.patch.object(configs.Device, "of", return_value=configs.Device(device.sm, device.shared, processors)),
        mock.patch.object(cuda, "_device", return_value=(processors, *others)),
    ):
        yield


def drop_in(device: str) -> dict[str, Any]:
    """`am_flow_attention`: the attention's output to the bit, and the flow within its budgets, near-still clips too.

    At N = 577 the flow takes the log-sum-exps of flash attention, over whose precision this library has no control.
    """
    failed: dict[str, str] = {}
    for N, dtype, frame_step in product((257, 577), (torch.bfloat16, torch.float16), (0.2, 1e-3)):
        q, k = tt.make_qk(1, 3, (2,), N, N, 64, dtype=dtype, frame_step=frame_step, device=device)
        v = torch.randn_like(q)
        exact = tt.oracle_flow(Problem(q, k, center=True))
        out, centred = am_flow_attention(q, k, v, center=True)
        name = f"N = {N}, {dtype}, frame step {frame_step}"
        if not torch.equal(out, attention(q, k, v)):
            failed[f"{name}: output"] = "other bits"
        try:
            tt.assert_flow(am_flow_attention(q, k, v)[1], exact, N)
            tt.assert_centred(centred, exact, N, frame_step=frame_step)
        except AssertionError as error:
            failed[f"{name}: flow"] = str(error)
    return {"failed": failed}


def environments(device: str) -> dict[str, Any]:
    """CUDA graphs, another stream, torch.compile, a second GPU where there is one."""
    failed: dict[str, str] = {}
    checked = []
    for N in (257, 577):
        q, k = tt.make_qk(1, 4, (2,), N, N, 64, dtype=torch.bfloat16, device=device)
        q, k = q.requires_grad_(), k.requires_grad_()
        dflow = tt.make_dflow((1, 3, 2, N), device=device)

        def step(q: Tensor = q, k: Tensor = k, dflow: Tensor = dflow) -> tuple[Tensor, ...]:
            flow = am_flow(q, k)
            return flow.detach(), *torch.autograd.grad(flow, (q, k), dflow)

        expected = step()

        def compare(name: str, got: Iterable[Tensor], N: int = N, expected: tuple[Tensor, ...] = expected) -> None:
            checked.append(f"{name}, N = {N}")
            torch.cuda.synchronize()
            if not all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, expected, strict=True)):
                failed[checked[-1]] = "other results"

        compare("CUDA graph", _replayed(step))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**7)
            compare("another stream", step())
        compare("torch.compile", [torch.compile(am_flow, fullgraph=True)(q, k).detach(), *expected[1:]])
        if torch.cuda.device_count() > 1:
            compare("second GPU", [am_flow(q.to("cuda:1"), k.to("cuda:1")).detach(), *expected[1:]])
    return {"checked": checked, "failed": failed}


def _replayed(step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of a captured step, from a replay: what the capture left there is cleared first."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    return captured


SANITIZED = """
import torch
from amflow_kernels import am_flow, testing as tt
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for N, D, dtype in ((49, 64, bf16), (197, 64, bf16), (257, 64, fp16), (90, 17, fp32)):
    for layout in ("offset", "contiguous"):
        q, k = tt.make_qk(1, 3, (1,), N, N, D, dtype=dtype, device="cuda", layout=layout)
        flow = am_flow(q.requires_grad_(), k.requires_grad_(), impl="{impl}")
        torch.autograd.grad(flow, (q, k), torch.randn_like(flow))
"""


def sanitizer(impls: tuple[str, ...]) -> dict[str, Any]:
    """compute-sanitizer on small problems: accesses out of bounds, races in shared memory, missed barriers."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed", "failed": {}}
    failed = {}
    slow = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for impl, kind in product(impls, ("memcheck", "racecheck", "synccheck")):
        command = [tool, "--tool", kind, "--error-exitcode", "7", sys.executable, "-c", SANITIZED.format(impl=impl)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            slow.append(f"{kind} of {impl}")
            continue
        if done.returncode:
            failed[f"{kind} of {impl}"] = (done.stdout + done.stderr)[-1500:]
    return {"failed": failed, "skipped": f"too slow: {', '.join(slow)}" if slow else ""}
