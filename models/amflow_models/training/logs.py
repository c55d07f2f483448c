"""What a run tells: a progress bar, CSV files, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 50  # steps between lines where there is no terminal to draw a bar on


class Log:
    """Writes what happens at a step. Only the main process has a log; the others' says nothing.

    Files in `output`: `train.csv` and `validation.csv`, with a line per step or epoch, and TensorBoard's.

    Args:
        output: folder of the run.
        total: steps of the run.
        step: lines after it are dropped: the run that wrote them was cut off, and this one does those steps again.
        main: whether this is the main process.
    """

    def __init__(self, output: Path, total: int, step: int, main: bool) -> None:
        self.output, self.main = output, main
        self.console = Console(quiet=not main)
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        output.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation"):
            _cut(output / f"{name}.csv", step)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=total, completed=step)
        self.progress.start()

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """A line of a file, and points of TensorBoard's curves."""
        if not self.main:
            return
        path = self.output / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *values.values()])
        for key, value in values.items():
            self.board.add_scalar(f"{name}/{key}", value, step)

    def step(self, step: int, told: str) -> None:
        """Moves the progress bar."""
        if self.main:
            self.progress.update(self.task, completed=step, description=told)
            if not self.console.is_terminal and step % LINES == 0:
                self.say(f"step {step}: {told}")

    def say(self, what: str, style: str | None = None) -> None:
        self.console.print(what, style=style, highlight=False, markup=False, soft_wrap=True)

    def has(self, name: str, step: int) -> bool:
        """Whether a file has a line of a step."""
        path = self.output / f"{name}.csv"
        return path.exists() and any(line.startswith(f"{step},") for line in path.read_text().splitlines())

    def close(self) -> None:
        if self.main:
            self.progress.stop()
            self.board.close()


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    # A line that the process was killed in is not whole, and the step it is of is done again.
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= step]
    part = path.with_suffix(".part")
    part.write_text("".join([*lines[:1], *kept]))
    part.replace(path)
