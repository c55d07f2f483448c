"""The tables of README.md and docs/benchmarks.md, from a saved session of the suite.

python -m benchmarks.summary benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.result_files import Row
from benchmarks.shapes import NOTES

DIRECTIONS = ("forward", "forward+backward")

Cell = Callable[[str], str]  # of a shape


def tables(path: Path) -> dict[str, str]:
    """Each table in Markdown, by a name."""
    rows: dict[tuple[str, str, str, str], Row] = {
        (row["function"], row["shape"], row["direction"], row["provider"]): row
        for row in json.loads(path.read_text())["times"]
    }

    def times(shape: str) -> str:
        parts = [rows["am_flow", shape, direction, "ours"] for direction in DIRECTIONS]
        return " / ".join(f"{1e3 * row['median']:.3g} ({100 * row['spread']:.0f}%)" for row in parts) + " ms"

    def ratios(function: str, provider: str, directions: tuple[str, ...] = DIRECTIONS) -> Cell:
        def cell(shape: str) -> str:
            return " / ".join(_times(rows[function, shape, part, provider]["ratio"]) for part in directions)

        return cell

    eager, chunked = ratios("am_flow", "eager"), ratios("am_flow", "chunked")
    forward = DIRECTIONS[:1]
    columns: dict[str, dict[str, Cell]] = {
        "am_flow": {
            "am_flow": times,
            "eager": eager,
            "torch.compile": ratios("am_flow", "compile"),
            "SDPA": ratios("am_flow", "sdpa"),
            "q k^T": ratios("am_flow", "product", forward),
            "float32 / bf16": ratios("am_flow", "ours_bf16"),
        },
        "other functions": {
            "SDPA / `am_flow_attention`": ratios("am_flow_attention", "attention"),
            "`am_flow` / `am_flow_matmul`": ratios("am_flow_matmul", "matmul"),
            "eager / `am_flow_matmul`": ratios("am_flow_matmul", "eager_matmul"),
        },
        "without kernels": {"chunked": chunked, "eager": eager},
    }
    shapes = list(dict.fromkeys(shape for _, shape, _, _ in rows))
    return {name: _markdown(cells, shapes) for name, cells in columns.items()}


def _times(ratio: float) -> str:
    digits = 0 if ratio >= 9.95 else 1 if ratio >= 0.995 else 2
    return f"{ratio:.{digits}f}x"


def _markdown(columns: dict[str, Cell], shapes: list[str]) -> str:
    lines = [["shape", *columns]]
    for shape in shapes:
        name = f"{shape} ({NOTES[shape].partition(':')[0]})" if shape in NOTES else shape
        lines.append([name, *(cell(shape) for cell in columns.values())])
    header, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([header, "|---" * len(lines[0]) + "|", *body])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="file that --bench-results wrote")
    print("\n\n".join(tables(parser.parse_args().json).values()))


if __name__ == "__main__":
    main()
