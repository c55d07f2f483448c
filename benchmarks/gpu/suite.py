"""Everything that only a GPU can show, in one command: correctness, sanitizer, graphs, first call, times, memory.

python -m benchmarks.gpu.suite --out results    runs from the bare tree; writes suite.json and suite.md

Not yet run on a GPU; planned to take under 10 minutes. Every section reports for itself, so that one failure hides no
other. The exit status is 1 if a check failed or a section raised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton

from amflow_kernels import explain
from benchmarks.gpu import checks, times
from benchmarks.providers import DIRECTIONS

DEVICE = "cuda"
MAX_FAILURES = 20  # printed of a section; the file has them all


class Suite:
    """The sections that ran so far. The report is written after each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed: list[str] = []
        self.report: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "explain": str(explain(torch.empty(1, 2, 1, 257, 64, device=DEVICE, dtype=torch.bfloat16))),
        }
        print(self.report["gpu"], self.report["versions"], flush=True)

    def section(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a section and report it, also if it raises."""
        start = perf_counter()
        try:
            result = run()
        except Exception:  # whatever the reason, the section is reported as failed, and the exit status is 1
            result = {"failed": {name: traceback.format_exc()[-3000:]}}
        self.report[name] = result
        failed, skipped = (result.get(key) if isinstance(result, dict) else None for key in ("failed", "skipped"))
        if failed:
            self.failed.append(name)
        verdict = "FAILED" if failed else "not all run" if skipped else "ok"
        print(f"{name}: {verdict}, {perf_counter() - start:.0f} s {skipped or ''}", flush=True)
        for case, reason in list((failed or {}).items())[:MAX_FAILURES]:
            print(f"  {case}: {reason}", flush=True)
        self._write("suite.json", json.dumps(self.report, indent=1, default=str) + "\n")
        return result

    def summarise(self, rows: list[dict[str, Any]]) -> None:
        """Print the tables of times, and write them as a page."""
        tables = [times.time_table(rows, direction) for direction in dict.fromkeys(row["direction"] for row in rows)]
        verdict = f"Failed: {', '.join(self.failed) or 'nothing'}."
        head = [f"# {self.report['gpu']}", json.dumps(self.report["versions"])]
        self._write("suite.md", "\n\n".join([*head, *(table.markdown() for table in tables), verdict]) + "\n")
        print("\n\n".join([*(table.plain() for table in tables), verdict]))

    def _write(self, name: str, text: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_text(text)


def run(suite: Suite) -> None:
    """All sections, checks before times."""
    built = not suite.section("CUDA library", checks.build_cuda)["failed"]
    impls = ("triton", "cuda") if built else ("triton",)
    cases = [case for case in checks.cases() if case.impl in impls]
    suite.section("correctness", lambda: checks.correctness(DEVICE, cases))
    suite.section("exactness", lambda: checks.exactness(DEVICE, impls))
    suite.section("drop-in", lambda: checks.drop_in(DEVICE))
    suite.section("environments", lambda: checks.environments(DEVICE))
    suite.section("first call", times.first_call)
    speed = suite.section("rates", times.rates)
    rows: list[dict[str, Any]] = []
    for shape in times.SHAPES:
        for direction in DIRECTIONS:
            measured = suite.section(f"{direction} {shape}", partial(times.timings, shape, direction, speed, built))
            rows += measured if isinstance(measured, list) else []
    suite.section("sanitizer", lambda: checks.sanitizer(impls))
    suite.summarise(rows)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of suite.json and suite.md")
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("this needs a GPU that PyTorch can use")
    # cuBLAS is deterministic only so, and `poison_allocations` asks PyTorch for deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    suite = Suite(out)
    run(suite)
    return 1 if suite.failed else 0


if __name__ == "__main__":
    sys.exit(main())
