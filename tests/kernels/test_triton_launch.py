"""What Triton compiles and launches for calls on a GPU, over the stub driver, hence in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

COMPILED = {"TRITON_INTERPRET": None}  # unset: the kernels are compiled

KERNELS = """
import torch
from amflow_kernels.impl.triton import launch
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu import stub_driver


def compiled(q, k, pair=False, **options):
    '''The compiled kernels of a forward and a backward of q and k.'''
    if pair:
        options.update(q_b=q, k_b=k)
    with stub_driver.machine(90) as launches:
        flow, saved = launch.am_flow(Problem(q, k, **options))
        launch.am_flow_backward(Problem(q, k, **options), flow, saved, [True, True, False, False])
    return [each.compiled for each in launches]


def same_kernels(*shapes, dtype, **options):
    '''All shapes (B, T, heads, N, D) run the kernels that were compiled for the first.'''
    first = compiled(*torch.empty(2, *shapes[0], dtype=dtype, device="meta"), **options)
    for shape in shapes[1:]:
        again = compiled(*torch.empty(2, *shape, dtype=dtype, device="meta"), **options)
        assert all(x is y for x, y in zip(first, again, strict=True)), shape
"""


@pytest.mark.parametrize(("dtype", "D"), [("bfloat16", 16), pytest.param("bfloat16", 72, marks=pytest.mark.slow)])
def test_sizes_compile_nothing_anew(dtype: str, D: int, cold_python: Callable[..., Any]) -> None:
    """Another number of clips, frames, heads or tokens runs compiled kernels, as long as rows take as many tiles."""
    code = f"""
D = {D}
shapes = [(1, 2, 1, 18, D), (2, 16, 1, 18, D), (3, 17, 2, 19, D), (1, 18, 12, 20, D), (200, 33, 16, 31, D)]
same_kernels(*shapes, dtype=torch.{dtype})
same_kernels(*shapes, dtype=torch.{dtype}, pair=True)
"""
    cold_python(KERNELS + code, env=COMPILED)


def test_strides_compile_nothing_anew(cold_python: Callable[..., Any]) -> None:
    """Frames as views of other tensors run compiled kernels, as long as their loads can be as wide."""
    code = """
qkv = torch.empty(2, 4, 20, 3, 2, 16, dtype=torch.bfloat16).permute(3, 0, 1, 4, 2, 5)
contiguous = torch.empty(2, 2, 4, 2, 20, 16, dtype=torch.bfloat16)
assert all(x is y for x, y in zip(compiled(*qkv[:2]), compiled(*contiguous), strict=True))
"""
    cold_python(KERNELS + code, env=COMPILED)


def test_a_width_that_8_divides_has_wide_loads(cold_python: Callable[..., Any]) -> None:
    """Rows of 24 elements begin at multiples of 16 bytes, although 16 does not divide their number."""
    code = """
(forward, *_) = compiled(*torch.empty(2, 1, 2, 1, 64, 24, dtype=torch.bfloat16))
loads = [line for line in forward.asm["ptx"].splitlines() if "cp.async" in line or "ld.global" in line]
assert any(", 0x10" in line or ".v4.b32" in line for line in loads), loads
"""
    cold_python(KERNELS + code, env=COMPILED)
