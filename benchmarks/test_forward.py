"""Time of the forward at every shape, function and provider."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, TimeRow
from benchmarks.providers import FORWARD, rows
from benchmarks.shapes import Shape


@pytest.mark.parametrize(("function", "provider"), rows(FORWARD))
@pytest.mark.benchmark(timer=CLOCK.read)
def test_forward(time_row: TimeRow, shape: Shape, function: str, provider: str) -> None:
    time_row(function, shape, FORWARD, provider)
