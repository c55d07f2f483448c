"""The machine for PTX: each fault that it finds, in a kernel that has it, and instructions against NumPy and torch."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx import machine, reader

DECLARATIONS = """
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<80>;
.reg .b64 %d<16>;
"""
# %d1 and %d2: the tensors; %r1: the thread; %d3 and %d4: their elements of 4 bytes of this thread; %r2: bytes to it
START = """
ld.param.u64 %d1, [a];
ld.param.u64 %d2, [b];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
cvt.u64.u32 %d3, %r2;
add.s64 %d4, %d2, %d3;
add.s64 %d3, %d1, %d3;
mov.b32 %r3, shared;
add.s32 %r3, %r3, %r2;
"""


def kernel(body: str) -> machine.Kernel:
    """A kernel of two tensors, with dynamic shared memory: %r3 is the address of this thread's word there."""
    return machine.load(
        f""".version 8.0
        .target sm_90a
        .extern .shared .align 1024 .b8 shared[];
        .visible .entry tested(.param .u64 a, .param .u64 b)
        {{ {DECLARATIONS} {START} {body}
        ret; }}"""
    )


def region(x: Tensor, shadow: Tensor | None = None) -> machine.Region:
    return machine.Region(x.data_ptr(), x.nbytes, "a tensor", shadow)


def run(
    body: str,
    a: Tensor,
    b: Tensor,
    *,
    threads: int = 64,
    blocks: int = 1,
    shared: int = 4096,
    seed: int = 0,
    **shadow: Any,
) -> machine.Report:
    return kernel(body).run(
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        parameters=struct.pack("QQ", a.data_ptr(), b.data_ptr()),
        shared=shared,
        memory=[region(a, **shadow), region(b)],
        seed=seed,
    )


# For each fault: its kind (which may depend on the order of warps), a kernel with it, and what to replace to mend it.
FAULTS = {
    "register": ("uninitialised", "add.s32 %r5, %r4, 1;", ("%r4", "%r1")),
    "register, in some lanes": (
        "uninitialised",
        "setp.lt.u32 %p1, %r1, 40; @%p1 mov.u32 %r4, 1; st.global.b32 [%d3], %r4;",
        ("@%p1 mov", "mov"),
    ),
    "predicate": ("uninitialised", "@%p1 st.global.b32 [%d3], %r1;", ("@%p1", "")),
    "shared memory": (
        "uninitialised",
        "@%p1 st.shared.b32 [%r3], 1; ld.shared.b32 %r5, [%r3];".replace("@%p1", "setp.ne.u32 %p1, %r1, 33; @%p1"),
        ("@%p1 st", "st"),
    ),
    "past the tensor": ("bounds", "ld.global.b32 %r5, [%d3+8];", ("+8", "+4")),
    "before the tensor": ("bounds", "st.global.b32 [%d3+-8], 0;", ("+-8", "")),
    "past shared memory": ("bounds", "st.shared.b32 [%r3+4096], 0;", ("+4096", "+2048")),
    "before shared memory": ("bounds", "st.shared.b32 [%r2], 0;", ("%r2", "%r3")),
    "global address": ("misaligned", "ld.global.b32 %r5, [%d3+2];", ("+2", "")),
    "vector in global memory": ("misaligned", "ld.global.v2.b32 {%r5, %r6}, [%d1+4];", ("+4", "+8")),
    "shared address": (
        "misaligned",
        "st.shared.v4.b32 [%r3], {0, 0, 0, 0};",
        ("%r3]", "%r4]", "shl.b32 %r4, %r1, 4; add.s32 %r4, %r4, 2048;"),
    ),
    "read of what another warp writes": (
        "race|uninitialised",
        "st.shared.b32 [%r3], 1; bar.warp.sync -1; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];",
        ("bar.warp.sync -1", "bar.sync 0"),
    ),
    "write to what another warp reads": (
        "race",
        """st.shared.b32 [%r3], 1; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4]; bar.warp.sync -1;
        st.shared.b32 [%r3], 2;""",
        ("bar.warp.sync -1", "bar.sync 0"),
    ),
    "other bits from another warp": ("race", "mov.b32 %r4, shared; st.shared.b32 [%r4], %r1;", ("%r1;", "7;")),
    "other bits from another lane": (
        "race",
        "mov.b32 %r4, shared; setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r4], %r1;",
        ("[%r4], %r1", "[%r4], 7"),
    ),
    "lanes without bar.warp.sync": (
        "race",
        "st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];",
        ("xor", "bar.warp.sync -1; xor"),
    ),
    "some warps' barrier": (
        "race|uninitialised",
        """st.shared.b32 [%r3], 1; bar.sync 1, 64; xor.b32 %r4, %r3, 256; ld.shared.b32 %r5, [%r4];""",
        ("bar.sync 1, 64", "bar.sync 1, 128"),
    ),
    "barrier in a branch": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 10; @%p1 bra $end; bar.sync 0;\n$end:",
        ("%r1, 10", "%r1, 0"),
    ),
    "barrier that a warp misses": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra $end; bar.sync 0;\n$end:",
        ("%r1, 32", "%r1, 0"),
    ),
    "two barriers": (
        "barrier",
        "shr.u32 %r4, %r1, 5; bar.sync %r4;",
        ("%r1, 5", "%r1, 6"),
    ),
    "shuffle in a branch": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 10; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;",
        ("@%p1", ""),
    ),
    "matrix product in a branch": (
        "barrier",
        "setp.lt.u32 %p1, %r1, 10; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];",
        ("@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3]", "mov.b32 %r4, 0"),
    ),
    "copy without wait": (
        "async copy",
        "cp.async.ca.shared.global [%r3], [%d3], 4; cp.async.commit_group; ld.shared.b32 %r5, [%r3];",
        ("ld.shared", "cp.async.wait_group 0; ld.shared"),
    ),
    "wait for the group before": (
        "async copy",
        """cp.async.ca.shared.global [%r3], [%d3], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+1024], [%d3], 4; cp.async.commit_group; cp.async.wait_group 1;
        ld.shared.b32 %r5, [%r3+1024]; cp.async.wait_group 0;""",
        ("%r5, [%r3+1024]", "%r5, [%r3]"),
    ),
    "copy that another warp waits for": (
        "race|async copy|uninitialised",
        """cp.async.ca.shared.global [%r3], [%d3], 4; cp.async.wait_all;
        xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];""",
        ("xor", "bar.sync 0; xor"),
    ),
    "write under a copy": (
        "async copy",
        "cp.async.ca.shared.global [%r3], [%d3], 4; st.shared.b32 [%r3], 1; cp.async.wait_all;",
        ("st.shared.b32 [%r3], 1; cp.async.wait_all;", "cp.async.wait_all; st.shared.b32 [%r3], 1;"),
    ),
    "copy at the end": (
        "async copy",
        "cp.async.ca.shared.global [%r3], [%d3], 4; cp.async.commit_group;",
        ("commit_group", "wait_all"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_mended_kernel_runs(name: str) -> None:
    kind, body, (old, new, *before) = FAULTS[name]
    body += "\nret;"
    threads = 128 if name == "some warps' barrier" else 64
    a, b = torch.zeros(threads + 1, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32)
    for seed in range(3):
        with pytest.raises(machine.Fault, match="in tested, line") as raised:
            run(body, a, b, threads=threads, seed=seed)
        assert re.fullmatch(kind, raised.value.kind)
        mended = "".join(before) + body.replace(old, new)
        assert mended != body
        run(mended, a, b, threads=threads, seed=seed)


@pytest.mark.parametrize(
    "body",
    [
        "mov.u32 %r4, %ctaid.x; st.global.b32 [%d3], %r4;",
        "ld.global.b32 %r5, [%d3]; mov.u32 %r4, %ctaid.x; setp.eq.u32 %p1, %r4, 1; @%p1 st.global.b32 [%d3], 0;",
    ],
    ids=["two write", "one writes, one reads"],
)
def test_blocks_that_race_in_global_memory(body: str) -> None:
    for seed in range(4):
        a, b = torch.zeros(2, 64, dtype=torch.int32)
        with pytest.raises(machine.Fault, match="race"):
            run(body, a, b, blocks=2, seed=seed)
        run(body, a, b, blocks=1, seed=seed)


def test_blocks_may_write_the_same_bits() -> None:
    a, b = torch.zeros(2, 64, dtype=torch.int32)
    run("st.global.b32 [%d3], 5;", a, b, blocks=3)
    assert (a == 5).all()


def test_memory_is_unwritten_until_it_is_written() -> None:
    a, b = torch.zeros(2, 64, dtype=torch.int32)
    shadow = torch.zeros(256, dtype=torch.uint8)
    with pytest.raises(machine.Fault, match="uninitialised"):
        run("ld.global.b32 %r4, [%d3];", a, b, shadow=shadow)
    run("st.global.b32 [%d3], 1; ld.global.b32 %r4, [%d3];", a, b, threads=32, shadow=shadow)
    assert shadow.tolist() == [1] * 128 + [0] * 128


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(machine.UnknownInstruction, match=r"line 20 .* of tested.* no instruction bogus.f32"):
        kernel("bogus.f32 %r4, %r1;")
    with pytest.raises(machine.UnknownInstruction, match=r"add.s32 with these operands"):
        kernel("add.s32 %r4, %d1, %r1;")


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


def test_tf32_rounds_ties_away_from_zero() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 3.14159274])
    expected = torch.tensor([1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1.0, 3.140625])
    assert unary("cvt.rna.tf32.f32 %r5, %r4;", x).view(torch.float32).equal(expected)


APPROXIMATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "ex2": (torch.exp2, 2.0**-22),
    "rcp": (torch.reciprocal, 2.0**-23),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_use_the_error_that_they_may_have(name: str) -> None:
    function, bound = APPROXIMATIONS[name]
    x = 8 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    results = [unary(f"{name}.approx.ftz.f32 %r5, %r4;", x, seed).view(torch.float32) for seed in (1, 1, 2)]
    exact = function(x.double())
    errors = [(result / exact - 1).abs().max().item() for result in results]
    assert 0.8 * bound < max(errors) <= bound
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


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


# Matrix products. A layout is a function of (row, column) in 32-bit words or 16-bit halves of the registers.
MMA = {
    "f16": ("m16n8k16", torch.float16, 16),
    "bf16": ("m16n8k16", torch.bfloat16, 16),
    "tf32": ("m16n8k8", torch.float32, 8),
}


def fragments(x: Tensor) -> Tensor:
    """The registers (., 32 lanes) int32 of a matrix: lane l has 4 bytes of row l // 4 of each block of 8 x 16 bytes."""
    words = x.contiguous().view(torch.int32)  # (rows, words of 4 bytes)
    blocks = words.unflatten(0, (-1, 8)).unflatten(2, (-1, 4)).permute(2, 0, 1, 3)  # columns' blocks first
    return blocks.reshape(-1, 32)


def accumulators(d: Tensor) -> Tensor:
    """The matrix (16, N) of registers (N / 2, 32 lanes) float32."""
    return d.view(-1, 2, 2, 8, 4).permute(1, 3, 0, 4, 2).reshape(16, -1)


def mma(kind: str, a: Tensor, b: Tensor, c: float = 0.0, seed: int = 0) -> Tensor:
    shape = MMA[kind][0]
    operands = torch.cat([fragments(a), fragments(b.T)]).contiguous()
    out = torch.zeros(4, 32)
    loads = "".join(f"ld.global.b32 %r{10 + n}, [%d3+{128 * n}];" for n in range(6))
    stores = "".join(f"st.global.b32 [%d4+{128 * n}], %r{20 + n};" for n in range(4))
    value = f"0f{struct.unpack('I', struct.pack('f', c))[0]:08X}"
    product = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}}, "
    product += f"{{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{{', '.join([value] * 4)}}};"
    run(loads + product + stores, operands, out, threads=32, seed=seed)
    return accumulators(out)


def matrices(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def cut(x: Tensor) -> Tensor:
    """Without the bits that tf32 products ignore."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


@pytest.mark.parametrize("kind", MMA)
def test_mma(kind: str) -> None:
    _, dtype, K = MMA[kind]
    a, b = matrices(dtype, (16, K), (K, 8))
    exact = cut(a).double() @ cut(b).double()
    results = [mma(kind, a, b, 0.5, seed) for seed in range(8)]
    size = cut(a).double().abs() @ cut(b).double().abs() + 0.5
    for result in results:
        assert ((result - exact - 0.5).abs() <= 2.0**-22 * size).all()
    assert any(not result.equal(results[0]) for result in results)  # orders and cuts differ


def test_sums_of_products_are_cut_off_and_not_rounded() -> None:
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    a[:, 0], b[0] = 1, 1 - 2.0**-11
    a[:, 1:8], b[1:8] = 2.0**-12, 2.0**-13
    assert mma("f16", a, b).eq(1 - 2.0**-11 + 3 * 2.0**-24).all()  # 7 * 2^-25, of which the last bit is lost


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans: str) -> None:
    x = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(4, 32, dtype=torch.int32)
    body = """ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5]; st.shared.v4.b32 [%r4], {%r10, %r11, %r12, %r13};
    bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];"""
    address = (
        "shl.b32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; add.s64 %d5, %d1, %d5; mov.b32 %r4, shared; add.s32 %r4, %r4, %r5;"
    )
    stores = "".join(f"st.global.b32 [%d4+{128 * n}], %r{20 + n};" for n in range(4))
    run(address + body.replace("TRANS", trans) + stores, x, out, threads=32)
    assert out.view(torch.int16).view(4, 8, 8).equal(x.mT if trans else x)


def descriptor(width: int, leading: int, stride: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | {16: 0, 128: 1, 64: 2, 32: 3}[width] << 62


def stored(x: Tensor, width: int, transposed: bool) -> tuple[Tensor, int]:
    """A matrix (rows, K) as bytes of shared memory for wgmma, and the descriptor: tiles of 8 lines of `width` bytes.

    Lines are rows, or columns if transposed; 16 bytes trade places with others of their tile, by the line's number.
    """
    lines = (x.T if transposed else x).contiguous().view(torch.uint8)  # (lines, bytes)
    count, length = lines.shape
    pad = -length % width
    lines = torch.nn.functional.pad(lines, (0, pad))
    tiles = (
        lines.view(count // 8, 8, -1, width // 16, 16).permute(2, 0, 1, 3, 4).contiguous()
    )  # (across, down, 8, ., 16)
    line = torch.arange(8)
    swap = line * width // 128 % (width // 16)
    place = torch.arange(width // 16)[None] ^ swap[:, None]  # (8, width / 16)
    swapped = torch.zeros_like(tiles)
    for n in range(8):
        swapped[:, :, n, place[n]] = tiles[:, :, n]
    return swapped.reshape(-1), descriptor(width, tiles.shape[1] * 8 * width, 8 * width)


WGMMA = [(kind, width, False) for kind in MMA for width in (16, 32, 64, 128)]
WGMMA += [(kind, width, True) for kind in ("f16", "bf16") for width in (32, 64, 128)]


@pytest.mark.parametrize(("kind", "width", "transposed"), WGMMA)
def test_wgmma(kind: str, width: int, transposed: bool) -> None:
    _, dtype, K = MMA[kind]
    a, b = matrices(dtype, (64, K), (16, K))
    exact = cut(a).double() @ cut(b).double().T
    size = cut(a).double().abs() @ cut(b).double().abs().T
    for in_registers in (False, True):
        d = wgmma(kind, a, b, width, transposed, in_registers=in_registers)
        assert ((d - exact).abs() <= 2.0**-22 * size).all()


def wgmma(
    kind: str,
    a: Tensor,
    b: Tensor,
    width: int,
    transposed: bool,
    in_registers: bool = False,
    change: tuple[str, str] = ("", ""),
) -> Tensor:
    """a (64, K) b (16, K)^T by a group of 4 warps. `change`: what to replace in the kernel, by what."""
    K = a.shape[1]
    (a_bytes, a_descriptor), (b_bytes, b_descriptor) = stored(a, width, transposed), stored(b, width, transposed)
    begin = -(-len(a_bytes) // 1024) * 1024
    image = torch.zeros(begin + 4096, dtype=torch.uint8)
    image[: len(a_bytes)], image[begin : begin + len(b_bytes)] = a_bytes, b_bytes
    registers = torch.stack([fragments(rows) for rows in a.chunk(4)], 1).reshape(-1)  # (4 registers, 4 warps, 32)
    source = torch.cat([image.view(torch.int32), registers])
    out = torch.zeros(8, 128)
    copies = "".join(f"ld.global.b32 %r9, [%d3+{n}]; st.shared.b32 [%r3+{n}], %r9;" for n in range(0, len(image), 512))
    loads = "".join(f"ld.global.b32 %r{20 + n}, [%d3+{len(image) + 512 * n}];" for n in range(4))
    addresses = "".join(
        f"mov.b32 %r4, shared; shr.u32 %r4, %r4, 4; cvt.u64.u32 %d{n}, %r4; add.s64 %d{n}, %d{n}, {value};"
        for n, value in ((10, a_descriptor), (11, b_descriptor + (begin >> 4)))
    )
    accumulated = "{" + ", ".join(f"%r{30 + n}" for n in range(8)) + "}"
    first = "{%r20, %r21, %r22, %r23}" if in_registers else "%d10"
    trans = "" if kind == "tf32" else f", {int(transposed)}" if in_registers else f", {int(transposed)}" * 2
    body = f"""{copies} {loads} {addresses} fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k{K}.f32.{kind}.{kind} {accumulated}, {first}, %d11, 0, 1, 1{trans};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    body += "".join(f"st.global.b32 [%d4+{512 * n}], %r{30 + n};" for n in range(8))
    assert change[0] in body
    body = body.replace(*change)
    run(body, source, out, threads=128, shared=len(image))
    return torch.cat([accumulators(d) for d in out.view(8, 4, 32).transpose(0, 1).contiguous()])


WAIT = "wgmma.wait_group.sync.aligned 0;"
WGMMA_FAULTS = {
    "no proxy fence": ("async copy", "fence.proxy.async.shared::cta;", ""),
    "no fence": ("async copy", "wgmma.fence.sync.aligned;", ""),
    "no wait": ("async copy", WAIT, ""),
    "overwritten before the wait": ("race", WAIT, f"bar.sync 0; st.shared.b32 [%r3], 1; {WAIT}"),
    "no barrier": ("uninitialised|race", "bar.sync 0;", ""),
}


@pytest.mark.parametrize("name", WGMMA_FAULTS)
def test_faults_of_wgmma(name: str) -> None:
    kind, *change = WGMMA_FAULTS[name]
    a, b = matrices(torch.float16, (64, 16), (16, 16))
    with pytest.raises(machine.Fault) as raised:
        wgmma("f16", a, b, 32, False, change=tuple(change))
    assert re.fullmatch(kind, raised.value.kind)


def test_parameters_are_aligned_as_the_driver_packs_them() -> None:
    text = """.entry f(.param .u32 a, .param .u64 .ptr .global .align 1 b, .param .u32 c, .param .align 16 .b8 d[24],
    .param .f32 e)\n{ ret; }"""
    places = [(each.name, each.offset, each.size) for each in reader.read(text)["f"].parameters]
    assert places == [("a", 0, 4), ("b", 8, 8), ("c", 16, 4), ("d", 32, 24), ("e", 56, 4)]
