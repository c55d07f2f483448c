"""The machine for PTX finds each fault, in a kernel that has it, and none in the mended kernel."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ptx import machine, reader
from tests.ptx.by_hand import kernel, run

# For each fault: its kind (which may depend on the order of warps), a kernel with it, and what to replace to mend it.
FAULTS = {
    "register": ("uninitialised", "add.s32 %r5, %r4, 1;", ("%r4", "%r1")),
    "register, in some lanes": (
        "uninitialised",
        "setp.lt.u32 %p1, %r1, 40; @%p1 mov.u32 %r4, 1; st.global.b32 [%d3], %r4;",
        ("@%p1 mov", "mov"),
    ),
    "register of another lane": (
        "uninitialised",
        """setp.lt.u32 %p1, %r1, 32; @%p1 mov.u32 %r4, 1;
        shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1; st.global.b32 [%d3], %r5;""",
        ("@%p1 mov", "mov"),
    ),
    "sum of a register": (
        "uninitialised",
        """setp.lt.u32 %p1, %r1, 32; @%p1 mov.b32 %r4, 1; add.f32 %r5, %r4, %r4; max.f32 %r5, %r5, %r5;
        st.global.b32 [%d3], %r5;""",
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
    "write to what another lane reads": (
        "race",
        """st.shared.b32 [%r3], 1; bar.warp.sync -1; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];
        st.shared.b32 [%r3], 2;""",
        ("[%r4];", "[%r4]; bar.warp.sync -1;"),
    ),
    "ldmatrix without bar.warp.sync": (
        "race",
        """shl.b32 %r4, %r1, 4; mov.b32 %r5, shared; add.s32 %r4, %r4, %r5; st.shared.v4.b32 [%r4], {0, 0, 0, 0};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r4];""",
        ("ldmatrix", "bar.warp.sync -1; ldmatrix"),
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
    "read of global memory that another thread writes": (
        "race",
        """st.global.b32 [%d3], %r1; xor.b32 %r4, %r2, 128; cvt.u64.u32 %d5, %r4; add.s64 %d5, %d1, %d5;
        ld.global.b32 %r5, [%d5];""",
        ("xor", "bar.sync 0; xor"),
    ),
    "write to global memory that another thread reads": (
        "race",
        """xor.b32 %r4, %r2, 4; cvt.u64.u32 %d5, %r4; add.s64 %d5, %d1, %d5; ld.global.b32 %r5, [%d5];
        st.global.b32 [%d3], 7;""",
        ("st", "bar.warp.sync -1; st"),
    ),
    "other bits in global memory from another thread": (
        "race",
        "st.global.b32 [%d1], %r1;",
        ("%r1", "7"),
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
    for seed in range(3):
        a, b = torch.zeros(threads + 1, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32)
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
        "mov.u32 %r4, %ctaid.x; setp.eq.b32 %p1, %r4, 1; @%p1 st.global.b32 [%d3], 0; @!%p1 ld.global.b32 %r5, [%d3];",
    ],
    ids=["two write", "one writes, one reads"],
)
def test_blocks_that_race_in_global_memory(body: str) -> None:
    first = set()
    for seed in range(8):
        a, b = torch.zeros(2, 64, dtype=torch.int32)
        with pytest.raises(machine.Fault, match="race") as raised:
            run(body, a, b, blocks=2, seed=seed)
        first |= set(re.findall(r"block (\d) ", str(raised.value)))
        run(body, a, b, blocks=1, seed=seed)
    assert first == {"0", "1"}  # a seed picks the order


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


def test_garbage_that_nothing_uses_is_no_fault() -> None:
    """As in reductions: lanes that have nothing to add shuffle and add a register that they never wrote."""
    a, b = torch.zeros(2, 64, dtype=torch.int32)
    code = """and.b32 %r4, %r1, 31; setp.lt.u32 %p1, %r4, 4; @%p1 mov.b32 %r5, 0f3f800000;
    shfl.sync.bfly.b32 %r6, %r5, 2, 31, -1; add.f32 %r5, %r5, %r6; shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
    add.f32 %r5, %r5, %r6; @%p1 st.global.b32 [%d3], %r5;"""
    run(code, a, b)
    assert a.view(torch.float32).tolist() == 2 * ([4.0] * 4 + [0.0] * 28)


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(machine.UnknownInstruction, match=r"line \d+ .* of tested.* no instruction bogus.f32"):
        kernel("bogus.f32 %r4, %r1;")
    with pytest.raises(machine.UnknownInstruction, match=r"add.s32 with these operands"):
        kernel("add.s32 %r4, %d1, %r1;")


def test_parameters_are_aligned_as_the_driver_packs_them() -> None:
    text = """.entry f(.param .u32 a, .param .u64 .ptr .global .align 1 b, .param .u32 c, .param .align 16 .b8 d[24],
    .param .f32 e)\n{ ret; }"""
    places = [(each.name, each.offset, each.size) for each in reader.read(text)["f"].parameters]
    assert places == [("a", 0, 4), ("b", 8, 8), ("c", 16, 4), ("d", 32, 24), ("e", 56, 4)]
