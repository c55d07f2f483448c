"""The rule that a kernel computes each sum and product in one way, on excerpts of Triton's intermediate code."""

from __future__ import annotations

import pytest

from benchmarks.gpu.layouts import findings

HEAD = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [8, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 128, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 128, 16]}>
#mma2 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 8]}>
#loc1 = loc("/venv/triton/language/standard.py":286:36)
#loc2 = loc("/amflow/kernels/strip.py":115:13)
#loc3 = loc("/amflow/kernels/strip.py":120:13)
#loc4 = loc("/amflow/kernels/strip.py":200:9)
#loc5 = loc("/amflow/kernels/strip.py":210:9)
#loc6 = loc("total"(#loc2))
#loc7 = loc(callsite(#loc6 at #loc4))
#loc8 = loc(callsite(#loc6 at #loc5))
#loc9 = loc(callsite(#loc1 at #loc7))
#loc10 = loc(callsite(#loc1 at #loc8))
#loc11 = loc(callsite(#loc1 at #loc3))
"""


def sum_of(layout: str, loc: str, shape: str = "64x256", axis: int = 1, operation: str = "arith.addf") -> str:
    """A reduction at a location."""
    result = f"tensor<64xf32, #ttg.slice<{{dim = {axis}, parent = {layout}}}>>"
    return f"""    %total = "tt.reduce"(%x) <{{axis = {axis} : i32}}> ({{
    ^bb0(%a: f32 loc(callsite(#loc1 at #loc7)), %b: f32 loc(callsite(#loc1 at #loc7))):
      %c = {operation} %a, %b : f32 loc(#loc12)
      tt.reduce.return %c : f32 loc(#loc9)
    }}) : (tensor<{shape}xf32, {layout}>) -> {result} loc({loc})
"""


def product_by(operation: str, layout: str, loc: str, keys: int = 64) -> str:
    """A product of matrices at a location."""
    q = "tensor<16x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma2, kWidth = 2}>>"
    k = f"!ttg.memdesc<64x{keys}xbf16, #shared, #smem, mutable>"
    return f"    %s = {operation} %q, %k, %zero : {q} * {k} -> tensor<16x{keys}xf32, {layout}> loc({loc})\n"


def test_one_line_that_sums_in_two_layouts_is_found() -> None:
    """Also where the line is reached by two calls: its place is its own, not that of tl.sum nor of the callers."""
    (finding,) = findings(HEAD + sum_of("#mma", "#loc9") + sum_of("#mma1", "#loc10"))
    assert finding.startswith("strip.py:115: sum of 64x256 along axis 1 in 2 ways: ")
    assert "warpsPerCTA = [8, 1]" in finding
    assert "warpsPerCTA = [4, 2]" in finding


@pytest.mark.parametrize(
    "other",
    [
        sum_of("#mma", "#loc10"),
        sum_of("#mma1", "#loc11"),
        sum_of("#mma1", "#loc10", shape="64x64"),
        sum_of("#mma1", "#loc10", axis=0),
    ],
    ids=["same layout", "another line", "another shape", "another axis"],
)
def test_other_sums_may_have_other_layouts(other: str) -> None:
    assert findings(HEAD + sum_of("#mma", "#loc9") + other) == []


def test_maxima_have_the_same_bits_in_any_layout() -> None:
    maxima = [sum_of(layout, "#loc9", operation="arith.maxnumf") for layout in ("#mma", "#mma1")]
    assert findings(HEAD + "".join(maxima)) == []


@pytest.mark.parametrize(
    ("operation", "layout"),
    [("tt.dot", "#blocked"), ("ttng.warp_group_dot", "#mma")],
    ids=["FMA", "another version"],
)
def test_one_line_that_multiplies_by_two_kinds_of_instruction_is_found(operation: str, layout: str) -> None:
    (finding,) = findings(HEAD + product_by("tt.dot", "#mma2", "#loc7") + product_by(operation, layout, "#loc8"))
    assert finding.startswith("strip.py:115: product of 16x64 and 64x64 in 2 ways: ")


def test_products_of_one_kind_are_equal_in_any_layout_and_other_shapes_are_other_products() -> None:
    """Each element of a product is summed by one instruction or thread."""
    products = [product_by("ttng.warp_group_dot", layout, "#loc7") for layout in ("#mma", "#mma1")]
    products.append(product_by("tt.dot", "#mma2", "#loc7", keys=16))
    assert findings(HEAD + "".join(products)) == []
