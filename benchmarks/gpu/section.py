"""One section of the GPU suite, in this process: python -m benchmarks.gpu.section NAME RECORDS [--dry-run] [--cuda].

Every step adds two lines of JSON to the file RECORDS, one before it runs and one after. Steps that are in it already
are not run again, so that the suite can go on after a step that took this process with it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu import checks, environments, kernel_cache, plan, problems, sanitizer, stub_driver, times
from benchmarks.gpu.checks import Step
from benchmarks.gpu.machine import Gpu, NoGpu
from benchmarks.gpu.report import append, read

BROKEN = 70  # exit status: the GPU is lost to this process, but not to the next

Steps = Callable[[Gpu, Sequence[str]], Iterator[Step]]


def kernels(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """The machine, and every kernel compiled: from the archive, or else by all processors."""
    yield "machine", machine.describe
    if not machine.dry:
        yield "archive", _unpack
    yield "kernels", partial(_compile, machine)
    if machine.dry:
        yield "launch", _launch_from_cache


def _unpack() -> dict[str, Any]:
    packed = kernel_cache.unpack()
    return {"packed": packed} if packed else {"finding": f"there is no {kernel_cache.ARCHIVE}"}


def _compile(machine: Gpu) -> dict[str, Any]:
    """Every kernel that this machine does not have yet. A dry run compiles those of one problem."""
    device, architecture = machine.launch_device(), machine.architecture()
    jobs = list(plan.needed(plan.cases(dry=machine.dry), device, architecture))
    missing = [(case, kernel) for case, kernel in jobs if not kernel.is_compiled()]
    found: dict[str, Any] = {"needed": len(jobs), "missing": len(missing)}
    if len(missing) == len(jobs):
        found["finding"] = f"none was compiled beforehand for {kernel_cache.versions()}"
    if machine.dry:
        missing = [(case, kernel) for case, kernel in missing if case == checks.SMOKE[0]]
    failed = plan.fill(missing, device, architecture, os.cpu_count() or 1) if missing else {}
    return {**found, "error": str(failed)} if failed else found


def _launch_from_cache() -> dict[str, Any]:
    """Kernels that `_compile` put into the cache are found there by a launch as on a GPU: the keys are the same."""
    lookups = kernel_cache.install()
    with stub_driver.machine(problems.H100.sm) as launches:
        plan.launch_all(checks.SMOKE[0], problems.H100)
    error = {"error": f"compiled again: {lookups.misses}"} if lookups.misses or not lookups.hits else {}
    return {"launched": [launch.kernel for launch in launches], "from the cache": lookups.hits, **error}


SECTIONS: dict[str, Steps] = {
    "kernels": kernels,
    "smoke": checks.smoke,
    "times": times.times,
    "correctness": checks.correctness,
    "exactness": checks.exactness,
    "environments": environments.environments,
    "log-sum-exps": environments.log_sum_exps,
    "peers": times.peers,
    "sanitizer": sanitizer.sanitizer,
}


def run(steps: Iterator[Step], records: Path, machine: Gpu) -> int:
    """Run the steps that are not in the records yet; gives the process's exit status."""
    done = {record["step"] for record in read(records)}
    for name, step in steps:
        if name in done:
            continue
        append(records, {"step": name, "begins": True})
        start = perf_counter()
        try:
            result = step()
            machine.synchronize()  # so that an error of the GPU is this step's
        except Exception:  # whatever the reason, it costs this step only
            result = {"error": traceback.format_exc()[-2000:]}
        if machine.dry:
            result.pop("wrong", None)  # nothing was computed
        append(records, {"step": name, **result, "seconds": round(perf_counter() - start, 3)})
        if "error" in result and machine.broken():
            return BROKEN
    append(records, {"step": "compiled here", **machine.looked_up()})
    return 0


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.section", description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("records", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--cuda", action="store_true", help="the CUDA library is built: check it, too")
    arguments = parser.parse_args()
    # cuBLAS is deterministic only so, and `poison_allocations` asks PyTorch for deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    lookups = kernel_cache.install()
    machine = NoGpu(lookups) if arguments.dry_run else Gpu(lookups)
    impls = ("triton", "cuda") if arguments.cuda else ("triton",)
    steps = SECTIONS[arguments.name](machine, impls)
    if arguments.name in ("kernels", "sanitizer"):  # they launch nothing in this process
        return run(steps, arguments.records, machine)
    with machine.ready():
        if isinstance(machine, NoGpu):
            for case in plan.cases(dry=True):
                plan.launch_all(case, machine.launch_device())
            machine.recorded.clear()  # Triton knows these kernels now: what is recorded from here on is not in the plan
        return run(steps, arguments.records, machine)


if __name__ == "__main__":
    sys.exit(main())
