"""The log of a run: a progress bar, CSV files, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amflow_models.files import write_text

LINES = 50  # steps between lines of text, if there is no terminal for a progress bar


class Log:
    """Logs the steps of a run. Only the main process writes and prints anything.

    Files in `output`: `train.csv` with a line per step, `validation.csv` and, for the average, `validation_ema.csv`
    with a line per validation, and TensorBoard's.

    Args:
        output: folder of the run.
        total: number of steps of the run.
        step: the last step that is done. Later lines in the files are dropped: they were written by a run that was cut
            off, and this run repeats their steps.
        main: whether this is the main process.
        track: is called with the values by name and the step, besides, as accelerate's trackers are; None: nothing is.
    """

    def __init__(
        self,
        output: Path,
        total: int,
        step: int,
        main: bool,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.output, self.main, self.track = output, main, track
        self.console = Console(quiet=not main)
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        output.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation", "validation_ema"):
            _drop_lines_after(output / f"{name}.csv", step)
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
        """Appends a line to the file `name` and points to TensorBoard's curves."""
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
        if self.track is not None:
            self.track({f"{name}/{key}": value for key, value in values.items()}, step)

    def step(self, step: int, message: str) -> None:
        """Moves the progress bar."""
        if self.main:
            self.progress.update(self.task, completed=step, description=message)
            if not self.console.is_terminal and step % LINES == 0:
                self.say(f"step {step}: {message}")

    def say(self, message: str, style: str | None = None) -> None:
        """Prints a line."""
        self.console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)

    def has(self, name: str, step: int) -> bool:
        """Whether the file `name` has a line for a step."""
        path = self.output / f"{name}.csv"
        return path.exists() and any(line.startswith(f"{step},") for line in path.read_text().splitlines())

    def close(self) -> None:
        """Closes the files and ends the progress bar."""
        if self.main:
            self.progress.stop()
            self.board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    # If the process was killed while it wrote a line, the line is incomplete and its step is repeated.
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= step]
    write_text(path, "".join([*lines[:1], *kept]))
