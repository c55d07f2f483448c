"""Everything that only a GPU can tell, in one command: correctness, sanitizer, graphs, first call, times, memory.

python benchmarks/gpu_suite.py --out results    runs from the bare tree; writes suite.json and suite.md

Not yet run on a GPU; planned to take under 10 minutes. Every section reports on its own, so that one failure hides no
other. The exit status is 1 if a check failed or a section broke off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import cycle, product
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # where memory is poisoned, only deterministic products run

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from amflow_kernels import am_flow, am_flow_attention, am_flow_pair, explain  # noqa: E402
from amflow_kernels import testing as tt  # noqa: E402
from amflow_kernels.impl import cuda  # noqa: E402
from benchmarks.providers import attention, eager  # noqa: E402
from benchmarks.report import Table  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402

# The clip of the bounds in docs/compile_report.md, then the same model at other resolutions, and few frames.
SHAPES = (
    Shape(8, 16, 12, 257, 64),
    Shape(8, 16, 12, 197, 64),
    Shape(2, 16, 12, 577, 64),
    Shape(1, 8, 12, 1370, 64),
    Shape(1, 4, 12, 4096, 64),
    Shape(1, 2, 12, 257, 64),
)
COMPILED = SHAPES[:2]  # where torch.compile, which takes long to compile, is measured
SECONDS = 0.7  # of one provider at one shape
MOST_EAGER_BYTES = 30e9  # of maps, which eager PyTorch makes about six of


# ---------------------------------------------------------------------------------------------------- correctness


@dataclass(frozen=True)
class Problem:
    """One problem of the correctness matrix. (That of tests/ needs packages which a bare tree may lack.)"""

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
        standard = Problem()
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(standard, f.name)}
        options = changed.pop("options", {})
        told = {"tokens": self.tokens, "dtype": self.dtype, **changed, **options}
        return ", ".join(f"{name} {value}" for name, value in told.items()).replace("torch.", "")


def problems() -> list[Problem]:
    """Every kernel and every branch of the choice between them, in every dtype."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for N in (1, 2, 17, 49, 64, 100, 197, 230, 256, 257, 261, 264, 330, 512, 577, 1370):
            found.append(Problem((N, N), dtype=dtype, groups=(1,) if N > 1000 else (2,)))
        found += [Problem((70, 70), D, dtype=dtype) for D in (1, 8, 17, 40, 72, 80, 128, 256)]
        found += [Problem((257, 257), layout=layout, dtype=dtype) for layout in tt.LAYOUTS[1:]]
        found += [Problem((90, 90), 17, layout="offset", dtype=dtype)]
        found += [Problem((16, 64), groups=(2, 3), dtype=dtype), Problem((300, 70), dtype=dtype)]
        for N in (257, 600):
            found += [Problem((N, N), dtype=dtype, frame_step=1e-3), Problem((N, N), dtype=dtype, logit_std=6.0)]
            found += [Problem((N, N), T=18, dtype=dtype, groups=(1,)), Problem((N, N), dtype=dtype, pair=True)]
            found += [Problem((N, N), dtype=dtype, lse=True, logit_std=3.0)]
            options: tuple[dict[str, Any], ...] = (
                {"lag": 2},
                {"temperature": 0.25},
                {"temperature": 3.0},
                {"scale": -0.2},
                {"head_reduction": "mean"},
                {"head_reduction": "mean_map"},
            )
            found += [Problem((N, N), dtype=dtype, T=5, options=option) for option in options]
    return found + [replace(p, impl="cuda") for p in found if not p.lse and fits_cuda(max(p.tokens), p.D)]


def fits_cuda(tokens: int, D: int) -> bool:
    """Whether the CUDA kernels take these sizes."""
    return tokens <= cuda.MAX_TOKENS and D <= cuda.MAX_HEAD_DIM


def check_problem(problem: Problem, device: str) -> None:
    """Flow, centred flow and gradients within their budgets of the oracle."""
    q, k = tt.make_qk(
        1, problem.T, problem.groups, *problem.tokens, problem.D, dtype=problem.dtype, layout=problem.layout,
        frame_step=problem.frame_step, logit_std=problem.logit_std, device=device,
    )  # fmt: skip
    frames = (q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:]) if problem.pair else (q, k)
    function: Callable[..., Tensor] = am_flow_pair if problem.pair else am_flow
    exact = tt.oracle_flow(*frames, center=True, **problem.options)
    temperature = problem.options.get("temperature", 1.0)
    options: dict[str, Any] = {"impl": problem.impl, **problem.options}
    if problem.lse:
        options["lse"] = torch.logsumexp(problem.D**-0.5 * (q.double() @ k.double().mT), -1).float()
    inputs = [x.detach().requires_grad_() for x in frames]
    with tt.poison_allocations():
        flow = function(*inputs, **options)
        centred = function(*inputs, center=True, **options)
        dflow = tt.make_dflow(flow.shape, device=device)
        grads = torch.autograd.grad(flow, inputs, dflow)
        only_q = torch.autograd.grad(function(*inputs, **options), inputs[:1], dflow)
    tt.assert_flow(flow.detach(), exact, problem.tokens[0], temperature=temperature)
    tt.assert_centred(
        centred.detach(), exact, problem.tokens[0], frame_step=problem.frame_step, temperature=temperature
    )
    arguments = (dflow, *frames)
    magnitude = tt.grad_magnitude(*arguments, **problem.options) if problem.tokens[1] <= 2 else None
    tt.assert_grads(
        grads,
        tt.oracle_grads(*arguments, **problem.options),
        tt.grad_tie(*arguments, **problem.options),
        magnitude,
    )
    assert torch.equal(only_q[0], grads[0]), "dq differs where dk is not asked for"


def verdict(problem: Problem, device: str) -> str | None:
    """What is wrong, or None."""
    try:
        check_problem(problem, device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def build_cuda() -> dict[str, Any]:
    """Builds the CUDA kernels for this GPU, or loads those that are there."""
    begin = perf_counter()
    reason = cuda.unavailable()
    return {"seconds": perf_counter() - begin, "failed": {"build": reason} if reason else {}}


def correctness(device: str, selected: list[Problem]) -> dict[str, Any]:
    """Runs all problems and gives those that failed. Processes share the work, most of which is compiling kernels."""
    slowest_first = sorted(selected, key=lambda p: -p.D * p.dtype.itemsize)
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        verdicts = list(pool.map(verdict, slowest_first, [device] * len(selected)))
    failed = {str(p): wrong for p, wrong in zip(slowest_first, verdicts, strict=True) if wrong}
    return {"problems": len(selected), "failed": failed}


def exactness(device: str, impls: tuple[str, ...]) -> dict[str, Any]:
    """Frames that are the same give Nq / Nk and no gradient; results have the same bits again, and in any chunks."""
    from unittest import mock

    from amflow_kernels.impl.triton import configs

    failed: dict[str, str] = {}
    sizes = (100, torch.bfloat16), (197, torch.bfloat16), (257, torch.float16), (600, torch.float32)
    for impl, (N, dtype) in product(impls, sizes):
        q, k = tt.make_qk(1, 9, (2,), N, N, 64, dtype=dtype, device=device)
        q, k = q.requires_grad_(), k.requires_grad_()

        name = f"{impl}, {N} {dtype}"

        def results(q: Tensor = q, k: Tensor = k, impl: str = impl) -> list[Tensor]:
            flow = am_flow(q, k, impl=impl)
            return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape, device=device))]

        expected = results()
        if not all(map(torch.equal, results(), expected)):
            failed[f"{name}: again"] = "other bits"
        one = configs.Device.of(q.device)
        _, *others = cuda._device(q)
        for chunks, processors in (("long", 1), ("short", 10**6)):
            with (
                mock.patch.object(configs.Device, "of", return_value=configs.Device(one.sm, one.shared, processors)),
                mock.patch.object(cuda, "_device", return_value=(processors, *others)),
            ):
                if not all(map(torch.equal, results(), expected)):
                    failed[f"{name}: {chunks} chunks"] = "other bits"
        still = [x[:, :1].expand(-1, 4, -1, -1, -1).contiguous().detach().requires_grad_() for x in (q, k)]
        flow = am_flow(*still, impl=impl)
        if not (flow == 1).all():
            failed[f"{name}: equal frames"] = f"flow up to {(flow - 1).abs().max():.3g} off 1"
        for grad in torch.autograd.grad(flow, still, tt.make_dflow(flow.shape, device=device)):
            if grad.any():
                failed[f"{name}: equal frames, gradient"] = f"up to {grad.abs().max():.3g}"
    return {"failed": failed}


def drop_in(device: str) -> dict[str, Any]:
    """`am_flow_attention`: the attention's output to the bit, and the flow within its budgets, near-still clips too.

    At N = 577 the flow takes the log-sum-exps that flash attention leaves, whose precision is not ours to choose.
    """
    failed: dict[str, str] = {}
    for N, dtype, frame_step in product((257, 577), (torch.bfloat16, torch.float16), (0.2, 1e-3)):
        q, k = tt.make_qk(1, 3, (2,), N, N, 64, dtype=dtype, frame_step=frame_step, device=device)
        v = torch.randn_like(q)
        exact = tt.oracle_flow(q, k, center=True)
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

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for x in captured:
            x.zero_()
        graph.replay()
        compare("CUDA graph", captured)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**7)
            compare("another stream", step())
        compare("torch.compile", [torch.compile(am_flow, fullgraph=True)(q, k).detach(), *expected[1:]])
        if torch.cuda.device_count() > 1:
            compare("second GPU", [am_flow(q.to("cuda:1"), k.to("cuda:1")).detach(), *expected[1:]])
    return {"checked": checked, "failed": failed}


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
    """compute-sanitizer on small problems: accesses out of bounds, races in shared memory, barriers not all reach."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer was not found", "failed": {}}
    failed = {}
    slow = []
    for impl, check in product(impls, ("memcheck", "racecheck", "synccheck")):
        code = SANITIZED.format(impl=impl)
        command = [tool, "--tool", check, "--error-exitcode", "7", sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            slow.append(f"{check} of {impl}")
            continue
        if done.returncode:
            failed[f"{check} of {impl}"] = (done.stdout + done.stderr)[-1500:]
    return {"failed": failed, "skipped": f"too slow: {', '.join(slow)}" if slow else ""}


FIRST = """
from time import perf_counter
import torch
from amflow_kernels import am_flow
q, k = torch.randn(2, 1, 4, 12, {N}, 64, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind()
torch.cuda.synchronize()
begin = perf_counter()
flow = am_flow(q, k)
torch.cuda.synchronize()
forward = perf_counter()
flow.sum().backward()
torch.cuda.synchronize()
print(forward - begin, perf_counter() - forward)
"""


def first_call(device: str) -> dict[str, Any]:
    """Seconds of the first forward and backward of a fresh process: with nothing compiled yet, and once again."""
    found = {}
    for N in (257, 577):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("compiles", "from the cache"):
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache}
                command = [sys.executable, "-c", FIRST.format(N=N)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=150)
                found[f"N = {N}, {name}"] = [float(x) for x in done.stdout.split()[-2:]]
    return {"seconds": found, "failed": {}}


# ---------------------------------------------------------------------------------------------------- measurements


def l2_bytes() -> int:
    """Size of the GPU's last-level cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """GPU seconds of every call, from rounds that run each once, in an order drawn anew."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    begin = perf_counter()
    for round_ in range(200):
        if round_ >= 5 and perf_counter() - begin > seconds * len(calls):
            break
        shuffle(order)
        events = {}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # the GPU waits while the host launches: its own time alone is measured
            start.record()
            calls[name]()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) / 1e3)
    return times


def rates() -> dict[str, float]:
    """What this GPU gives: bytes a second of a copy, multiply-adds a second of a product, exponentials a second."""
    x = torch.empty(1 << 28, device="cuda", dtype=torch.float32).uniform_()
    y = torch.empty_like(x)
    a = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a[0])
    times = interleaved({"copy": lambda: y.copy_(x), "matmul": lambda: torch.matmul(a[0], a[1], out=out)}, 1.0)
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    clock = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 1e6
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "copy bytes/s": 2 * x.nbytes / median(times["copy"]),
        "matmul FLOP/s": 2 * 8192**3 / median(times["matmul"]),
        "exponentials/s": 16 * processors * clock,
        "clock Hz": clock,
    }


def providers(shape: Shape, backward: bool, built: bool) -> dict[str, tuple[torch.dtype, Callable[..., Any], int]]:
    """Name: dtype, function, and how many of q, k, v it takes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    qk: Callable[..., Tensor] = lambda q, k: torch.matmul(q, k.mT)  # noqa: E731
    found: dict[str, tuple[torch.dtype, Callable[..., Any], int]] = {
        "am_flow bf16": (bf16, partial(am_flow, impl="triton"), 2),
        "am_flow fp16": (torch.float16, partial(am_flow, impl="triton"), 2),
        "am_flow fp32": (fp32, partial(am_flow, impl="triton"), 2),
        "SDPA bf16": (bf16, attention, 3),
    }
    if built and fits_cuda(shape.N, shape.D):
        for name in ("am_flow bf16", "am_flow fp16", "am_flow fp32"):
            found[f"{name}, impl='cuda'"] = found[name][0], partial(am_flow, impl="cuda"), 2
    maps = shape.map_flops() / shape.D * 2  # bytes of all maps in float32
    if 6 * maps < MOST_EAGER_BYTES:
        found["eager fp32"] = fp32, eager, 2
    if shape in COMPILED:
        torch.compiler.reset()
        found["torch.compile fp32"] = fp32, torch.compile(eager, fullgraph=True, dynamic=False), 2
    if not backward and maps < MOST_EAGER_BYTES:
        found["q k^T bf16"] = bf16, qk, 2
    if not backward:
        found["SDPA with am_flow bf16"] = bf16, am_flow_attention, 3
    if not backward and importlib.util.find_spec("flash_colreduce"):
        from flash_colreduce import flash_colreduce  # type: ignore[import-not-found]

        column_sums = partial(flash_colreduce, reduction="sum")
        found["flash-colreduce bf16"] = bf16, lambda q, k: column_sums(q.flatten(0, 1), k.flatten(0, 1)), 2
    return found


def timings(shape: Shape, direction: str, speed: dict[str, float], built: bool) -> list[dict[str, Any]]:
    """One row for each provider at a shape, interleaved; inputs in turn, so that none is still in the cache."""
    backward = direction != "forward"
    table = providers(shape, backward, built)
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, (dtype, function, operands) in table.items():
        size = 3 * torch.empty(shape, device="meta", dtype=dtype).nbytes
        sets = cycle(
            [
                [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=backward) for _ in range(3)]
                for _ in range(min(8, 1 + ceil(2 * l2_bytes() / size)))
            ]
        )
        grad = torch.randn(shape.flow() if operands == 2 else shape, device="cuda").to(
            torch.float32 if operands == 2 else dtype
        )

        def call(
            function: Callable[..., Tensor] = function, operands: int = operands, sets: Any = sets, grad: Tensor = grad
        ) -> object:
            inputs = next(sets)[:operands]
            result = function(*inputs)
            return torch.autograd.grad(result, inputs, grad) if backward else result

        try:
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = call()
            torch.cuda.synchronize()
            kept = sum(x.nbytes for x in (results if isinstance(results, tuple) else (results,)))
            memory[name] = torch.cuda.max_memory_allocated() - before - kept
            del results
            calls[name] = call
        except torch.OutOfMemoryError:
            if name.startswith("am_flow"):
                raise
    times = interleaved(calls, SECONDS)
    elements = shape.map_flops() / 2 / shape.D
    passes = 1 if one_pass(shape) else 3
    bounds = {
        "memory": (2 * elements / shape.N * shape.D * 2) / speed["copy bytes/s"],
        "exponentials": (2 if passes == 1 else 5) * elements / speed["exponentials/s"],
        "products": passes * shape.map_flops() / speed["matmul FLOP/s"],
    }
    rows = []
    for name in table:
        row: dict[str, Any] = {"shape": str(shape), "direction": direction, "provider": name}
        if name in times:  # else it ran out of memory
            row |= {"median": median(times[name]), "least": min(times[name]), "rounds": len(times[name])}
            row["bytes"] = memory[name]
        rows.append({**row, "bound": max(bounds.values()), "bounds": bounds})
    return rows


def one_pass(shape: Shape) -> bool:
    """Whether the forward of a shape takes one pass."""
    from amflow_kernels.impl.triton import configs

    return configs.strip(shape.N, shape.D, torch.bfloat16, configs.Device.of(torch.device("cuda"))) is not None


def time_table(rows: list[dict[str, Any]], direction: str) -> Table:
    """Our times, the bound, and the peers' times over ours."""
    chosen = [row for row in rows if row["direction"] == direction]
    names = list(dict.fromkeys(row["provider"] for row in chosen))
    body = []
    for shape in dict.fromkeys(row["shape"] for row in chosen):
        at = {row["provider"]: row for row in chosen if row["shape"] == shape}
        ours = at[names[0]]
        cells = [shape, f"{ours['median'] * 1e6:.0f}"]
        cells.append(f"{ours['bound'] / ours['median']:.0%}" if direction == "forward" else "")
        for name in names[1:]:
            other = at.get(name, {})
            cells.append(f"{other['median'] / ours['median']:.2f}x" if "median" in other else "")
        body.append([*cells, f"{ours['bytes'] / 1e6:.1f}"])
    header = ["(B,T,H,N,D)", "am_flow bf16 us", "bound / time", *names[1:], "MB besides"]
    return Table(f"{direction}: time over that of am_flow bf16", header, body, [])


# --------------------------------------------------------------------------------------------------------- the suite


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of suite.json and suite.md")
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("this needs a GPU that PyTorch can use")
    device = "cuda"
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "explain": str(explain(torch.empty(1, 2, 1, 257, 64, device=device, dtype=torch.bfloat16))),
    }
    print(report["gpu"], report["versions"], flush=True)
    broken = []

    def section(name: str, run: Callable[[], Any]) -> Any:
        begin = perf_counter()
        try:
            report[name] = run()
        except Exception:  # the section failed, whatever the reason: it is told, and the exit status is 1
            report[name] = {"failed": {name: traceback.format_exc()[-3000:]}}
        found = report[name] if isinstance(report[name], dict) else {}
        failed = found.get("failed", {})
        if failed:
            broken.append(name)
        verdict = "FAILED" if failed else "not all run" if found.get("skipped") else "ok"
        print(f"{name}: {verdict}, {perf_counter() - begin:.0f} s {found.get('skipped', '')}", flush=True)
        for problem, reason in list(failed.items())[:20]:
            print(f"  {problem}: {reason}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "suite.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        return report[name]

    built = not section("CUDA library", build_cuda)["failed"]
    impls = ("triton", "cuda") if built else ("triton",)
    section("correctness", lambda: correctness(device, [p for p in problems() if p.impl in impls]))
    section("exactness", lambda: exactness(device, impls))
    section("drop-in", lambda: drop_in(device))
    section("environments", lambda: environments(device))
    section("first call", lambda: first_call(device))
    speed = section("rates", rates)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for direction in ("forward", "forward+backward"):
            found = section(f"{direction} {shape}", partial(timings, shape, direction, speed, built))
            rows += found if isinstance(found, list) else []
    section("sanitizer", lambda: sanitizer(impls))
    tables = [time_table(rows, direction) for direction in dict.fromkeys(row["direction"] for row in rows)]
    lines = [f"# {report['gpu']}", json.dumps(report["versions"]), *(table.markdown() for table in tables)]
    lines.append(f"Failed: {', '.join(broken) or 'nothing'}.")
    (out / "suite.md").write_text("\n\n".join(lines) + "\n")
    print("\n\n".join([*(table.plain() for table in tables), lines[-1]]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
