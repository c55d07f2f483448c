"""The cost of AM-flow adapters: a training step and inference of a frozen backbone with and without them.

python -m benchmarks.training_step
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from amflow_models import VideoClassifier, create_backbone
from torch.nn.functional import cross_entropy

from benchmarks.machine import machine
from benchmarks.memory import peak_growth
from benchmarks.result_files import RESULTS, add_write, dumps
from benchmarks.tables import Table
from benchmarks.timing import interleave

ROOT = Path(__file__).resolve().parents[1]
RESULT = RESULTS / "training_step_cpu.json"
BACKBONE, CLASSES = "vit_small_patch14_dinov2", 10
KINDS = ("inference", "training step")
_FLOW: dict[str, Any] = {"blocks": "all", "gate": "am_flow"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "backbone": ("frozen backbone and linear head", {"adapters": False}),
    "adapters": ("and ordinary adapters", {"blocks": "none"}),
    "constant": ("and temporal adapters without AM flow", {"blocks": "all", "gate": "constant"}),
    "am_flow": ("and temporal adapters with AM flow", _FLOW),
    "eager": ("the same, AM flow in eager PyTorch", {**_FLOW, "impl": "reference"}),
    "aligned": ("and temporal adapters with AM flow of aligned frames", {**_FLOW, "align": True}),
}


def prepare(name: str, kind: str, size: int, frames: int) -> Callable[[], object]:
    """One call: a step of AdamW on one clip, or its logits."""
    torch.manual_seed(0)
    backbone = create_backbone(BACKBONE, None, size)
    model = VideoClassifier(backbone, CLASSES, frames, **MODELS[name][1])
    clip, label = torch.randn(1, frames, 3, size, size), torch.zeros(1, dtype=torch.int64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def infer() -> object:
        with torch.inference_mode():
            return model(clip)

    def step() -> object:
        cross_entropy(model(clip), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return infer if kind == KINDS[0] else step


def memory(name: str, kind: str, size: int, frames: int) -> int:
    """Peak bytes of one call besides the model, measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--probe", name, kind, str(size), str(frames)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _probe(name: str, kind: str, size: int, frames: int) -> int:
    call = prepare(name, kind, size, frames)
    call()  # libraries, thread pools, the optimizer's state
    return peak_growth(call)[0]


def measure(size: int, frames: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each model and kind: median seconds of interleaved rounds, its spread, peak bytes."""
    rows = []
    for kind in KINDS:
        times = interleave({name: prepare(name, kind, size, frames) for name in MODELS}, seconds)
        for name, durations in times.items():
            q1, middle, q3 = quantiles(durations, n=4, method="inclusive")
            # Ratios within a round: other work on the machine slows both of its calls.
            ratios = [t / base for t, base in zip(durations, times["constant"], strict=True)]
            figures = {"median": middle, "spread": (q3 - q1) / middle, "rounds": len(durations)}
            costs = {"to_constant": median(ratios), "bytes": memory(name, kind, size, frames)}
            rows.append({"model": name, "kind": kind, **figures, **costs})
    return rows


def table(rows: list[dict[str, Any]], kind: str) -> Table:
    """The rows of one kind as a table."""
    cells = []
    for row in rows:
        if row["kind"] == kind:
            time, ratio, size = f"{1e3 * row['median']:.0f} ms", f"{row['to_constant']:.2f}x", row["bytes"] / 1e6
            cells.append([MODELS[row["model"]][0], time, ratio, f"{size:.0f} MB"])
    return Table(kind, ["", "time", "to temporal adapters without AM flow", "memory"], cells, [])


def main() -> None:
    """Measures and prints the figures; with ``--write``, saves them under benchmarks/results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="width and height of a frame in pixels")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90, help="time for the rounds of one kind")
    add_write(parser, RESULT)
    parser.add_argument("--probe", nargs=4, metavar=("MODEL", "KIND", "SIZE", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        name, kind, size, frames = args.probe
        print(_probe(name, kind, int(size), int(frames)))
        return
    rows = measure(args.size, args.frames, args.seconds)
    for kind in KINDS:
        print(table(rows, kind).plain())
    setting = {"backbone": BACKBONE, "size": args.size, "frames": args.frames, "clips": 1}
    if args.write:
        RESULT.write_text(dumps({"machine": machine(), "setting": setting, "rows": rows}))


if __name__ == "__main__":
    main()
