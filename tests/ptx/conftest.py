"""Fixtures of the tests that execute compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ptx import worker


@pytest.fixture
def sm_80() -> Iterator[worker.Remote]:
    """impl="triton" runs on CPU tensors as on a GPU of compute capability 8.0 with one multiprocessor."""
    with worker.gpu(80) as gpu:
        yield gpu
