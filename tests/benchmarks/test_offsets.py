"""The rule that no argument of a kernel is multiplied in 32 bits, on excerpts of Triton's intermediate code."""

from __future__ import annotations

import pytest

from benchmarks.gpu.offsets import findings

HEAD = """
  tt.func public @kernel(%q: !tt.ptr<bf16> loc("q"(#loc)), %q_stride.4: i32 loc(#loc1), %size: i64 loc(#loc2)) {
    %block = tt.get_program_id x : i32 loc(#loc3)
    %stride = tt.splat %q_stride.4 : i32 -> tensor<64x1xi32> loc(#loc4)
    %wide = arith.extsi %q_stride.4 : i32 to i64 loc(#loc5)
"""


@pytest.mark.parametrize(
    "product", ["%q_stride.4, %c64_i32 : i32", "%start, %q_stride.4 : i32", "%rows, %stride : tensor<64x1xi32>"]
)
def test_a_stride_multiplied_in_32_bits_is_found(product: str) -> None:
    """Times a constant or a value, and as a tensor of equal elements."""
    (finding,) = findings(f"{HEAD}    %offset = arith.muli {product} loc(#loc6)\n")
    assert finding == f"%offset = {product.split(' : ')[0].replace(', ', ' * ')} in 32 bits"


@pytest.mark.parametrize(
    "product", ["%wide, %c64_i64 : i64", "%size, %start : i64", "%block, %c64_i32 : i32", "%a, %b : tensor<64x1xi64>"]
)
def test_products_in_64_bits_and_numbers_of_rows_are_not(product: str) -> None:
    assert findings(f"{HEAD}    %offset = arith.muli {product} loc(#loc6)\n") == []
