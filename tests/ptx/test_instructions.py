"""Instructions of the machine for PTX against NumPy and torch."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx import machine
from tests.ptx.by_hand import kernel, region, run

WORDS = np.array([0, 1, 2, 31, 32, 33, 255, 2**31 - 1, 2**31, 2**32 - 1, 12345678, 3141592653], np.uint32)
FLOATS = np.array([0.0, -0.0, 1, -1, 1.5, 2.75, -1e-3, 1e-38, 1e-42, 3e38, np.inf, -np.inf, np.nan], np.float32)
i32, u32, f32 = np.int32, np.uint32, np.float32


def wide(x: Any) -> Any:
    return x.astype(np.int64)


INTEGERS: dict[str, tuple[type, Callable[..., Any]]] = {
    "add.s32": (u32, lambda a, b: a + b),
    "sub.s32": (u32, lambda a, b: a - b),
    "mul.lo.s32": (u32, lambda a, b: a * b),
    "mul.hi.s32": (i32, lambda a, b: wide(a) * wide(b) >> 32),
    "min.s32": (i32, np.minimum),
    "max.s32": (i32, np.maximum),
    "min.u32": (u32, np.minimum),
    "and.b32": (u32, np.bitwise_and),
    "or.b32": (u32, np.bitwise_or),
    "xor.b32": (u32, np.bitwise_xor),
    "shl.b32": (u32, lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0)),
    "shr.u32": (u32, lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), 0)),
    "shr.s32": (i32, lambda a, b: a >> np.minimum(b.view(u32), 31).astype(i32)),
}
REALS: dict[str, Callable[..., Any]] = {
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "div.rn.f32": np.divide,
    "max.f32": np.fmax,
    "min.f32": np.fmin,
}


def pairs(values: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All pairs of the values, as tensors of int32 and as they were."""
    x, y = (each.ravel() for each in np.meshgrid(values, values))
    return torch.from_numpy(x.view(i32).copy()), torch.from_numpy(y.view(i32).copy()), x, y


BINARY = "ld.global.b32 %r4, [%d3]; ld.global.b32 %r5, [%d4]; NAME %r6, %r4, %r5; st.global.b32 [%d4], %r6;"


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_instructions(name: str) -> None:
    kind, function = INTEGERS[name]
    a, b, x, y = pairs(WORDS)
    run(BINARY.replace("NAME", name), a, b, threads=len(x))
    expected = function(x.view(kind), y.view(kind)).astype(kind)
    assert (b.numpy().view(kind) == expected).all()


@pytest.mark.parametrize("name", ["div.s32", "rem.s32"])
def test_integer_division_rounds_toward_zero(name: str) -> None:
    a, b, x, y = pairs(np.array([1, 2, 7, -7, -2, 100, 2**31 - 1], i32))
    run(BINARY.replace("NAME", name), a, b, threads=len(x))
    quotient = torch.div(torch.from_numpy(x), torch.from_numpy(y), rounding_mode="trunc")
    expected = quotient if name == "div.s32" else torch.from_numpy(x) - quotient * torch.from_numpy(y)
    assert b.equal(expected)


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
@pytest.mark.parametrize("name", REALS)
def test_float_instructions(name: str) -> None:
    a, b, x, y = pairs(FLOATS)
    run(BINARY.replace("NAME", name), a, b, threads=len(x))
    np.testing.assert_array_equal(b.numpy().view(f32), REALS[name](x, y))


COMPARISONS: dict[str, tuple[type, Callable[..., Any]]] = {
    "setp.lt.s32": (i32, np.less),
    "setp.lt.u32": (u32, np.less),
    "setp.ge.s32": (i32, np.greater_equal),
    "setp.eq.b32": (u32, np.equal),
    "setp.eq.f32": (f32, np.equal),
    "setp.neu.f32": (f32, np.not_equal),
    "setp.lt.f32": (f32, np.less),
    "setp.num.f32": (f32, lambda x, y: (x == x) & (y == y)),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str) -> None:
    kind, function = COMPARISONS[name]
    a, b, x, y = pairs(FLOATS if kind is f32 else WORDS)
    body = BINARY.replace("NAME %r6, %r4, %r5", f"{name} %p1, %r4, %r5; selp.b32 %r6, 1, 0, %p1")
    run(body, a, b, threads=len(x))
    assert (b.numpy() == function(x.view(kind), y.view(kind))).all()


def unary(instruction: str, x: Tensor, seed: int = 0) -> Tensor:
    """The bits of %r5 for each 32 bits of x in %r4."""
    a, b = x.view(torch.int32).clone(), torch.zeros(len(x), dtype=torch.int32)
    run(f"ld.global.b32 %r4, [%d3]; {instruction} st.global.b32 [%d4], %r5;", a, b, threads=len(x), seed=seed)
    return b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(500), torch.from_numpy(FLOATS[:-1]), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])])
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    bits = unary(f"cvt.rn.{kind}.f32 %h1, %r4; mov.b32 %r5, {{%h1, %h1}};", x)
    rounded = x.to(dtype)
    assert bits.to(torch.int16).equal(rounded.view(torch.int16))
    wide_again = unary(f"cvt.rn.{kind}x2.f32 %r5, %r4, %r4; mov.b32 {{%h1, %h2}}, %r5; cvt.f32.{kind} %r5, %h2;", x)
    assert wide_again.view(torch.float32).equal(rounded.float())


def test_prmt_picks_bytes_and_signs() -> None:
    x = torch.tensor([0x0F8E2C3D, -0x2], dtype=torch.int32)
    expected = torch.tensor(
        [0x3D0FFF44, 0xFEFFFF44 - 2**32], dtype=torch.int32
    )  # bytes 0 and 3 of a, the sign of 2, byte 4
    assert unary("prmt.b32 %r5, %r4, 0x11223344, 0x03a4;", x).equal(expected)


def test_tf32_rounds_ties_away_from_zero() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 3.14159274])
    expected = torch.tensor([1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1.0, 3.140625])
    assert unary("cvt.rna.tf32.f32 %r5, %r4;", x).view(torch.float32).equal(expected)


APPROXIMATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "ex2.approx.ftz.f32 %r5, %r4;": (lambda x: torch.exp2(x).float().double(), 2),  # from the rounded result
    "rcp.approx.ftz.f32 %r5, %r4;": (torch.reciprocal, 1),
    "mov.b32 %r5, 0f40400000; div.full.f32 %r5, %r5, %r4;": (lambda x: 3 / x, 2),
}


@pytest.mark.parametrize("code", APPROXIMATIONS)
def test_approximations_use_the_error_that_they_may_have(code: str) -> None:
    """Which the manual gives in units in the last place."""
    function, bound = APPROXIMATIONS[code]
    x = 8 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    results = [unary(code, x, seed).view(torch.float32) for seed in (1, 1, 2)]
    exact = function(x.double())
    unit = 2.0 ** (torch.frexp(exact).exponent.double() - 24)
    errors = [((result.double() - exact) / unit).abs().max().item() for result in results]
    assert 0.9 * bound < max(errors) <= bound
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_powers_of_two_that_no_float_holds_are_0() -> None:
    x = torch.tensor([-127.0, -140.0, -151.5, -1e3, -torch.inf])
    for seed in range(4):
        assert unary("ex2.approx.ftz.f32 %r5, %r4;", x, seed).view(torch.float32).equal(torch.zeros(5))


@pytest.mark.parametrize("fp_fusion", [True, False])
@pytest.mark.parametrize("sum_of", ["add.f32 %r6, %r5, %r4", "sub.f32 %r6, %r5, %r4", "sub.f32 %r6, %r4, %r5"])
def test_a_seed_picks_which_products_are_fused(sum_of: str, fp_fusion: bool) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    rounded = x * x
    exact = x.double() * x.double()
    sign = -1 if "sub.f32 %r6, %r4" in sum_of else 1
    other = -1 if "sub.f32 %r6, %r5" in sum_of else 1
    choices = [(sign * product + other * x).float() for product in (rounded.double(), exact)]
    text = kernel(f"ld.global.b32 %r4, [%d3]; mul.f32 %r5, %r4, %r4; {sum_of}; st.global.b32 [%d4], %r6;").text
    seen = set()
    for seed in range(12):
        y = torch.empty(64)
        parameters = struct.pack("QQ", x.data_ptr(), y.data_ptr())
        memory = [region(x), region(y)]
        tested = machine.Kernel(text, fp_fusion)
        tested.run(grid=(1, 1, 1), block=(64, 1, 1), parameters=parameters, memory=memory, seed=seed)
        seen.add(next(n for n, choice in enumerate(choices) if y.equal(choice)))
    assert seen == ({0, 1} if fp_fusion else {0})


def test_lanes_come_together_after_a_branch() -> None:
    a, b = torch.zeros(2, 64, dtype=torch.int32)
    run(
        """setp.lt.u32 %p1, %r1, 10; mov.b32 %r4, 0;
        @%p1 bra $small;
        add.s32 %r4, %r4, 100; bra.uni $joined;
        $small:
        add.s32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, %r1; @%p2 bra $small;
        $joined:
        shfl.sync.bfly.b32 %r5, %r4, 31, 31, -1; st.global.b32 [%d3], %r5;""",
        a,
        b,
    )
    before = torch.tensor([1, *range(1, 10), *([100] * 54)]).view(2, 32)
    assert a.view(2, 32).equal(before.flip(1).int())


def test_shuffles() -> None:
    a, b = torch.zeros(2, 32, dtype=torch.int32)
    run(
        """shfl.sync.idx.b32 %r4, %r1, 5, 31, -1; shfl.sync.idx.b32 %r5, %r1, 5, 0x181f, -1;
        st.global.b32 [%d3], %r4; st.global.b32 [%d4], %r5;""",
        a,
        b,
        threads=32,
    )
    assert a.eq(5).all()
    assert b.equal((torch.arange(32) // 8 * 8 + 5).int())  # segments of 8 lanes


def test_functions_and_addresses_of_parameters() -> None:
    a, b = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    function = """.func twice_more(.param .b64 to, .param .b32 x)
    {
        .reg .b32 %r<3>; .reg .b64 %rd<2>; .reg .pred %p<2>;
        ld.param.u64 %rd1, [to]; ld.param.u32 %r1, [x];
        setp.lt.s32 %p1, %r1, 20; @%p1 bra $out;
        add.s32 %r2, %r1, %r1; st.u32 [%rd1], %r2;
        $out: ret;
    }
    """
    body = """mov.b64 %d8, a; ld.param.u64 %d9, [%d8+8]; ld.global.b32 %r5, [%d3];
    { .param .b64 p0; st.param.b64 [p0+0], %d4; .param .b32 p1; st.param.b32 [p1+0], %r5;
    call.uni twice_more, (p0, p1); }
    add.s32 %r6, %r5, 1;
    { .param .b64 p0; st.param.b64 [p0], %d3; .param .b32 p1; st.param.b32 [p1], %r6;
    call.uni twice_more, (p0, p1); }"""
    run(body, a, b, before=function)
    x = torch.arange(64, dtype=torch.int32)
    assert b.equal(torch.where(x < 20, 0, 2 * x))
    assert a.equal(torch.where(x + 1 < 20, x, 2 * x + 2))


@pytest.mark.parametrize("stride", [1, 2, 8, 32])
def test_counts_of_conflicts_and_sectors(stride: int) -> None:
    a, b = torch.zeros(32 * stride, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    report = run(
        f"""mul.lo.s32 %r4, %r2, {stride}; cvt.u64.u32 %d5, %r4; add.s64 %d5, %d1, %d5; ld.global.b32 %r5, [%d5];
        mov.b32 %r6, shared; add.s32 %r6, %r6, %r4; st.shared.b32 [%r6], %r5;""",
        a,
        b,
        threads=32,
    )
    assert report.counts["shared conflicts"] == min(stride, 32) - 1
    begin = a.data_ptr() // 4
    assert report.counts["global sectors read"] == len({(begin + n * stride) // 8 for n in range(32)})
    assert report.opcodes["ld.global.b32"] == report.counts["shared"] == 1
    assert report.counts["all"] == report.opcodes.total()
