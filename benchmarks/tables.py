"""Tables of results, from the rows of a session or of a saved file: plain for a terminal, Markdown for a page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.result_files import Row
from benchmarks.shapes import FEATURES, NOTES

PRODUCTS = {
    ("am_flow", "forward"): "the product q k^T",
    ("am_flow", "forward+backward"): "four such products (the map twice, dq, dk)",
    ("am_flow_attention", "forward"): "the products q k^T and A v",
    ("am_flow_attention", "forward+backward"): "seven such products (the map twice, A v, dA, dv, dq, dk)",
    ("am_flow_matmul", "forward"): f"the products q k^T and M x (C = {FEATURES})",
    ("am_flow_matmul", "forward+backward"): f"seven such products (the map twice, M x, dM, dx, dq, dk; C = {FEATURES})",
}
FLOOR = 1.2  # practical floor over the bound: packing, the second exponential, the sums
BUSY = 1.25  # if the matmul rate or a time varies by more than this factor, other work ran on the machine


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of text and notes below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def plain(self) -> str:
        """Aligned text."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title, _aligned(self.header, widths), "  ".join("-" * width for width in widths)]
        lines += [_aligned(row, widths) for row in self.rows]
        return "\n".join(lines + self.notes)

    def markdown(self) -> str:
        """A Markdown table."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join(
            [f"**{self.title}**", "", *lines, "", *(note.replace("* ", "\\* ", 1) + "  " for note in self.notes)]
        )


def caption(machine: Row) -> str:
    """The machine and versions in one line."""
    return (
        f"{machine['cpu']}, {machine['cpu_capability']}, {machine['threads']} threads; torch {machine['torch']}, "
        f"Python {machine['python']}, amflow_kernels {machine['amflow_kernels']}"
    )


def unique(rows: list[Row], key: str) -> list[Any]:
    """The values of a key in the order they appear."""
    return list(dict.fromkeys(row[key] for row in rows))


def tables(times: list[Row], memory: list[Row]) -> list[Table]:
    """A table for each function, direction and row of ours with its peers, and one of the working memory."""
    result = []
    for function, direction in itertools.product(unique(times, "function"), unique(times, "direction")):
        rows = [row for row in times if (row["function"], row["direction"]) == (function, direction)]
        result += [_times(ours, rows) for ours in unique([row for row in rows if row["ours"]], "provider")]
    return [*result, _memory(memory)] if memory else result


def line(rows: list[Row], times: dict[str, list[float]]) -> str:
    """The rows of a function, shape and direction in one line: each median."""
    cells = [f"{row['label']} {_ms(median(times[row['provider']]))}" for row in rows]
    return f" {', '.join(cells)} ms"


def _times(name: str, rows: list[Row]) -> Table:
    """Times of one of our providers at every shape, their bound, and the peers' times as multiples of them."""
    ours = {row["shape"]: row for row in rows if row["provider"] == name}
    first = next(iter(ours.values()))
    labels = {row["provider"]: row["label"] for row in rows}
    peers = unique([row for row in rows if row["baseline"] == name and not row["ours"]], "provider")
    ratios = {(row["shape"], row["provider"]): row["ratio"] for row in rows if row["baseline"]}
    ratios |= {(shape, row["baseline"]): row["ratio"] for shape, row in ours.items() if row["baseline"]}
    header = ["(B,T,H,N,D)", f"{first['label']} ms", "spread", "bound ms", "floor ms", "bound / time"]
    compared = [first["baseline"], *peers] if first["baseline"] in labels else peers
    body = []
    for shape, row in ours.items():
        line = [f"{shape} *" if shape in NOTES else shape, _ms(row["median"]), f"{row['spread']:.0%}"]
        line += [_ms(row["bound"]), _ms(FLOOR * row["bound"]), f"{row['bound'] / row['median']:.0%}"]
        line += [_ratio(ratios[shape, peer]) if (shape, peer) in ratios else "" for peer in compared]
        body.append(line)
    rates = [round(row["peak_flops"] / 1e9) for row in ours.values()]
    notes = [f"* {shape}: {NOTES[shape]}" for shape in ours if shape in NOTES]
    if compared:
        others = ", ".join(labels[peer] for peer in compared)
        notes.append(f"{others}: time divided by that of {first['label']}; above 1x {first['label']} is faster.")
    notes += [
        f"bound: {PRODUCTS[first['function'], first['direction']]} at the rate of a large matmul in the same rounds, "
        f"{_range(rates)} GFLOP/s; floor: bound + 20%.",
        f"Medians of {_range([row['rounds'] for row in ours.values()])} interleaved rounds; "
        f"spread: (q3 - q1) / median. am_flow ran: {', '.join(map(str, unique(list(ours.values()), 'impl')))}.",
    ]
    if max(rates) > BUSY * min(rates) or median(row["spread"] for row in ours.values()) > BUSY - 1:
        notes.append("Other work ran on the machine: times varied too much for these figures to be reliable.")
    title = f"Time, {first['function']}, {first['direction']}, {first['dtype']}"
    return Table(title, header + [labels[peer] for peer in compared], body, notes)


def _range(values: list[int]) -> str:
    return f"{min(values)}-{max(values)}" if min(values) < max(values) else str(values[0])


def _memory(rows: list[Row]) -> Table:
    providers = {row["provider"]: row["label"] for row in rows}
    figures = {(row["shape"], row["direction"], row["provider"]): row["bytes"] for row in rows}
    body = []
    for shape, direction in dict.fromkeys((row["shape"], row["direction"]) for row in rows):
        cells = (figures.get((shape, direction, name)) for name in providers)
        body.append([shape, direction, *("" if cell is None else f"{cell / 1e6:.1f}" for cell in cells)])
    header = ["(B,T,H,N,D)", "direction", *providers.values()]
    return Table("Peak working memory besides inputs and results, MB", header, body, [])


def _aligned(cells: list[str], widths: list[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *others])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"
