"""Time of the forward at every shape, function and provider."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, TimeRow
from benchmarks.providers import FORWARD, rows
from benchmarks.shapes import SHAPES


@pytest.mark.parametrize(("function", "provider"), rows(FORWARD))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_forward(time_row: TimeRow, shape: str, function: str, provider: str) -> None:
    time_row(function, shape, FORWARD, provider)
