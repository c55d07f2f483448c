"""Matrix products of the machine for PTX, with the layouts of their operands, against torch."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.ptx import machine
from tests.ptx.by_hand import run

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


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_products_of_values_that_are_not_finite(value: float) -> None:
    a, b = matrices(torch.bfloat16, (16, 16), (16, 8))
    a[3, 5], b[5, 2] = value, 0
    for seed in range(3):
        result, exact = mma("bf16", a, b, seed=seed), a.float() @ b.float()
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


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


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix(trans: str) -> None:
    x = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)  # as registers: lane l has 2 elements of row l / 4
    out = torch.zeros_like(x)
    loads = "".join(f"ld.global.b32 %r{10 + n}, [%d3+{128 * n}];" for n in range(4))
    body = f"""shl.b32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; add.s64 %d5, %d2, %d5;
    mov.b32 %r4, shared; add.s32 %r4, %r4, %r5;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r4], {{%r10, %r11, %r12, %r13}}; bar.warp.sync -1;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4]; st.global.v4.b32 [%d5], {{%r10, %r11, %r12, %r13}};"""
    run(loads + body, x, out, threads=32)
    assert out.equal(x.mT if trans else x)


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
SECOND = """wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16
{%r40, %r41, %r42, %r43, %r44, %r45, %r46, %r47}, %d10, %d11,
0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; mov.b32 %r4, %r30;"""


def test_a_wait_for_the_group_before() -> None:
    a, b = matrices(torch.float16, (64, 16), (16, 16))
    wgmma("f16", a, b, 32, False, change=(WAIT, SECOND + WAIT))
    with pytest.raises(machine.Fault, match="async copy"):
        wgmma("f16", a, b, 32, False, change=(WAIT, SECOND.replace("%r4, %r30", "%r4, %r40") + WAIT))


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
