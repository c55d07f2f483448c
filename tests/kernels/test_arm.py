"""The CPU kernels as compiled for 64-bit ARM. The rules that they share with all implementations, and execution under
qemu, are those of the subjects `neon` and `neon_bf16` (conformance.py).
"""

from __future__ import annotations

import pytest

from tests.arm import loops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("arm_compiled")]


def test_no_sum_of_a_product_is_spilled() -> None:
    """Neither in the tiles that fill the registers nor in the smaller ones; each element is one multiply-add."""
    found = list(loops.product_loops())
    assert {(loop.isa, loop.element) for loop in found} == {
        ("neon", "Float"),
        ("neon_bf16", "Float"),
        ("neon_bf16", "Bf16Pair"),
    }
    assert any(loop.rows * loop.vectors == 24 for loop in found)
    for loop in found:
        assert loop.spills == 0, loop
        assert loop.multiply_adds % (loop.rows * loop.vectors) == 0, loop
