"""Time and memory on a GPU: ours beside PyTorch's attention, then the peers; and what the host adds to it."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_attention, am_flow_matmul
from amflow_kernels.impl.triton import configs
from benchmarks.gpu.checks import Step
from benchmarks.gpu.environments import backend_of
from benchmarks.gpu.machine import Gpu, nvidia_smi
from benchmarks.gpu.problems import BF16, FP16, FP32, Case, fits_cuda
from benchmarks.providers import DIRECTIONS, FORWARD, FORWARD_BACKWARD, attention, eager
from benchmarks.shapes import Shape

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
COMPILED = SHAPES[:1]  # where torch.compile, which takes long to compile, is measured
SMALL = (Shape(1, 4, 2, 257, 64), Shape(1, 4, 2, 577, 64))  # the host takes longer than the GPU
FEATURES = (1, 64, 256)  # columns of x
WITH_FEATURES = Shape(2, 16, 12, 257, 64)
KINDS: dict[str, dict[str, bool]] = {
    "M x": {},
    "M^T x": {"transpose": True},
    "P x": {"softmax": True},
    "P^T x": {"transpose": True, "softmax": True},
}
DRY_TOKENS = 577  # largest of a dry run
SECONDS = 0.35  # for the rounds of one provider at one shape
MIN_ROUNDS, MAX_ROUNDS = 5, 200
CALLS = 50  # that are launched one after the other to time the host
MAX_EAGER_BYTES = 30e9  # of maps, of which eager PyTorch makes about six
CLOCK = 1.98e9  # of an H100, where nvidia-smi does not tell

FIRST_CALL = """
from time import perf_counter
import torch
from amflow_kernels import am_flow
q, k = torch.randn(2, 1, 4, 12, 257, 64, device="cuda", dtype=torch.bfloat16).requires_grad_().unbind()
torch.cuda.synchronize()
begin = perf_counter()
flow = am_flow(q, k)
torch.cuda.synchronize()
forward = perf_counter()
flow.sum().backward()
torch.cuda.synchronize()
print(forward - begin, perf_counter() - forward)
"""


def cases(dry: bool) -> list[Case]:
    """The problems whose kernels are timed; those of a dry run are small."""
    clips = [_case(shape, dtype) for shape in _sized(SHAPES, dry) for dtype in (BF16, FP16, FP32)]
    clips += [_case(shape, BF16) for shape in _sized(SMALL, dry)]
    (shape,) = _sized([WITH_FEATURES], dry)
    return clips + [_case(shape, BF16, features=C, options=kind) for C in FEATURES for kind in KINDS.values()]


def _case(shape: Shape, dtype: torch.dtype, **options: Any) -> Case:
    return Case((shape.N, shape.N), shape.D, shape.B, shape.T, (shape.H,), dtype, **options)


def _sized(shapes: Sequence[Shape], dry: bool) -> list[Shape]:
    """The shapes, or small ones of as many tokens for a dry run."""
    small = [shape._replace(B=1, T=min(shape.T, 3), H=1) for shape in shapes if shape.N <= DRY_TOKENS]
    return small if dry else list(shapes)


class Peer(NamedTuple):
    """One function that is measured, and how many of q, k, v it takes."""

    dtype: torch.dtype
    function: Callable[..., Any]
    operands: int = 2


def times(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """The library beside PyTorch's attention, then what the host adds, then the motion operator."""
    speed: dict[str, float] = {}
    yield "rates", partial(_rates, machine, speed)
    for shape, direction in product(_sized(SHAPES, machine.dry), DIRECTIONS):
        yield f"{direction} {shape}", partial(_beside_attention, machine, shape, direction, speed, impls)
    for shape in _sized(SMALL, machine.dry):
        yield f"host {shape}", partial(_host, machine, shape)
    (shape,) = _sized([WITH_FEATURES], machine.dry)
    for C, direction in product(FEATURES, DIRECTIONS):
        yield f"am_flow_matmul {direction}, C = {C}", partial(_matmul, machine, shape, direction, C)


def peers(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """Everything else that one could call instead; a peer that fails has a reason in place of figures."""
    for shape, direction in product(_sized(SHAPES, machine.dry), DIRECTIONS):
        table = _peers(machine, shape, direction)
        yield f"peers {direction} {shape}", partial(_measured, machine, table, shape, direction, {})
    yield "first call", partial(first_call, machine)


def first_call(machine: Gpu) -> dict[str, Any]:
    """Seconds of the first forward and backward of a fresh process: with nothing compiled yet, and once again."""
    if machine.dry:
        return {"skipped": "a dry run"}
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("compiles", "from Triton's own cache"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-c", FIRST_CALL]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds[name] = [float(x) for x in done.stdout.split()[-2:]]
    return {"seconds": seconds}


def interleaved(machine: Gpu, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """GPU seconds of every call, from rounds that run each once in a new random order."""
    for call in calls.values():
        for _ in range(1 if machine.dry else 3):
            call()
    machine.synchronize()
    seconds_of: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = perf_counter()
    for round_ in range(1 if machine.dry else MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and perf_counter() - start > seconds * len(calls):
            break
        shuffle(order)
        clocks = {name: machine.clock(calls[name]) for name in order}
        machine.synchronize()
        for name, read in clocks.items():
            seconds_of[name].append(read())
    return seconds_of


def _rates(machine: Gpu, speed: dict[str, float]) -> dict[str, Any]:
    """What this GPU reaches: bytes a second of a copy, FLOP a second of a product, exponentials a second."""
    n = 64 if machine.dry else 8192
    x = torch.empty(4 * n * n, device=machine.device).uniform_()
    y = torch.empty_like(x)
    a = torch.randn(2, n, n, device=machine.device, dtype=BF16)
    out = torch.empty_like(a[0])
    took = interleaved(machine, {"copy": lambda: y.copy_(x), "matmul": lambda: torch.matmul(a[0], a[1], out=out)}, 1.0)
    clock = nvidia_smi("clocks.max.sm")
    speed |= {
        "copy bytes/s": 2 * x.nbytes / median(took["copy"]),
        "matmul FLOP/s": 2 * n**3 / median(took["matmul"]),
        "exponentials/s": 16 * machine.launch_device().processors * (float(clock) * 1e6 if clock.isdigit() else CLOCK),
    }
    return {"rates": speed, "clock": clock}


def _beside_attention(
    machine: Gpu, shape: Shape, direction: str, speed: dict[str, float], impls: Sequence[str]
) -> dict[str, Any]:
    dtypes = {"am_flow bf16": BF16, "am_flow fp16": FP16, "am_flow fp32": FP32}
    table = {name: Peer(dtype, partial(am_flow, impl="triton")) for name, dtype in dtypes.items()}
    table["SDPA bf16"] = Peer(BF16, attention, 3)
    table["am_flow_attention bf16"] = Peer(BF16, partial(am_flow_attention, impl="triton"), 3)
    if "cuda" in impls and fits_cuda(shape.N, shape.N, shape.D):
        cuda = partial(am_flow, impl="cuda")
        table |= {f"{name}, impl='cuda'": Peer(dtype, cuda) for name, dtype in dtypes.items()}
    backend = backend_of(machine, shape.N, BF16)
    return {"SDPA's backend": backend, **_measured(machine, table, shape, direction, speed)}


def _peers(machine: Gpu, shape: Shape, direction: str) -> dict[str, Peer]:
    """By name. The first is what the others are compared with."""
    table = {"am_flow bf16": Peer(BF16, partial(am_flow, impl="triton"))}
    maps = shape.map_flops() / shape.D * 2  # bytes of all maps in float32
    if 6 * maps < MAX_EAGER_BYTES:
        table["eager fp32"] = Peer(FP32, eager)
    if shape in COMPILED or machine.dry:
        table["torch.compile fp32"] = Peer(FP32, machine.compiled(eager, dynamic=False))
    if direction != FORWARD:
        return table
    if maps < MAX_EAGER_BYTES:
        table["q k^T bf16"] = Peer(BF16, lambda q, k: torch.matmul(q, k.mT))
    if importlib.util.find_spec("flash_colreduce"):
        table["flash-colreduce bf16"] = Peer(BF16, _flash_colreduce)
    return table


def _flash_colreduce(q: Tensor, k: Tensor) -> Tensor:
    from flash_colreduce import flash_colreduce  # type: ignore[import-not-found]

    column_sums: Tensor = flash_colreduce(q.flatten(0, 1), k.flatten(0, 1), reduction="sum")
    return column_sums


def _measured(
    machine: Gpu, table: dict[str, Peer], shape: Shape, direction: str, speed: dict[str, float]
) -> dict[str, Any]:
    """One row for each entry of the table, from interleaved rounds; one that fails has the reason for figures."""
    backward = direction == FORWARD_BACKWARD
    torch.compiler.reset()
    calls: dict[str, Callable[[], Any]] = {}
    extra: dict[str, dict[str, Any]] = {}
    wrong = {}
    for name, peer in table.items():
        call = _call(machine, peer, shape, backward)
        try:
            call()  # compiles
            extra[name] = {"bytes": machine.peak_bytes(call)}
            calls[name] = call
        except Exception as error:  # a peer must not cost the others their figures
            extra[name] = {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
            if machine.broken():
                raise
            if name.startswith("am_flow"):
                wrong[name] = extra[name]["reason"]
    took = interleaved(machine, calls, SECONDS)
    limits = {} if backward or not speed else bounds(machine, shape, speed)
    rows = []
    for name in table:
        row: dict[str, Any] = {"shape": str(shape), "direction": direction, "provider": name, **extra[name]}
        if name in took:
            row |= {"median": median(took[name]), "least": min(took[name]), "rounds": len(took[name])}
        rows.append({**row, "bound": max(limits.values(), default=None), "bounds": limits})
    reasons = {name: each["reason"] for name, each in extra.items() if "reason" in each}
    return {"rows": rows, "no figures": reasons, "wrong": wrong}


def _call(machine: Gpu, peer: Peer, shape: Shape, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A call on the next of several sets of inputs, enough of them that none stays in the cache until its next use."""
    inputs = _rotation(machine, shape, peer.dtype, backward)
    given: list[Tensor] = []  # gradients of the results, made once

    def call() -> tuple[Tensor, ...]:
        operands = next(inputs)[: peer.operands]
        result = peer.function(*operands)
        results = result if isinstance(result, tuple) else (result,)
        if not backward:
            return results
        if not given:
            given.extend(torch.randn_like(x) for x in results)
        return torch.autograd.grad(results, operands, given)

    return call


def _rotation(machine: Gpu, shape: Shape, dtype: torch.dtype, backward: bool) -> Iterator[list[Tensor]]:
    size = 3 * torch.empty(shape, device="meta", dtype=dtype).nbytes
    sets = min(8, 1 + ceil(2 * machine.cache_bytes() / size))
    return cycle(
        [
            [torch.randn(shape, device=machine.device, dtype=dtype, requires_grad=backward) for _ in range(3)]
            for _ in range(sets)
        ]
    )


def _host(machine: Gpu, shape: Shape) -> dict[str, Any]:
    """Microseconds of a call: until the host is through with it, and until the GPU is, without and with a graph."""
    q, k = (torch.randn(shape, device=machine.device, dtype=BF16, requires_grad=True) for _ in range(2))
    dflow = torch.randn(shape.flow(), device=machine.device)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (am_flow(q, k, impl="triton"),)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(am_flow(q, k, impl="triton"), (q, k), dflow)

    figures = {}
    for name, call in (("forward", forward), ("forward+backward", both)):
        call()
        host, total = _per_call(machine, call)
        _, replay = machine.captured(call)
        _, replayed = _per_call(machine, replay)
        figures[name] = {"host us": host * 1e6, "us": total * 1e6, "us by graph": replayed * 1e6}
    return {"calls": figures}


def _per_call(machine: Gpu, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call among many: until all were launched, until all had run. The least of three tries."""
    tries = []
    for _ in range(3):
        machine.synchronize()
        begin = perf_counter()
        for _ in range(CALLS):
            call()
        launched = perf_counter()
        machine.synchronize()
        tries.append((perf_counter() - begin, launched - begin))
    total, host = min(tries)
    return host / CALLS, total / CALLS


def _matmul(machine: Gpu, shape: Shape, direction: str, C: int) -> dict[str, Any]:
    """The motion operator and its transpose, of M and of P, at one number of columns."""
    q, k = (torch.randn(shape, device=machine.device, dtype=BF16, requires_grad=True) for _ in range(2))
    x = torch.randn(*shape.flow(), C, device=machine.device, requires_grad=True)
    dy = torch.randn_like(x)

    def call(options: dict[str, bool]) -> tuple[Tensor, ...]:
        y = am_flow_matmul(q, k, x, impl="triton", **options)
        return torch.autograd.grad(y, (q, k, x), dy) if direction == FORWARD_BACKWARD else (y.detach(),)

    calls: dict[str, Callable[[], object]] = {name: partial(call, options) for name, options in KINDS.items()}
    took = interleaved(machine, calls, SECONDS / 2)
    return {"shape": str(shape), "seconds": {name: median(took[name]) for name in KINDS}}


def bounds(machine: Gpu, shape: Shape, speed: dict[str, float]) -> dict[str, float]:
    """Seconds below which no forward of this shape can be, by each of the GPU's rates."""
    elements = shape.map_flops() / 2 / shape.D
    one_pass = configs.strip(shape.N, shape.D, BF16, machine.launch_device()) is not None
    return {
        "memory": (2 * elements / shape.N * shape.D * 2) / speed["copy bytes/s"],
        "exponentials": (2 if one_pass else 5) * elements / speed["exponentials/s"],
        "products": (1 if one_pass else 3) * shape.map_flops() / speed["matmul FLOP/s"],
    }
