"""Tables and a plot of the results of motion tasks."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS

# The arms among which a default is chosen, besides those that serve only for this choice.
RIVALS = ("am_flow", "am_flow_raw", "frame_difference", "constant", "am_flow_serial", "am_flow_aligned")

# Two-sided 95% quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float], tested: int) -> tuple[float, float]:
    """Mean accuracy, and half the width of its 95% interval: the wider of that over seeds and that over test clips.

    The second is Wilson's. Without it, seeds that happen to agree would make the interval too narrow.
    """
    centre = mean(values)
    z = 1.96
    clips = z * sqrt(centre * (1 - centre) / tested + z**2 / (4 * tested**2)) / (1 + z**2 / tested)
    if len(values) == 1:
        return centre, clips
    return centre, max(clips, STUDENT[len(values) - 1] * stdev(values) / sqrt(len(values)))


Cell = tuple[float, float, float | None]


def cells(table: dict[str, Any], split: str = "test") -> dict[tuple[str, str], Cell]:
    """By (arm, task): mean accuracy on a split, half its interval, mean steps to 90% of the final accuracy.

    The mean of steps is over runs that beat chance by more than the interval of chance; None if there are none.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table["runs"]:
        if row[split] is not None:
            runs.setdefault((row["arm"], row["task"]), []).append(row)
    tested, results = table["setting"][split], {}
    for key, rows in runs.items():
        chance = 1 / len(TASKS[key[1]].classes)
        learned = [row["steps_to_90"] for row in rows if row[split] > chance + interval([chance], tested)[1]]
        results[key] = (*interval([row[split] for row in rows], tested), mean(learned) if learned else None)
    return results


def markdown(table: dict[str, Any]) -> str:
    """Accuracy in percent, its 95% interval, and steps to 90% of the final training accuracy.

    One table for the test split, and one for the validation split with the arms among which a default is chosen.
    """
    choices = [arm for arm, spec in ARMS.items() if spec.choice]
    tables = {
        "Test": (cells(table), [arm for arm in ARMS if arm not in choices]),
        "Validation": (cells(table, "validation"), [*RIVALS, *choices]),
    }
    if not any(row["arm"] in choices for row in table["runs"]):
        del tables["Validation"]
    return "\n\n".join(f"{name}:\n\n{_rows(table, *content)}" for name, content in tables.items())


def _rows(table: dict[str, Any], results: dict[tuple[str, str], Cell], arms: list[str]) -> str:
    arms = [arm for arm in arms if any(key[0] == arm for key in results)]
    chosen = [task for arm in arms if ARMS[arm].choice for task in ARMS[arm].tasks or ()] or list(TASKS)
    tasks = [task for task in TASKS if task in chosen and any(key[1] == task for key in results)]
    lines = [
        "| | trained | " + " | ".join(tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
        "| chance | | " + " | ".join(f"{100 / len(TASKS[task].classes):.0f}" for task in tasks) + " |",
    ]
    for arm in arms:
        row = []
        for task in tasks:
            if (arm, task) not in results:
                row.append("")
                continue
            centre, half, steps = results[arm, task]
            at = "" if steps is None or ARMS[arm].options is None else f" ({steps:.0f})"
            row.append(f"{100 * centre:.0f} ± {100 * half:.0f}{at}")
        trained = max(row["trainable"] for row in table["runs"] if row["arm"] == arm)
        lines.append(f"| {ARMS[arm].label} | {trained / 1e3:.0f}k | " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(table: dict[str, Any], path: Path) -> None:
    """Draws the accuracy of each arm and of its runs, one panel per task."""
    from matplotlib.figure import Figure

    results = cells(table)
    tasks = [task for task in TASKS if any(key[1] == task for key in results)]
    arms = [arm for arm in ARMS if any(key[0] == arm for key in results)]
    figure = Figure(figsize=(3.2 + 2.1 * len(tasks), 0.8 + 0.3 * len(arms)), layout="constrained")
    panels: Any = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for y, arm in enumerate(arms):
            if (arm, task) in results:
                centre, half, _ = results[arm, task]
                colour = "#d55e00" if arm.startswith("am_flow") else "#0072b2"
                axes.errorbar(100 * centre, y, xerr=100 * half, fmt="|", color=colour, capsize=3, alpha=0.5)
                runs = [100 * row["test"] for row in table["runs"] if row["arm"] == arm and row["task"] == task]
                axes.plot(runs, [y] * len(runs), "o", color=colour, markersize=4)
        axes.axvline(100 / len(TASKS[task].classes), color="0.6", linestyle=":")
        axes.set_title(f"{task}: {len(TASKS[task].classes)} classes", fontsize=10)
        axes.set_xlim(0, 102)
        axes.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(arms)), [ARMS[arm].label for arm in arms], fontsize=9)
    panels[0].invert_yaxis()
    figure.supxlabel(
        "Test accuracy in %: each run, mean and 95% interval. Orange: AM flow. Dotted: chance.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
