"""compute-sanitizer on small problems: accesses out of bounds, races in shared memory, missed barriers."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from time import monotonic
from typing import Any

import torch

from amflow_kernels import testing as tt
from benchmarks.gpu.checks import Step
from benchmarks.gpu.kernel_cache import install
from benchmarks.gpu.machine import Gpu, NoGpu
from benchmarks.gpu.problems import BF16, FP16, FP32, Case

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 50  # of all tools, which run at once
CASES = [
    Case((N, N), head, groups=(1,), dtype=dtype, layout=layout)
    for N, head, dtype, layout in (
        (49, 64, BF16, "contiguous"),
        (197, 64, BF16, "contiguous"),
        (197, 64, BF16, "offset"),
        (257, 64, FP16, "offset"),
        (90, 17, FP32, "offset"),
    )
]
FOUND = 7  # the tool's exit status


def sanitizer(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """All tools at once, each on every implementation: they are slow, and the GPU has room."""
    yield "sanitizer", partial(_sanitize, machine, impls)


def _sanitize(machine: Gpu, impls: Sequence[str]) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None and not machine.dry:
        return {"skipped": "compute-sanitizer is not installed"}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    runs = {}
    for impl, kind in product(impls, TOOLS[:1] if machine.dry else TOOLS):
        checked = [] if machine.dry else [str(tool), "--tool", kind, "--error-exitcode", str(FOUND)]
        command = [*checked, sys.executable, "-m", __name__, impl, machine.device]
        runs[f"{kind} of {impl}"] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    end = monotonic() + SECONDS
    wrong, slow = {}, []
    for name, process in runs.items():
        try:
            output, _ = process.communicate(timeout=max(0, end - monotonic()))
        except subprocess.TimeoutExpired:
            slow.append(name)
            continue
        if process.returncode:
            wrong[name] = f"status {process.returncode}: {output[-1500:]}"
    for process in runs.values():
        process.kill()
    return {"wrong": wrong, **({"skipped": f"not through in time: {', '.join(slow)}"} if slow else {})}


def main() -> None:
    """The problems that a tool watches."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitizer", description=__doc__)
    parser.add_argument("impl", help="the implementation that runs")
    parser.add_argument("device", help="where: cuda, or cpu without a GPU")
    args = parser.parse_args()
    impl, device = args.impl, args.device
    lookups = install()
    machine = Gpu(lookups) if device == Gpu.device else NoGpu(lookups)
    with machine.ready():
        for case in CASES:
            problem: Any = case.problem(device)
            inputs = [x.requires_grad_() for x in tt.inputs_of(problem)]
            flow = tt.run(tt.with_inputs(problem, inputs), impl)
            torch.autograd.grad(flow, inputs, torch.randn_like(flow))
        machine.synchronize()


if __name__ == "__main__":
    main()
