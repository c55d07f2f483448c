"""Options, the interleaved rows, and the tables and the file at the end of a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import get_commit_info

from benchmarks import result_files, tables
from benchmarks.machine import machine
from benchmarks.shapes import SHAPES
from benchmarks.timing import ReplayClock, Series, measure

CLOCK = ReplayClock()
TimeRow = Callable[[str, str, str, str], None]  # function, shape, direction, provider

TIMES = pytest.StashKey[list[dict[str, Any]]]()
MEMORY = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("amflow benchmarks")
    seconds = "time for the rounds of one function, shape and direction (default 4)"
    group.addoption("--bench-seconds", type=float, default=4.0, help=seconds)
    group.addoption("--bench-threads", type=int, default=None, help="threads of PyTorch (default: PyTorch's own)")
    group.addoption(
        "--bench-results", type=Path, default=None, metavar="JSON", help="file for a summary of the session"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES], config.stash[MEMORY] = [], []
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))


@pytest.fixture(scope="session")
def series(request: pytest.FixtureRequest) -> Callable[[str, str, str], Series]:
    """A function and its peers at one shape and direction, measured when the first of their rows is requested."""
    seconds = request.config.getoption("--bench-seconds")
    return cache(lambda function, shape, direction: measure(function, SHAPES[shape], direction, seconds))


@pytest.fixture
def time_row(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, series: Callable[[str, str, str], Series]
) -> TimeRow:
    """Hands the durations of one provider in the interleaved rounds to pytest-benchmark."""

    def row(function: str, shape: str, direction: str, provider: str) -> None:
        measured = series(function, shape, direction)
        durations, info = measured.times[provider], measured.info[provider]
        benchmark.group = f"{function} {direction} {shape}"
        benchmark.extra_info.update(info)
        benchmark.pedantic(CLOCK.player(durations), rounds=len(durations))
        figures = {"median": median(durations), "min": min(durations), "max": max(durations), "rounds": len(durations)}
        request.config.stash[TIMES].append({**info, **figures})

    return row


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    times, memory, path = config.stash[TIMES], config.stash[MEMORY], config.getoption("--bench-results")
    if not times and not memory:
        return
    terminalreporter.section("AM flow benchmarks")
    terminalreporter.write_line(tables.caption(machine()))
    for table in tables.tables(times, memory):
        terminalreporter.write_line("")
        terminalreporter.write_line(table.plain())
    if path is not None:
        path.write_text(result_files.dumps(result_files.summary(times, memory, machine(), get_commit_info())))
        terminalreporter.write_line(f"\nResults: {path}")
