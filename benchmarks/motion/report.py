"""Tables and a plot of the results of motion tasks."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS

# Pairs of arms that the paper's claims, or our defaults, compare.
COMPARED = (
    ("am_flow", "constant"),
    ("am_flow_serial", "constant_serial"),
    ("frame_difference", "constant"),
    ("flow_times_difference", "am_flow"),
    ("am_flow", "am_flow_serial"),
    ("constant", "constant_serial"),
    ("am_flow", "am_flow_first_last"),
)

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


def cells(table: dict[str, Any]) -> dict[tuple[str, str], Cell]:
    """By (arm, task): mean accuracy on test clips, half its interval, mean steps to 90% of the final accuracy.

    The mean of steps is over runs that beat chance by more than the interval of chance; None if there are none.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table["runs"]:
        runs.setdefault((row["arm"], row["task"]), []).append(row)
    tested, results = table["setting"]["test"], {}
    for key, rows in runs.items():
        learned = [row["steps_to_90"] for row in rows if row["test"] > beats_chance(key[1], tested)]
        results[key] = (*interval([row["test"] for row in rows], tested), mean(learned) if learned else None)
    return results


def beats_chance(task: str, tested: int) -> float:
    """The accuracy above which a run has learned something: chance and its interval."""
    chance = 1 / len(TASKS[task].classes)
    return chance + interval([chance], tested)[1]


def markdown(table: dict[str, Any]) -> str:
    """Accuracy on test clips in percent, its 95% interval, and steps to 90% of the final training accuracy."""
    results = cells(table)
    arms = [arm for arm in ARMS if any(key[0] == arm for key in results)]
    tasks = [task for task in TASKS if any(key[1] == task for key in results)]
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


def differences(table: dict[str, Any]) -> str:
    """First minus second arm, seed by seed: accuracy in points and steps to 90%, with 95% intervals over seeds.

    Two runs of a seed see the same clips in the same order. Steps are those of seeds of which both runs beat chance.
    """
    runs = {(row["task"], row["arm"], row["seed"]): row for row in table["runs"]}
    tasks = [task for task in TASKS if any(key[0] == task for key in runs)]
    lines = ["| | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for first, second in COMPARED:
        shown = []
        for task in tasks:
            seeds = [seed for name, arm, seed in runs if (name, arm) == (task, first) and (task, second, seed) in runs]
            pairs = [(runs[task, first, seed], runs[task, second, seed]) for seed in seeds]
            points = [100 * (a["test"] - b["test"]) for a, b in pairs]
            least = beats_chance(task, table["setting"]["test"])
            steps = [a["steps_to_90"] - b["steps_to_90"] for a, b in pairs if min(a["test"], b["test"]) > least]
            shown.append(
                "" if len(points) < 2 else f"{spread(points, 1)}" + (f" ({spread(steps)})" if steps[1:] else "")
            )
        lines.append(f"| {ARMS[first].label} - {ARMS[second].label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean and half the width of its 95% interval, by Student's t."""
    half = STUDENT[len(values) - 1] * stdev(values) / sqrt(len(values))
    return f"{mean(values):+.{digits}f} ± {half:.{digits}f}"


def tuning(table: dict[str, Any]) -> str:
    """Accuracy on validation clips in percent by number of steps and learning rate."""
    runs = {(row["arm"], row["steps"], row["rate"]): row["validation"] for row in table["runs"]}
    rates = sorted({rate for _, _, rate in runs})
    lines = ["| | steps | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|---|" + "---|" * len(rates)]
    for arm, spec in ARMS.items():
        for steps in sorted({steps for name, steps, _ in runs if name == arm}):
            cells = (runs.get((arm, steps, rate)) for rate in rates)
            shown = ("" if accuracy is None else f"{100 * accuracy:.0f}" for accuracy in cells)
            lines.append(f"| {spec.label} | {steps} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def chosen_rates(table: dict[str, Any], steps: int) -> dict[str, float]:
    """By arm, the rate of its best run of so many steps on validation clips; of equals, that which learned soonest."""
    best: dict[str, tuple[float, float, float]] = {}
    for row in table["runs"]:
        if row["steps"] == steps:
            result = (row["validation"], mean(accuracy for _, accuracy in row["curve"]), row["rate"])
            best[row["arm"]] = max(result, best.get(row["arm"], result))
    return {arm: rate for arm, (_, _, rate) in best.items()}


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
