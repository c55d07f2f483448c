"""Does an adapter learn motion? ``python -m benchmarks.motion run``: every arm on every task, from several seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.motion import report, sheet
from benchmarks.motion.arms import ARMS, RATE_OF
from benchmarks.motion.tasks import TASKS
from benchmarks.motion.train import SETTINGS, Job, Setting, train
from benchmarks.result_files import RESULTS, add_write, dumps

DISTINCT = ("task", "arm", "seed", "rate", "steps")  # fields of a run that no other has alike
TUNING_SEED = 1000  # no seed of a table
STEMS = {"run": "motion", "tune": "motion_tuning"}  # names of files by command


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see ``--help``."""
    args = _parser().parse_args(argv)
    if args.command == "sheet":
        sheet.draw(args.output)
    elif args.command == "report":
        table = json.loads(args.results.read_text())
        print(report.markdown(table), report.differences(table), sep="\n\n")
        if args.plot:
            report.plot(table, args.plot)
    else:
        name = f"{STEMS[args.command]}_{args.setting}.json"
        out = RESULTS / name if args.write else args.out or Path(name)
        workers = args.workers or (1 if args.device == "cuda" else os.cpu_count() or 1)
        setting = SETTINGS[args.setting]
        setting = replace(setting, precision=args.precision or setting.precision)
        if args.command == "run":
            run(setting, out, _jobs(setting, args.tasks or setting.tasks, args.arms), workers, args.device)
            print(report.markdown(json.loads(out.read_text())))
        else:
            jobs = product(args.arms, args.rates, args.steps or [setting.steps])
            todo = [Job(args.task, arm, TUNING_SEED, rate, steps, tested=False) for arm, rate, steps in jobs]
            run(setting, out, todo, workers, args.device)
            print(report.tuning(json.loads(out.read_text())))


def run(setting: Setting, out: Path, jobs: Iterable[Job], workers: int, device: str = "cpu") -> None:
    """Makes the runs that the file `out` does not hold yet, and rewrites the file after each.

    Raises:
        ValueError: the file comes from another setting or another machine.
    """
    table: dict[str, Any] = {"setting": asdict(setting), "machine": _machine(device), "runs": []}
    table = json.loads(json.dumps(table))
    if out.exists():
        saved = json.loads(out.read_text())
        for key in ("setting", "machine"):
            if saved[key] != table[key]:
                raise ValueError(f"{out}: expected results of {key} {table[key]}, got {saved[key]}")
        table = saved
    done = {tuple(row[field] for field in DISTINCT) for row in table["runs"]}
    todo = [job for job in jobs if tuple(getattr(job, field) for field in DISTINCT) not in done]
    print(f"{len(todo)} runs, {workers} at a time: {out}", flush=True)
    one = partial(train, setting=setting, device=device)
    if workers == 1:
        _store(table, map(one, todo), out)
        return
    # The processes can't import this module when it runs as a command, so they call a function of another module.
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        _store(table, pool.imap_unordered(one, todo), out)


def _store(table: dict[str, Any], rows: Iterable[dict[str, Any]], out: Path) -> None:
    for row in rows:
        table["runs"].append(row)
        part = out.with_suffix(".part")
        part.write_text(dumps(table))
        part.replace(out)
        accuracy = " / ".join("-" if row[split] is None else f"{row[split]:.3f}" for split in ("validation", "test"))
        run = f"{row['task']:<16}{row['arm']:<24}seed {row['seed']:<5}rate {row['rate']:g}, {row['steps']} steps"
        print(f"{run}  {accuracy}  {row['seconds']:.0f} s", flush=True)


def _jobs(setting: Setting, tasks: Sequence[str], arms: Sequence[str]) -> Iterator[Job]:
    """Seeds are the outermost loop, so that an interrupted table still compares all arms."""
    for seed, task, arm in product(range(setting.seeds), tasks, arms):
        spec = ARMS[arm]
        if spec.tasks is not None and task not in spec.tasks:
            continue
        if spec.options is not None:
            yield Job(task, arm, seed, spec.rate, setting.steps)
        elif seed == 0:
            yield Job(task, arm, seed)  # a probe needs no seed: its solution does not depend on one


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"device": device, "name": name, "cores": os.cpu_count(), "torch": torch.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.motion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train and test; continues an interrupted table")
    runs.add_argument("--tasks", nargs="+", choices=TASKS, default=None, help="(default: those of the setting)")
    runs.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    tunes = commands.add_parser("tune", help="validate learning rates and numbers of steps; continues likewise")
    tunes.add_argument("--task", choices=TASKS, default="direction")
    adapters = [arm for arm, spec in ARMS.items() if spec.options is not None and arm not in RATE_OF]
    tunes.add_argument("--arms", nargs="+", choices=adapters, default=adapters)
    tunes.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    tunes.add_argument("--steps", nargs="+", type=int, default=None, help="(default: those of the setting)")
    for name, command in (("run", runs), ("tune", tunes)):
        command.add_argument("--setting", choices=SETTINGS, default="cpu")
        command.add_argument(
            "--workers", type=int, default=None, help="runs at a time (default: 1 on a GPU, else one per core)"
        )
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument(
            "--precision", choices=("fp32", "bf16"), default=None, help="(default: that of the setting)"
        )
        files = command.add_mutually_exclusive_group()
        files.add_argument(
            "--out",
            type=Path,
            default=None,
            metavar="JSON",
            help=f"(default: {STEMS[name]}_SETTING.json in this folder)",
        )
        add_write(files, *(RESULTS / f"{STEMS[name]}_{setting}.json" for setting in SETTINGS))
    tables = commands.add_parser("report", help="print the table of results, and draw a plot of them")
    tables.add_argument("results", type=Path)
    tables.add_argument("--plot", type=Path, default=None, metavar="PNG")
    sheets = commands.add_parser("sheet", help="draw a clip of each class")
    sheets.add_argument("output", metavar="PNG")
    return parser


if __name__ == "__main__":
    main()
