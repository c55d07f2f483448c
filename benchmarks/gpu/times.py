"""Time and memory on a GPU: of the first call of a process, and of `am_flow` compared with its peers."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_attention
from amflow_kernels.impl.triton import configs
from benchmarks.gpu.checks import fits_cuda
from benchmarks.providers import FORWARD, attention, eager
from benchmarks.shapes import Shape
from benchmarks.tables import Table

ROOT = Path(__file__).resolve().parents[2]

# The clip of the bounds in docs/triton_report.md, then the same model at other resolutions, and few frames.
SHAPES = (
    Shape(8, 16, 12, 257, 64),
    Shape(8, 16, 12, 197, 64),
    Shape(2, 16, 12, 577, 64),
    Shape(1, 8, 12, 1370, 64),
    Shape(1, 4, 12, 4096, 64),
    Shape(1, 2, 12, 257, 64),
)
COMPILED = SHAPES[:2]  # where torch.compile, which takes long to compile, is measured
SECONDS = 0.7  # for the rounds of one provider at one shape
MIN_ROUNDS, MAX_ROUNDS = 5, 200
MAX_EAGER_BYTES = 30e9  # of maps, of which eager PyTorch makes about six

FIRST_CALL = """
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


def first_call() -> dict[str, Any]:
    """Seconds of the first forward and backward of a fresh process: with nothing compiled yet, and once again."""
    seconds = {}
    for N in (257, 577):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("compiles", "from the cache"):
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache}
                command = [sys.executable, "-c", FIRST_CALL.format(N=N)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=150)
                seconds[f"N = {N}, {name}"] = [float(x) for x in done.stdout.split()[-2:]]
    return {"seconds": seconds, "failed": {}}


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """GPU seconds of every call, from rounds that run each once in a new random order."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = perf_counter()
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and perf_counter() - start > seconds * len(calls):
            break
        shuffle(order)
        events = {name: _timed(calls[name]) for name in order}
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def _timed(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the GPU waits while the host launches, so that only GPU time is measured
    begin.record()
    call()
    end.record()
    return begin, end


def rates() -> dict[str, float]:
    """What this GPU reaches: bytes a second of a copy, FLOP a second of a product, exponentials a second."""
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


class Peer(NamedTuple):
    """One function that is measured, and how many of q, k, v it takes."""

    dtype: torch.dtype
    function: Callable[..., Any]
    operands: int = 2


def peers(shape: Shape, backward: bool, built: bool) -> dict[str, Peer]:
    """By name. The first is what the others are compared with; `built` says whether the CUDA kernels are there."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    ours = {"am_flow bf16": bf16, "am_flow fp16": fp16, "am_flow fp32": fp32}
    table = {name: Peer(dtype, partial(am_flow, impl="triton")) for name, dtype in ours.items()}
    table["SDPA bf16"] = Peer(bf16, attention, 3)
    if built and fits_cuda(shape.N, shape.N, shape.D):
        table |= {f"{name}, impl='cuda'": Peer(dtype, partial(am_flow, impl="cuda")) for name, dtype in ours.items()}
    maps = shape.map_flops() / shape.D * 2  # bytes of all maps in float32
    if 6 * maps < MAX_EAGER_BYTES:
        table["eager fp32"] = Peer(fp32, eager)
    if shape in COMPILED:
        torch.compiler.reset()
        table["torch.compile fp32"] = Peer(fp32, torch.compile(eager, fullgraph=True, dynamic=False))
    return table if backward else table | _forward_peers(maps)


def _forward_peers(maps: float) -> dict[str, Peer]:
    """Those that are measured in the forward only; `maps` is the bytes of all maps in float32."""
    bf16 = torch.bfloat16
    table = {}
    if maps < MAX_EAGER_BYTES:
        table["q k^T bf16"] = Peer(bf16, lambda q, k: torch.matmul(q, k.mT))
    table["SDPA with am_flow bf16"] = Peer(bf16, am_flow_attention, 3)
    if importlib.util.find_spec("flash_colreduce"):
        from flash_colreduce import flash_colreduce  # type: ignore[import-not-found]

        column_sums = partial(flash_colreduce, reduction="sum")
        table["flash-colreduce bf16"] = Peer(bf16, lambda q, k: column_sums(q.flatten(0, 1), k.flatten(0, 1)))
    return table


def timings(shape: Shape, direction: str, speed: dict[str, float], built: bool) -> list[dict[str, Any]]:
    """One row for each peer at a shape, from interleaved rounds; a peer that runs out of memory has no figures."""
    table = peers(shape, direction != FORWARD, built)
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, peer in table.items():
        call = _call(peer, shape, direction != FORWARD)
        try:
            memory[name] = _peak_bytes(call)
            calls[name] = call
        except torch.OutOfMemoryError:
            if name.startswith("am_flow"):
                raise
    times = interleaved(calls, SECONDS)
    limits = bounds(shape, speed)
    rows = []
    for name in table:
        row: dict[str, Any] = {"shape": str(shape), "direction": direction, "provider": name}
        if name in times:
            row |= {"median": median(times[name]), "least": min(times[name]), "rounds": len(times[name])}
            row["bytes"] = memory[name]
        rows.append({**row, "bound": max(limits.values()), "bounds": limits})
    return rows


def _call(peer: Peer, shape: Shape, backward: bool) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """A call on the next of several sets of inputs, enough of them that none stays in the cache until its next use."""
    inputs = _rotation(shape, peer.dtype, backward)
    flow = peer.operands == 2
    dtype = torch.float32 if flow else peer.dtype
    grad = torch.randn(shape.flow() if flow else shape, device="cuda").to(dtype)

    def call() -> Tensor | tuple[Tensor, ...]:
        operands = next(inputs)[: peer.operands]
        result = peer.function(*operands)
        return torch.autograd.grad(result, operands, grad) if backward else result

    return call


def _rotation(shape: Shape, dtype: torch.dtype, backward: bool) -> Iterator[list[Tensor]]:
    size = 3 * torch.empty(shape, device="meta", dtype=dtype).nbytes
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    sets = min(8, 1 + ceil(2 * cache / size))
    return cycle(
        [
            [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=backward) for _ in range(3)]
            for _ in range(sets)
        ]
    )


def _peak_bytes(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> int:
    """Peak memory of a call besides its inputs and results, after a first call that compiles."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    kept = sum(x.nbytes for x in (results if isinstance(results, tuple) else (results,)))
    return torch.cuda.max_memory_allocated() - before - kept


def bounds(shape: Shape, speed: dict[str, float]) -> dict[str, float]:
    """Seconds below which no forward of this shape can be, by each of the GPU's rates."""
    elements = shape.map_flops() / 2 / shape.D
    device = configs.Device.of(torch.device("cuda"))
    one_pass = configs.strip(shape.N, shape.D, torch.bfloat16, device) is not None
    return {
        "memory": (2 * elements / shape.N * shape.D * 2) / speed["copy bytes/s"],
        "exponentials": (2 if one_pass else 5) * elements / speed["exponentials/s"],
        "products": (1 if one_pass else 3) * shape.map_flops() / speed["matmul FLOP/s"],
    }


def time_table(rows: list[dict[str, Any]], direction: str) -> Table:
    """Times of am_flow, the bound, and the peers' times over those of am_flow."""
    chosen = [row for row in rows if row["direction"] == direction]
    names = list(dict.fromkeys(row["provider"] for row in chosen))
    body = []
    for shape in dict.fromkeys(row["shape"] for row in chosen):
        by_name = {row["provider"]: row for row in chosen if row["shape"] == shape}
        ours = by_name[names[0]]
        cells = [shape, f"{ours['median'] * 1e6:.0f}"]
        cells.append(f"{ours['bound'] / ours['median']:.0%}" if direction == FORWARD else "")
        for name in names[1:]:
            other = by_name.get(name, {})
            cells.append(f"{other['median'] / ours['median']:.2f}x" if "median" in other else "")
        body.append([*cells, f"{ours['bytes'] / 1e6:.1f}"])
    header = ["(B,T,H,N,D)", "am_flow bf16 us", "bound / time", *names[1:], "working memory MB"]
    return Table(f"{direction}: time over that of am_flow bf16", header, body, [])
