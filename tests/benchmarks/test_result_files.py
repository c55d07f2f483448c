"""Result files: what the suite saves, and the pages and tables made from the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import call_cost, many_threads, precision, result_files, summary, tables
from benchmarks.shapes import NOTES

RESULTS = sorted(result_files.RESULTS.glob("*.json"))
SESSIONS = [path for path in RESULTS if path.name.startswith("cpu_")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_files_are_written_as_the_code_writes_them(path: Path) -> None:
    assert result_files.dumps(json.loads(path.read_text())) == path.read_text()


def test_each_row_of_a_table_takes_one_line() -> None:
    document = {
        "torch": "2",
        "machine": {"cores": 2},
        "times": [{"a": 1, "b": [1, 2]}, {"a": 2, "b": None}],
        "memory": [],
    }
    text = result_files.dumps(document)
    assert json.loads(text) == document
    assert '  {"a": 1, "b": [1, 2]},\n  {"a": 2, "b": null}\n' in text


def test_a_summary_keeps_six_digits_of_measured_numbers_and_all_of_whole_ones() -> None:
    commit = {"id": "abc", "time": "now", "dirty": False, "branch": "left out"}
    row = {"median": 0.012345678901, "peak_flops": 123456789012.3, "rounds": 12345678, "provider": "ours"}
    summary = result_files.summary([row], [], {"cores": 2}, commit)
    assert summary["times"] == [
        {"median": 0.0123457, "peak_flops": 123457000000.0, "rounds": 12345678, "provider": "ours"}
    ]
    assert summary["commit"] == {"id": "abc", "time": "now", "dirty": False}


@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.name)
def test_ratios_are_those_of_the_medians_in_the_same_rounds_and_larger_is_better(path: Path) -> None:
    times, _, _ = result_files.load(path)
    medians = {(row["function"], row["direction"], row["shape"], row["provider"]): row["median"] for row in times}
    for row in times:
        assert row["min"] <= row["median"] <= row["max"]
        if row["baseline"] is not None:
            baseline = medians[row["function"], row["direction"], row["shape"], row["baseline"]]
            times_as_fast = baseline / row["median"] if row["ours"] else row["median"] / baseline
            assert row["ratio"] == pytest.approx(times_as_fast, rel=2e-5)


@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.name)
def test_tables_have_a_row_for_each_shape_and_mark_the_shapes_with_a_note(path: Path) -> None:
    times, _, _ = result_files.load(path)
    shapes = tables.unique(times, "shape")
    for table in tables.tables(times, []):
        assert [row[0] for row in table.rows] == [f"{shape} *" if shape in NOTES else shape for shape in shapes]
        assert len({len(row) for row in (table.header, *table.rows)}) == 1


def test_the_page_on_precision_is_made_from_its_committed_data() -> None:
    assert precision.page(json.loads(precision.RESULT.read_text())) == precision.PAGE.read_text()


def test_readme_and_page_have_the_tables_of_the_committed_run() -> None:
    root = result_files.RESULTS.parents[1]
    tables = summary.tables(result_files.RESULTS / "cpu_epyc_zen4_2threads.json")
    assert tables["am_flow"] in (root / "README.md").read_text()
    page = (root / "docs" / "benchmarks.md").read_text()
    assert all(tables[name] in page for name in ("other functions", "without kernels"))
    assert summary.tables(result_files.RESULTS / "cpu_epyc_zen4_avx2_2threads.json")["am_flow"] in page


def test_the_page_of_benchmarks_has_the_simulated_cores_and_the_counted_calls() -> None:
    page = (result_files.RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    assert many_threads.table(json.loads(many_threads.RESULT.read_text())["shares"], "avx512").markdown() in page
    for row in json.loads(call_cost.RESULT.read_text())["overhead"]:
        counts = f"{row['instructions'] / 1e3:.0f} | {row['yardstick'] / 1e3:.0f}"
        assert f"| {row['call']} | {counts} | {row['multiple']:.1f}x |" in page


def test_simulated_cores_wait_for_earlier_parts_of_a_sum() -> None:
    """Two cores and three items: the second ends after the first, to whose sum it adds."""
    items = [many_threads.Item(5, 1, 0), many_threads.Item(2, 1, 0), many_threads.Item(3, 0, 1)]
    assert many_threads.duration(items, 1) == 12
    assert many_threads.duration(items, 2) == 9


def test_the_triton_report_is_made_from_its_committed_data() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.gpu import triton_report

    assert triton_report.page(json.loads(triton_report.RESULT.read_text())) == triton_report.REPORT.read_text()


def test_the_cuda_report_lists_its_committed_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.gpu import cuda_report

    page = cuda_report.REPORT.read_text()
    assert cuda_report.page(json.loads(cuda_report.RESULT.read_text()), [], []).split("| N |")[0] in page
