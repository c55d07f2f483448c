"""Compiles every kernel that the host code would launch for a matrix of problems, without a GPU.

python -m benchmarks.gpu.compile_matrix                      all architectures
python -m benchmarks.gpu.compile_matrix --arch 90 --quick    the part that CI runs

A finding is a kernel that does not compile, that needs more shared memory than the GPU has, or that spills more than
`SPILLS` allows. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from amflow_kernels.impl.triton import launch
from amflow_kernels.impl.triton.saved import saved_sizes
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu import stub_driver
from benchmarks.gpu.stub_driver import SHARED, Architecture, Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (32, 64, 80, 128, 256)
FEATURES = (1, 64, 256)
# Tokens on both sides of every switch between kernels, and between configurations of strips.
TOKENS = (
    *(16, 17, 32, 33, 49, 64, 65, 66, 128, 129, 160, 161, 192, 193, 197, 224, 225, 255, 256, 257, 262, 263),
    *(320, 321, 400, 512, 513, 577, 578, 640),
)
FEW_TOKENS = (65, 197, 257, 400, 577)  # every kind of strip
TILED = 730
# Bytes of stack that kernels may have on any architecture, by kernel, dtype and D. Nothing else may spill.
SPILLS = {
    ("rows", "float32", 256): 16,
    ("weights", "float32", 256): 16,
    ("fwd", "float32", 256): 48,
    ("matmul_q", "bfloat16", 64): 8,
    ("strip", "bfloat16", 64): 56,  # of more than 577 tokens
    ("strip", "float16", 64): 56,
    ("bwd_rows", "bfloat16", 64): 56,  # and the next two: with features; without, the compile report allows none
    ("bwd_dk", "bfloat16", 64): 8,
    ("bwd_dk", "float32", 64): 16,
    ("bwd_dk", "bfloat16", 256): 40,
}


class Task(NamedTuple):
    """A problem, for an architecture."""

    architecture: Architecture
    dtype: str
    D: int
    N: int
    C: int | None = None  # features of the motion operator; None for flow
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        sizes = f"N = {self.N}, D = {self.D}" + ("" if self.C is None else f", C = {self.C}")
        return " ".join([f"{self.architecture} {self.dtype} {sizes}", *(f"{k}={v}" for k, v in self.options)])

    def launches(self) -> list[Launch]:
        """What its forward and backward would launch."""
        q, k, q_b, k_b = torch.empty(4, 1, 3, 2, self.N, self.D, dtype=getattr(torch, self.dtype), device="meta")
        options = dict(self.options)
        pair = options.pop("pair", False)
        if pair:
            options.update(q_b=q_b, k_b=k_b)
        needs = (True, True, pair, pair)
        with stub_driver.machine(self.architecture, compiles=False) as launches:
            if self.C is None:
                problem = Problem(q, k, **options)
                launch.am_flow(problem)
                saved = torch.empty(sum(saved_sizes(problem)), device="meta")
                dflow = torch.empty(problem.flow_shape, device="meta")
                launch.am_flow_backward(problem, dflow, saved, needs)
            else:
                x = torch.empty(1, 2, 2, self.N, self.C, device="meta")
                operator = MatmulProblem(q, k, x=x, **options)
                launch.am_flow_matmul(operator)
                launch.am_flow_matmul_backward(operator, torch.empty_like(x), (*needs, True))
        return launches


def tasks(architectures: list[Architecture], quick: bool) -> Iterator[Task]:
    """All problems. Strips take 16-bit heads of at most 64 columns, and few of their kernels depend on the width."""
    for architecture, dtype in product(architectures, ("bfloat16", "float32") if quick else DTYPES):
        flow = Task(architecture, dtype, 64, TILED)
        if dtype != "float32":
            yield from (flow._replace(N=N) for N in (FEW_TOKENS if quick else TOKENS))
        for D in (64, 256) if quick else WIDTHS:
            yield flow._replace(D=D)
            if D < 64 and dtype != "float32":
                yield from (flow._replace(D=D, N=N) for N in FEW_TOKENS)
        for D, C in [(64, 256)] if quick else product((64, 256), FEATURES):
            yield flow._replace(D=D, C=C, options=(("softmax", True), ("transpose", False)))
        if not quick:
            yield flow._replace(C=64, options=(("softmax", False), ("transpose", True)))
            yield flow._replace(options=(("head_reduction", "mean_map"),))
            for name, value in (("pair", True), ("temperature", 0.1), ("scale", -0.1)):
                yield from (flow._replace(N=N, options=((name, value),)) for N in (257, TILED))


def signature(value: Any) -> Any:
    """Argument values that compile a kernel anew if they differ."""
    if isinstance(value, tuple):
        return tuple(signature(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int):
        return value == 1, value % 16 == 0
    return value if value is None else type(value)


def distinct(each: list[Task]) -> list[tuple[Task, int]]:
    """Every kernel once: a problem, and the number of its launch."""
    found: dict[Any, tuple[Task, int]] = {}
    for task in each:
        for n, one in enumerate(task.launches()):
            key = (task.architecture, one.kernel, signature(one.arguments), tuple(one.options.items()))
            found.setdefault(key, (task, n))
    return list(found.values())


def finding(task: Task, n: int) -> str | None:
    """What is wrong with the kernel of the problem's launch n, or None."""
    one = task.launches()[n]
    where = f"{one.name}, {task}"
    try:
        compiled = stub_driver.compiled_for(task.architecture, one)
        stack = spilled(compiled)
    except Exception as error:  # whatever the compiler raises is a finding
        return f"{where}: {type(error).__name__}: {str(error)[:300]}"
    allowed = SPILLS.get((one.name, task.dtype, task.D), 0)
    return f"{where}: spills {stack} bytes, allowed are {allowed}" if stack > allowed else None


def spilled(compiled: Any) -> int:
    """Bytes of stack of a thread."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size: (\d+)", compiled.asm["amdgcn"])[1])  # type: ignore[index]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.compile_matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names: dict[str, Architecture] = {str(name): name for name in SHARED}
    parser.add_argument("--arch", nargs="+", choices=names, default=list(names), help="90 for sm_90; gfx942")
    parser.add_argument("--quick", action="store_true", help="fewer problems, two dtypes")
    arguments = parser.parse_args()
    kernels = distinct(list(tasks([names[name] for name in arguments.arch], arguments.quick)))
    print(f"{len(kernels)} kernels", flush=True)
    findings = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(finding, *zip(*kernels, strict=True)):
            if result is not None:
                findings.append(result)
                print(result, flush=True)
    print(f"compile matrix: {len(kernels)} kernels, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
