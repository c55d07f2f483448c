"""Result files: JSON in which each row of a table is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().with_name("results")
ROOT = RESULTS.parents[1]

Row = dict[str, Any]


def add_write(parser: Any, *files: Path) -> None:
    """Adds ``--write``, without which no command changes a committed file, to an argparse parser."""
    names = " and ".join(str(file.relative_to(ROOT)) for file in files)
    parser.add_argument("--write", action="store_true", help=f"overwrite {names}")


def dumps(document: dict[str, Any]) -> str:
    """JSON of a document; a list of dicts is a table and takes one line for each."""
    entries = (f" {json.dumps(name)}: {_entry(value)}" for name, value in document.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _entry(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"
    return json.dumps(value, indent=1).replace("\n", "\n ")


def summary(times: list[Row], memory: list[Row], machine: Row, commit: Row) -> dict[str, Any]:
    """The document of a session of the suite: a row for each series of durations, and one for each memory figure."""
    return {
        "machine": machine,
        "commit": {key: commit[key] for key in ("id", "time", "dirty")},
        "times": [{key: _rounded(value) for key, value in row.items()} for row in times],
        "memory": memory,
    }


def _rounded(value: Any) -> Any:
    """Six significant digits: far more than a measurement has."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(path: Path) -> tuple[list[Row], list[Row], Row]:
    """The rows of times, the rows of memory and the machine of a session that `--bench-results` saved."""
    saved = json.loads(path.read_text())
    return saved["times"], saved["memory"], saved["machine"]
