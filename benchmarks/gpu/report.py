"""What the sections of the GPU suite wrote, read again and as tables. Imports nothing that needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.tables import Table

Record = dict[str, Any]  # a line that a step wrote: its name, whether it begins, or else its results


def read(records: Path) -> list[Record]:
    """All lines but those that a process did not live to finish."""
    found = []
    for line in records.read_text().splitlines() if records.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(records: Path, record: Record) -> None:
    """Write one line."""
    unfinished = records.exists() and records.read_bytes()[-1:] not in (b"", b"\n")
    with records.open("a") as file:
        file.write(("\n" if unfinished else "") + json.dumps(record, default=str) + "\n")


def failures(steps: dict[str, Record]) -> dict[str, str]:
    """What is wrong, by step."""
    found = {step: str(record.get("error") or record.get("wrong") or "") for step, record in steps.items()}
    return {step: reason for step, reason in found.items() if reason}


def tables(steps: dict[str, Record]) -> list[Table]:
    """The times of a section, a table for each direction."""
    rows = [row for record in steps.values() for row in record.get("rows", ())]
    directions = dict.fromkeys(row["direction"] for row in rows)
    return [time_table([row for row in rows if row["direction"] == name], name) for name in directions]


def time_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Times of am_flow, the bound, and the others' times over those of am_flow."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    body = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        by_name = {row["provider"]: row for row in rows if row["shape"] == shape}
        ours = by_name[names[0]]
        time, bound = ours.get("median"), ours.get("bound")
        cells = [shape, f"{time * 1e6:.0f}" if time else "failed"]
        cells.append(f"{bound / time:.0%}" if time and bound else "")
        for name in names[1:]:
            other = by_name.get(name, {}).get("median")
            cells.append(f"{other / time:.2f}x" if time and other else "")
        body.append([*cells, f"{ours['bytes'] / 1e6:.1f}" if "bytes" in ours else ""])
    header = ["(B,T,H,N,D)", f"{names[0]} us", "bound / time", *names[1:], "working memory MB"]
    return Table(f"{title}: time over that of {names[0]}", header, body, [])
