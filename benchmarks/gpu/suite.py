"""Everything that only a GPU can show, in one command of at most eight minutes.

python -m benchmarks.gpu.suite --out results    runs from the bare tree; writes suite.json and suite.md
python -m benchmarks.gpu.suite --dry-run        makes all the calls on a machine without a GPU, and compares nothing

Not yet run on a GPU. Each section runs in a process of its own until its deadline; results are written and printed
after each. A step that takes its process with it is recorded as failed, and the section goes on with the next step. The
exit status is 1 if anything is wrong or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from benchmarks.gpu.report import append, failures, read, tables

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 480  # seconds, with the ends of processes
BUDGETS = {  # seconds of each section, in their order
    "kernels": 75,
    "smoke": 45,
    "times": 70,
    "correctness": 75,
    "exactness": 40,
    "environments": 45,
    "log-sum-exps": 25,
    "peers": 40,
    "sanitizer": 60,
}
DRY_BUDGET = 240
KILL = 2  # seconds that the end of a process may take
SHOWN = 20  # findings of a section that are printed; the file has them all
NOT_PRINTED = ("step", "seconds", "wrong", "error", "skipped", "rows")
LONGEST = 600  # characters of a step's figures that are printed
BUILD = """
import sys
from amflow_kernels.dispatch import IMPLEMENTATIONS
sys.exit(IMPLEMENTATIONS["cuda"].unavailable())
"""


class Ended(NamedTuple):
    """How a process ended; without a status, it was killed at its deadline."""

    status: int | None
    output: str


def run_until(command: list[str], log: Path, deadline: float) -> Ended:
    """Run a command in a process group of its own and end all of that at the deadline."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(max(0.0, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    return Ended(status, log.read_text(errors="replace")[-2000:])


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(KILL)
    except subprocess.TimeoutExpired:  # stuck in the driver: the suite goes on without it
        print(f"process {process.pid} does not end", flush=True)


def finish(command: list[str], records: Path, log: Path, deadline: float) -> dict[str, str]:
    """Run a section's process, and again after each step that takes it along; gives what is not in the records."""
    while True:
        before = len(read(records))
        ended = run_until(command, log, deadline)
        if ended.status == 0:
            return {}
        late = ended.status is None
        reason = "did not end before the deadline" if late else f"exit status {ended.status}: {ended.output}"
        written = read(records)
        running = written[-1]["step"] if written and "begins" in written[-1] else None
        if running is not None:
            append(records, {"step": running, "error": reason})
        if late:
            return {"deadline": "the steps after this one did not run"}
        if len(written) == before:
            return {"process": reason}


class Suite:
    """The sections that ran so far. The report is written after each."""

    def __init__(self, out: Path, work: Path = ROOT / "build" / "gpu_suite") -> None:
        self.out = out
        self.work = work  # of records and logs: the report holds all that matters of them
        self.report: dict[str, dict[str, Any]] = {}
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)

    def section(self, name: str, options: list[str], budget: float) -> None:
        """Run a section to its end, in as many processes as that takes, and report it."""
        start = monotonic()
        records = self.work / f"{name}.jsonl"
        records.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.section", name, str(records), *options]
        ended = finish(command, records, self.work / f"{name}.log", start + budget)
        steps = {record["step"]: record for record in read(records) if "begins" not in record}
        self.report[name] = {
            "seconds": round(monotonic() - start, 1),
            "failed": {**failures(steps), **ended},
            "skipped": {step: record["skipped"] for step, record in steps.items() if record.get("skipped")},
            "steps": steps,
        }
        self._print(name)
        self._write()

    def failed(self) -> list[str]:
        """The sections in which anything is wrong or did not run."""
        return [name for name, section in self.report.items() if section["failed"]]

    def _print(self, name: str) -> None:
        section = self.report[name]
        verdict = "FAILED" if section["failed"] else "not all run" if section["skipped"] else "ok"
        print(f"{name}: {verdict}, {len(section['steps'])} steps, {section['seconds']:.0f} s", flush=True)
        for step, reason in [*section["failed"].items(), *section["skipped"].items()][:SHOWN]:
            print(f"  {step}: {reason}", flush=True)
        for step, record in section["steps"].items():
            figures = {key: value for key, value in record.items() if key not in NOT_PRINTED and value}
            if figures:
                print(f"  {step}: {json.dumps(figures)[:LONGEST]}", flush=True)
        for table in tables(section["steps"]):
            print(f"\n{table.plain()}\n", flush=True)

    def _write(self) -> None:
        (self.out / "suite.json").write_text(json.dumps(self.report, indent=1) + "\n")
        lines = ["# The GPU suite"]
        for name, section in self.report.items():
            lines.append(f"## {name}")
            lines += [f"- {step}: FAILED: {reason}" for step, reason in section["failed"].items()]
            lines += [f"- {step}: not run: {reason}" for step, reason in section["skipped"].items()]
            lines += [table.markdown() for table in tables(section["steps"])]
        (self.out / "suite.md").write_text("\n\n".join(lines) + "\n")


def run(suite: Suite, dry: bool) -> None:
    """All sections; each has its budget, and no more than is left of the total."""
    start = monotonic()
    if dry:
        for name in BUDGETS:
            suite.section(name, ["--dry-run", "--cuda"], DRY_BUDGET)
        return
    with (suite.work / "build.log").open("w") as log:
        build = subprocess.Popen(
            [sys.executable, "-c", BUILD], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    first, *others = BUDGETS
    suite.section(first, [], BUDGETS[first])
    try:
        status = build.wait(max(0, start + BUDGETS[first] - monotonic()))
    except subprocess.TimeoutExpired:
        status = None
    _end(build)
    if status != 0:
        suite.report["CUDA library"] = no_library(status, (suite.work / "build.log").read_text())
    for name in others:
        left = start + TOTAL - KILL - monotonic()
        suite.section(name, ["--cuda"] if status == 0 else [], min(BUDGETS[name], left))


def no_library(status: int | None, log: str) -> dict[str, Any]:
    """What the report says of a library that was not built, or not in time."""
    reason = "it was not built in time" if status is None else log[-2000:]
    return {"seconds": 0, "failed": {"build": reason}, "skipped": {}, "steps": {}}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of suite.json and suite.md")
    parser.add_argument("--dry-run", action="store_true", help="make all calls without a GPU")
    arguments = parser.parse_args()
    if not arguments.dry_run:
        import torch  # a dry run needs it in other processes only

        if not torch.cuda.is_available():
            parser.error("this needs a GPU that PyTorch can use; --dry-run does not")
    suite = Suite(arguments.out)
    run(suite, arguments.dry_run)
    print(f"Failed: {', '.join(suite.failed()) or 'nothing'}.")
    return 1 if suite.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
