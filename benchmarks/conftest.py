"""Options, the interleaved rows, and what is printed and saved at the end of a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.machine import machine
from benchmarks.shapes import SHAPES
from benchmarks.timing import ReplayClock, Series, measure

CLOCK = ReplayClock()
TimeRow = Callable[[str, str, str, str], None]  # function, shape, direction, provider

TIMES = pytest.StashKey[list[dict[str, Any]]]()
MEMORY = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("amflow benchmarks")
    told = "time for the rounds of one function, shape and direction (default 4)"
    group.addoption("--bench-seconds", type=float, default=4.0, help=told)
    group.addoption("--bench-threads", type=int, default=None, help="threads of PyTorch (default: PyTorch's own)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES], config.stash[MEMORY] = [], []
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))


@pytest.fixture(scope="session")
def series(request: pytest.FixtureRequest) -> Callable[[str, str, str], Series]:
    """A function and its peers at one shape and direction, measured when the first of their rows is asked for."""
    seconds = request.config.getoption("--bench-seconds")
    return cache(lambda function, shape, direction: measure(function, SHAPES[shape], direction, seconds))


@pytest.fixture
def time_row(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, series: Callable[[str, str, str], Series]
) -> TimeRow:
    """Hand the durations that one provider had in the interleaved rounds to pytest-benchmark."""

    def row(function: str, shape: str, direction: str, provider: str) -> None:
        measured = series(function, shape, direction)
        durations, info = measured.times[provider], measured.info[provider]
        benchmark.group = f"{function} {direction} {shape}"
        benchmark.extra_info.update(info)
        benchmark.pedantic(CLOCK.player(durations), rounds=len(durations))
        request.config.stash[TIMES].append({**info, "median": median(durations), "rounds": len(durations)})

    return row


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add the memory figures; leave the single durations and the timer's options out."""
    output_json["memory"] = config.stash[MEMORY]
    for row in output_json["benchmarks"]:
        row.pop("options", None)
        row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tables = report.tables(config.stash[TIMES], config.stash[MEMORY])
    if not tables:
        return
    terminalreporter.section("AM flow benchmarks")
    terminalreporter.write_line(report.caption(machine()))
    for table in tables:
        terminalreporter.write_line("")
        terminalreporter.write_line(table.plain())
