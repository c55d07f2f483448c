"""Time of forward and backward together at every shape and provider."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, TimeRow
from benchmarks.providers import FORWARD_BACKWARD, names
from benchmarks.shapes import SHAPES


@pytest.mark.parametrize("provider", names(FORWARD_BACKWARD))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_forward_backward(time_row: TimeRow, shape: str, provider: str) -> None:
    time_row(shape, FORWARD_BACKWARD, provider)
