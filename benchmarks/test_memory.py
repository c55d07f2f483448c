"""Peak working memory besides inputs and results, each figure from its own process."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory
from benchmarks.conftest import MEMORY
from benchmarks.providers import DIRECTIONS, PROVIDERS
from benchmarks.shapes import MEMORY_SHAPES


@pytest.mark.parametrize("provider", ["ours", "ours_bf16", "eager", "compile", "sdpa"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", MEMORY_SHAPES)
def test_memory(request: pytest.FixtureRequest, shape: str, direction: str, provider: str) -> None:
    figures = memory.measure(PROVIDERS[provider], MEMORY_SHAPES[shape], direction, torch.get_num_threads())
    request.config.stash[MEMORY].append(figures)
