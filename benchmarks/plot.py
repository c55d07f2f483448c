"""A plot of a saved session of the suite, and its tables in Markdown.

python -m benchmarks.plot benchmarks/results/FILE.json -o docs/benchmarks_cpu.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.result_files import Row, load
from benchmarks.shapes import NOTES
from benchmarks.tables import caption, tables, unique

# The palette of Okabe and Ito, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442")


def draw(times: list[Row], machine: Row, output: Path) -> None:
    """Bars of each peer's time divided by that of am_flow, by shape, one panel for each direction."""
    times = [row for row in times if row["function"] == "am_flow"]
    labels = {row["provider"]: row["label"] for row in times}
    peers = {row["provider"]: _compared(row, labels) for row in times if row["baseline"] in labels}
    directions = unique(times, "direction")
    figure, axes = plt.subplots(len(directions), 1, figsize=(12, 4.2 * len(directions)), squeeze=False)
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        _panel(
            axis,
            direction,
            [row for row in times if row["direction"] == direction],
            dict(zip(peers, COLOURS, strict=False)),
        )
    handles = [Patch(color=colour, label=label) for colour, label in zip(COLOURS, peers.values(), strict=False)]
    figure.suptitle("Times of others / am_flow's, by shape (B,T,H,N,D): larger is better. * little to gain here")
    figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, 0.965))
    figure.text(0.5, 0.005, caption(machine), ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def _compared(row: Row, labels: dict[str, str]) -> str:
    """The other's time / ours."""
    names = row["label"], labels[row["baseline"]]
    return " / ".join(reversed(names) if row["ours"] else names)


def _panel(axis: Axes, direction: str, rows: list[Row], colours: dict[str, str]) -> None:
    shapes = unique(rows, "shape")
    shown = [peer for peer in colours if any(row["provider"] == peer for row in rows)]
    width = 0.84 / max(1, len(shown))
    for row in rows:
        if row["provider"] not in shown:
            continue
        x = shapes.index(row["shape"]) + (shown.index(row["provider"]) - (len(shown) - 1) / 2) * width
        # Bars start at 1: those that go up say that am_flow is faster, those that go down that it is slower.
        axis.bar(x, row["ratio"] - 1, width, bottom=1, color=colours[row["provider"]])
        text = f"{row['ratio']:.1f}" if row["ratio"] >= 9.95 else f"{row['ratio']:.2g}"
        offset, align = ((0, 2), "bottom") if row["ratio"] >= 1 else ((0, -2), "top")
        label = axis.annotate(text, (x, row["ratio"]), offset, textcoords="offset points", ha="center", va=align)
        label.set(rotation=90, fontsize=7)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_xticks(range(len(shapes)), [_tick(shape, rows) for shape in shapes], fontsize=8)
    axis.set_ylabel("times as fast")
    axis.set_title(direction, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(shape: str, rows: list[Row]) -> str:
    ours = [row for row in rows if row["shape"] == shape and row["provider"] == "ours"]
    time = f"\n{ours[0]['median'] * 1e3:.3g} ms" if ours else ""
    return shape + ("*" if shape in NOTES else "") + time


def main() -> None:
    """Draws the plot and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("json", type=Path, help="file that --bench-results wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    times, memory, machine = load(args.json)
    draw(times, machine, args.output)
    print(caption(machine))
    for table in tables(times, memory):
        print(f"\n{table.markdown()}")


if __name__ == "__main__":
    main()
