"""Time of forward and backward together at every shape, function and provider."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, TimeRow
from benchmarks.providers import FORWARD_BACKWARD, rows
from benchmarks.shapes import Shape


@pytest.mark.parametrize(("function", "provider"), rows(FORWARD_BACKWARD))
@pytest.mark.benchmark(timer=CLOCK.read)
def test_forward_backward(time_row: TimeRow, shape: Shape, function: str, provider: str) -> None:
    time_row(function, shape, FORWARD_BACKWARD, provider)
