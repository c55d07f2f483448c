"""What the compile report counts by executing kernels, which are compiled: this takes a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_counts_are_those_of_an_element_of_a_map(cold_python: Callable[..., Any]) -> None:
    """Two exponentials in a forward, one in each pass of a backward; one matrix instruction for 16 x 8 elements."""
    code = """
import torch
from benchmarks.gpu import executed
counts = executed.counts(torch.bfloat16, 64, 16, 80)
assert set(counts) == {"strip", "bwd_strip_q", "bwd_strip_k"}
assert [kernel["ex2"] for kernel in counts.values()] == [2, 1, 1], counts
assert counts["strip"]["MMA"] == 32 / (16 * 8), counts
assert counts["strip"]["conflicts"] <= counts["strip"]["wavefronts"] <= counts["strip"]["shared"]
assert counts["strip"]["sectors"] > 0
"""
    cold_python(code, env={"TRITON_INTERPRET": None})
