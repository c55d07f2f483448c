"""Options, the interleaved rows, and the tables and the file at the end of a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import get_commit_info

from benchmarks import result_files, tables
from benchmarks.machine import machine
from benchmarks.providers import PROVIDERS, is_left_out
from benchmarks.shapes import MEMORY_SHAPES, SHAPES, SMOKE, Shape
from benchmarks.timing import ReplayClock, Series, measure

CLOCK = ReplayClock()
TimeRow = Callable[[str, Shape, str, str], None]  # function, shape, direction, provider

TIMES = pytest.StashKey[list[dict[str, Any]]]()
MEMORY = pytest.StashKey[list[dict[str, Any]]]()
BEGIN = pytest.StashKey[float]()
SMOKE_SECONDS = 0.1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("amflow benchmarks")
    seconds = "time for the rounds of one function, shape and direction (default 0.5)"
    group.addoption("--bench-seconds", type=float, default=0.5, help=seconds)
    minutes = "time of all; what has not begun by then is left out (default 4.5)"
    group.addoption("--bench-minutes", type=float, default=4.5, help=minutes)
    group.addoption("--bench-threads", type=int, default=None, help="threads of PyTorch (default: PyTorch's own)")
    group.addoption(
        "--bench-shape",
        type=Shape.parse,
        action="append",
        metavar="BxTxHEADSxNxD",
        help="measure this shape, such as 1x8x12x257x64, instead of those in benchmarks/shapes.py; may be repeated",
    )
    group.addoption("--bench-smoke", action="store_true", help="only see that all runs: one tiny shape, two rounds")
    group.addoption(
        "--bench-results", type=Path, default=None, metavar="JSON", help="file for a summary of the session"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES], config.stash[MEMORY], config.stash[BEGIN] = [], [], perf_counter()
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))


def pytest_report_header() -> list[str]:
    names = [provider.label for provider in PROVIDERS.values() if is_left_out(provider)]
    return [f"left out: {', '.join(names)}; this CPU has no units for bfloat16"] if names else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes of the tests that take one."""
    if "shape" in metafunc.fixturenames:
        shapes = MEMORY_SHAPES if metafunc.function.__name__ == "test_memory" else SHAPES
        smoke = [SMOKE] if metafunc.config.getoption("--bench-smoke") else None
        metafunc.parametrize("shape", smoke or metafunc.config.getoption("--bench-shape") or shapes, ids=str)


@pytest.fixture
def in_time(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what is measured next, or skips it when the session's time is over."""

    def begin(title: str) -> None:
        minutes = request.config.getoption("--bench-minutes")
        if perf_counter() - request.config.stash[BEGIN] > 60 * minutes:
            pytest.skip(f"left out: the {minutes:g} minutes are over; --bench-minutes gives more")
        say(request.config, f"\n{title} ...")

    return begin


def say(config: pytest.Config, text: str) -> None:
    """Prints at once, past the capture of pytest."""
    capture, reporter = (config.pluginmanager.getplugin(name) for name in ("capturemanager", "terminalreporter"))
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        reporter.write(text, flush=True)


@pytest.fixture(scope="session")
def measured() -> dict[tuple[str, Shape, str], Series]:
    """What has been measured: a function and its peers at one shape and direction."""
    return {}


@pytest.fixture
def time_row(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    measured: dict[tuple[str, Shape, str], Series],
    in_time: Callable[[str], None],
) -> TimeRow:
    """Hands the durations of one provider in the interleaved rounds to pytest-benchmark.

    The first row of a function, shape and direction measures all of them.
    """
    smoke, seconds = request.config.getoption("--bench-smoke"), request.config.getoption("--bench-seconds")

    def row(function: str, shape: Shape, direction: str, provider: str) -> None:
        key = function, shape, direction
        if key not in measured:
            in_time(f"{function}, {direction}, {shape}")
            measured[key] = measure(*key, SMOKE_SECONDS, 2) if smoke else measure(*key, seconds)
            say(request.config, tables.line(list(measured[key].info.values()), measured[key].times) + " ")
        if provider in measured[key].left_out:
            pytest.skip(f"left out: a call takes {measured[key].left_out[provider]:.0f} s")
        durations, info = measured[key].times[provider], measured[key].info[provider]
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
