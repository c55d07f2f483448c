"""Peak working memory besides inputs and results, each figure from its own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import memory
from benchmarks.conftest import MEMORY
from benchmarks.providers import DIRECTIONS, PROVIDERS
from benchmarks.shapes import Shape


@pytest.mark.parametrize("provider", ["ours", "ours_bf16", "eager", "compile", "sdpa"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory(
    request: pytest.FixtureRequest, in_time: Callable[[str], None], shape: Shape, direction: str, provider: str
) -> None:
    if request.config.getoption("--bench-smoke") and provider != "ours":
        pytest.skip("a smoke run measures the memory of am_flow only")
    in_time(f"memory, {direction}, {shape}, {PROVIDERS[provider].label}")
    figures = memory.measure(PROVIDERS[provider], shape, direction, torch.get_num_threads())
    request.config.stash[MEMORY].append(figures)
