"""Device code that all kernels share: tiles of attention maps, and the second exponential. docs/maths.md derives both.

No map is ever stored. A tile of a map, A = exp2(scale log2(e) q k^T - row_max) * row_norm, is computed where it is
needed, and the frames of a clip are the innermost loop, so that a tile that belongs to two pairs of frames is computed
once for both. Programs own the rows or the columns they sum up: nothing is atomic, and the same input gives the same
bits.

Shapes: q (B, T, H, G, Nq, D), k (B, T, H, G, Nk, D), H heads, G windows; row statistics (B, T, H, G, Nq). What belongs
to pairs of maps is (B, P, Z, G, N): Z = 1 with a mean over the heads' maps, else H. A pair p is
((q, k)[p], (q, k)[p + shift]) of two sets of frames, which are one and the same for a clip (shift = lag) and two in
pair form (shift = 0). Pairs p, p + step, p + 2 step ... are a chain: the second map of one is the first of the next.

Rows and keys beyond the last are read as the last one again: they can be NaN only where it is. They are never stored,
and weigh nothing in a sum.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-3.4028234e38)  # about the lowest float32; a digit more, and Triton takes it for a float64


class Frames(NamedTuple):
    """One set of frames: pointers, strides of (batch, frame, head, window, token), statistics of the maps' rows."""

    q: Any
    k: Any
    q_stride: Any
    k_stride: Any
    row_max: Any  # about the largest logit of a row, times log2(e)
    row_norm: Any  # 1 / sum_j exp2(logit_j log2(e) - row_max)
    T: Any


class Pairs(NamedTuple):
    """How pairs of maps are made of the frames, and the sizes that all frames share."""

    P: Any
    shift: Any
    step: Any
    Z: Any
    H: Any
    G: Any
    Nq: Any
    Nk: Any
    scale_log2: Any  # |scale| log2(e); the kernels' NEGATE is its sign
    inv_temperature: Any


@triton.jit
def product(x, y):
    """x * y that the compiler can't fuse into a sum: a map has to have the same bits wherever it is computed."""
    return tl.fma(x, y, 0.0)


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place, for x >= 1, and infinity for 0; a division would test for what can't be."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def of_rows(x, TURNED: tl.constexpr):
    """One value for each row of a map, to go with a tile of it, [BLOCK_M, 1], or TURNED."""
    return x[None, :] if TURNED else x[:, None]


@triton.jit
def tile(base, stride, n, d, D: tl.constexpr, MASK_D: tl.constexpr):
    """Rows n, columns d of a matrix of D columns, 0 beyond; n, d broadcast: [BLOCK, 1] and [1, BLOCK_D], or turned."""
    if MASK_D:
        return tl.load(base + n * stride + d, mask=d < D, other=0.0)
    else:
        return tl.load(base + n * stride + d)


@triton.jit
def queries(f, b, t, h, g):
    """Where the queries of a map begin."""
    sb, st, sh, sg, _ = f.q_stride
    return f.q + b * sb + t * st + h * sh + g * sg


@triton.jit
def keys(f, b, t, h, g):
    """Where the keys of a map begin."""
    sb, st, sh, sg, _ = f.k_stride
    return f.k + b * sb + t * st + h * sh + g * sg


@triton.jit
def logits(
    f, b, t, h, g, i, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """+-q k^T, [BLOCK_M rows i, BLOCK_N keys j], or TURNED."""
    q = queries(f, b, t, h, g)
    k = keys(f, b, t, h, g)
    if TURNED:
        s = tl.zeros([j.shape[0], i.shape[0]], tl.float32)
    else:
        s = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for d0 in tl.static_range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        if TURNED:
            k_tile = tile(k, f.k_stride[4], j[:, None], d[None, :], D, D % BLOCK_D != 0)
            q_tile = tile(q, f.q_stride[4], i[None, :], d[:, None], D, D % BLOCK_D != 0)
            s = tl.dot(k_tile, q_tile, acc=s, input_precision=PRECISION)
        else:
            q_tile = tile(q, f.q_stride[4], i[:, None], d[None, :], D, D % BLOCK_D != 0)
            k_tile = tile(k, f.k_stride[4], j[None, :], d[:, None], D, D % BLOCK_D != 0)
            s = tl.dot(q_tile, k_tile, acc=s, input_precision=PRECISION)
    if NEGATE:
        s = -s
    return s


@triton.jit
def head_map(
    f, p, b, t, h, g, i, j, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A * factor of one head, [BLOCK_M, BLOCK_N], or TURNED."""
    s = logits(f, b, t, h, g, i, j, D, BLOCK_D, PRECISION, NEGATE, TURNED)
    row = (((b * f.T + t) * p.H + h) * p.G + g) * p.Nq
    row_max = tl.load(f.row_max + row + i)
    row_norm = tl.load(f.row_norm + row + i) * factor
    x = tl.exp2(tl.fma(s, p.scale_log2, -of_rows(row_max, TURNED)))
    return product(x, of_rows(row_norm, TURNED))


@triton.jit
def any_map(
    f, p, b, t, z, g, i, j, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, MEAN_MAP: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """The map whose change is measured, times factor: head z's, or the mean of all heads'."""
    if MEAN_MAP:
        unit = factor / p.H
        A = head_map(f, p, b, t, 0, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, TURNED)
        for h in range(1, p.H):
            A += head_map(f, p, b, t, h, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, TURNED)
        return A
    else:
        return head_map(f, p, b, t, z, g, i, j, factor, D, BLOCK_D, PRECISION, NEGATE, TURNED)


@triton.jit
def expm1(x, SHARP: tl.constexpr):
    """e^x - 1, on [0, 1] or (SHARP) on [0, 64], to 2.3e-7 relative; exactly 0 for 0."""
    if SHARP:
        n = tl.floor(tl.fma(x, 1.44269504, 0.5))
        r = tl.fma(n, -0.693145752, x)  # ln 2 in two parts: n * the first is exact
        r = tl.fma(n, -1.42860677e-6, r)
        y = tl.fma(r, 1.3888873e-3, 8.3690686e-3)  # minimax for (e^r - 1) / r on [-ln 2 / 2, ln 2 / 2]
        y = tl.fma(y, r, 4.1667137e-2)
        y = tl.fma(y, r, 1.6666506e-1)
        y = tl.fma(y, r, 4.9999997e-1)
        y = tl.fma(y, r, 1.0)
        pow2 = tl.exp2(n)
        return tl.fma(r * y, pow2, pow2 - 1.0)
    else:
        y = tl.fma(x, 2.1345359e-3, 7.4502416e-3)  # minimax for (e^x - 1) / x on [0, 1]
        y = tl.fma(y, x, 4.2127855e-2)
        y = tl.fma(y, x, 1.6656032e-1)
        y = tl.fma(y, x, 5.0000882e-1)
        y = tl.fma(y, x, 9.9999988e-1)
        return x * y


@triton.jit
def pair_owner(p, n_blocks, n_chunks, INDEX: tl.constexpr):
    """Block, chunk, chain, b, z, g of this program; sizes that can be large in 64 bits, frames as INDEX says."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    pid = pid // n_blocks
    chunk = pid % n_chunks
    pid = pid // n_chunks
    chains = tl.minimum(p.step, p.P)
    chain = (pid % chains).to(INDEX)
    pid = pid // chains
    g = pid % p.G
    pid = pid // p.G
    return block, chunk, chain, (pid // p.Z).to(tl.int64), (pid % p.Z).to(tl.int64), g.to(tl.int64)


@triton.jit
def run_of_pairs(p, chain, chunk, CHUNK: tl.constexpr):
    """The first pair of a chunk of a chain, and how many are in it."""
    first_pair = chain + chunk * CHUNK * p.step
    return first_pair, tl.minimum(CHUNK, tl.cdiv(p.P - first_pair, p.step))


@triton.jit
def frame_owner(p, T, n_blocks):
    """Block and b, t, h, g of this program, which owns a block of one map's rows or columns; and (((b, t), h), g)."""
    pid = tl.program_id(0)
    at = (pid // n_blocks).to(tl.int64)
    g = at % p.G
    h = at // p.G % p.H
    t = at // (p.G * p.H) % T
    b = at // (p.G * p.H) // T
    return pid % n_blocks, b, t, h, g, at
