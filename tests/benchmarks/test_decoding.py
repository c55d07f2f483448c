"""The benchmark of decoding measures the reader of this library, whatever else is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from amflow_models.data.videos import Videos

from benchmarks import decoding
from benchmarks.decoding import Source

SMALL = (Source("a.mp4", "small", 64, 96, 40, 2), Source("a.avi", "small, AVI", 64, 96, 40, 2, "mpeg4"))


def test_clips_are_read_without_wrong_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other libraries, whose absence is reported."""
    monkeypatch.setattr(decoding, "import_module", lambda name: __import__(f"no_{name}"))
    rows = [row for source in SMALL for row in decoding.throughput(source, tmp_path, 0)]
    assert [(row["source"], row["reader"], row["wrong_frames"]) for row in rows] == [
        (source.label, reader, 0) for source in SMALL for reader in ("first", "again")
    ]
    failed = {"source": "small", "reader": "decord", "failed": "no such format"}
    table = decoding.throughput_table([*rows, failed])
    assert [cells[:2] for cells in table.rows] == [[row["source"], row["reader"]] for row in [*rows, failed]]


def test_items_are_the_same_whether_resized_one_by_one_or_together(tmp_path: Path) -> None:
    path = decoding.write_video(Source("large.mp4", "", 64, 96, 60, 2), tmp_path)
    for kind in decoding.ITEMS:
        assert decoding.item(kind, path, whole=True).equal(decoding.item(kind, path, whole=False))


def test_processes_look_at_the_list_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LISTED", 50)
    rows = decoding.list_memory()
    assert [row["stored_as"] for row in rows] in ([], ["tensors", "objects"])  # [] where the system does not tell
    assert list(decoding._listed()) == list(Videos(decoding._listed()))
