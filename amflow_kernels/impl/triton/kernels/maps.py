"""Device code that all kernels share: tiles of attention maps, and the second exponential. docs/maths.md derives both.

No map is ever stored. A tile of a map, A = exp2(scale log2(e) q k^T - row_max) * row_norm, is computed where it is
needed. The innermost loop runs over the frames of a clip, so a tile that belongs to two pairs of frames is computed
once for both. Each program owns the rows or the columns that it sums, so no sum needs atomics and equal inputs give
equal bits.

Shapes: q (B, T, H, G, Nq, D), k (B, T, H, G, Nk, D), H heads, G windows; row statistics (B, T, H, G, Nq). Results for
pairs of maps are (B, P, Z, G, N), where Z is 1 if the heads' maps are averaged and H otherwise. Pair p is
((q, k)[p], (q, k)[p + shift]) of two sets of frames: one and the same set for a clip (shift = lag), two sets in pair
form (shift = 0). Pairs p, p + step, p + 2 step ... are a chain: the second map of one is the first of the next.

Reads of rows and keys beyond the last repeat the last one, so they yield NaN only if the last one does. Their results
are never stored and have weight 0 in sums.

Integers in tuples travel `coded`; a kernel begins with `decoded`. Compile-time constants travel in named tuples of
`tl.constexpr` (`constexprs`). The fields can't be plain values because
Triton 3.6 rejects those as bounds of `tl.static_range`.
"""

import os
from collections.abc import Iterable
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_hip

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-3.4028234e38)  # about the lowest float32; with one more digit, Triton makes it a float64


class Frames(NamedTuple):
    """One set of frames: pointers, strides of (batch, frame, head, window, token), statistics of the maps' rows."""

    q: Any
    k: Any
    q_stride: Any  # `coded_strides`
    k_stride: Any
    row_max: Any  # about the largest logit of a row, times log2(e)
    row_norm: Any  # 1 / sum_j exp2(logit_j log2(e) - row_max)
    T: Any


class FramePair(NamedTuple):
    """The frames whose maps come first and second in the pairs."""

    first: Any
    second: Any  # None for a clip: the same as the first


class Pairs(NamedTuple):
    """Which frames form pairs of maps (see the module's docstring), and the sizes that all frames share."""

    P: Any
    shift: Any
    step: Any
    Z: Any
    H: Any
    G: Any
    Nq: Any
    Nk: Any
    scale_log2: Any  # |scale| log2(e); `Constants.NEGATE` holds the sign of scale
    inv_temperature: Any


class Grid(NamedTuple):
    """Programs along the two fastest dimensions of a launch; program id 0 numbers all dimensions."""

    blocks: Any  # blocks of rows or keys
    columns: Any = 1  # chunks of a chain, or blocks of features
    chunk: Any = 1  # pairs of a chain in one program


class Constants(NamedTuple):
    """Compile-time constants. The host sets only the fields that a kernel reads, so that no other recompiles it."""

    D: Any
    BLOCK_D: Any  # columns of q and k in one step of a product
    NEGATE: Any  # scale < 0
    INDEX: Any  # integer type of frame numbers, and of offsets within the rows of one map
    UNIT: Any  # `stride_unit` of q and k
    PRECISION: Any = "tf32x3"  # of float32 operands, see `matrix_product`
    MEAN_MAP: Any = False
    GROWTH: Any = "small"  # how `growth` computes e^x - 1
    CHUNK: Any = 1  # the most pairs of a chain in one program
    C: Any = 0  # features of the motion operator; 0 for flow
    SOFTMAX: Any = True


class Tiling(NamedTuple):
    """Compile-time shape of a program's tiles. The last four fields are for strips (strip.py)."""

    BLOCK_M: Any  # queries of a tile
    BLOCK_N: Any  # keys of a tile
    ROW_TILES: Any = 1  # tiles of rows that a program owns
    TILES: Any = 1  # tiles of keys (in the backward for dk, of rows) that a program loops over
    REST: Any = 0  # single keys (or rows) after them
    PARTIAL: Any = False  # whether the tiles hold more keys (or rows) than there are


class MapIndex(NamedTuple):
    """Batch element, frame, head (or 0 for a mean over heads) and window of a map; for pairs, t is the pair."""

    b: Any
    t: Any
    h: Any
    g: Any


class Run(NamedTuple):
    """The pairs of one program: `length` pairs of a chain from `first` on, of one batch element, head and window."""

    b: Any
    z: Any
    g: Any
    first: Any
    length: Any


@cache
def constexprs(values: Constants | Tiling) -> Any:
    """The same named tuple with `tl.constexpr` fields, as kernels take it. The interpreter needs plain values."""
    return values if INTERPRETED else type(values)(*map(tl.constexpr, values))


def coded(values: Any) -> Any:
    """The same named tuple with 2 n + 1 for every integer n.

    Triton compiles a kernel anew for integers that are 1 or divisible by 16, which can't be switched off within tuples.
    2 n + 1 is neither, unless n is 0.
    """
    return values._make([2 * x + 1 if isinstance(x, int) else x for x in values])


def stride_unit(strides: Iterable[int]) -> int:
    """What divides all the strides, on which the width of loads depends: 1, 2, 4 or 8; 0 if 16 does."""
    return gcd(16, *strides) % 16


def coded_strides(strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The same strides in a form in which no others of the same unit compile a kernel anew."""
    return tuple([2 * (x // unit) + 1 for x in strides]) if unit else strides


@triton.jit
def decoded_strides(strides, N: tl.constexpr, UNIT: tl.constexpr):
    """N strides as they were before `coded_strides`."""
    if UNIT == 0:
        return strides
    else:
        plain = ()
        for n in tl.static_range(N):
            plain = plain + ((strides[n] >> 1) * UNIT,)
        return plain


@triton.jit
def decoded_frames(f, CONST: tl.constexpr):
    """`Frames` as they were before `coded`."""
    q_stride = decoded_strides(f.q_stride, 5, CONST.UNIT)
    k_stride = decoded_strides(f.k_stride, 5, CONST.UNIT)
    return Frames(f.q, f.k, q_stride, k_stride, f.row_max, f.row_norm, f.T >> 1)


@triton.jit
def decoded_pairs(p):
    """`Pairs` as they were before `coded`."""
    return Pairs(
        p.P >> 1,
        p.shift,
        p.step,
        p.Z >> 1,
        p.H >> 1,
        p.G,
        p.Nq >> 1,
        p.Nk >> 1,
        p.scale_log2,
        p.inv_temperature,
    )


@triton.jit
def decoded(frames, p, CONST: tl.constexpr):
    """`FramePair` and `Pairs` as they were before `coded`. The second frames of a clip are the first."""
    first = decoded_frames(frames.first, CONST)
    if frames.second is None:
        return FramePair(first, first), decoded_pairs(p)
    else:
        return FramePair(first, decoded_frames(frames.second, CONST)), decoded_pairs(p)


@triton.jit
def product(x, y):
    """x * y, never fused with a following sum.

    A map must have the same bits wherever it is computed. And a sum across lanes must have the same bits in all of
    them: where each lane has a single product, a lane would add its own before it is rounded, and others' after.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place for x >= 1, infinity for 0.

    On NVIDIA's GPUs cheaper than a division, which handles any x.
    """
    if INTERPRETED or is_hip():
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def matrix_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. PRECISION of float32 operands: "tf32", or "tf32x3", which multiplies TF32 parts of both.

    Three products of TF32 parts are as exact as one in float32, and a third of its work. AMD's compiler lacks them.
    """
    if INTERPRETED:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)
    elif is_hip():
        return tl.dot(a, b, acc=acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x):
    """The nearest TF32 number: matrix instructions drop the digits beyond, which biases every product toward 0."""
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # of NaN, rounded may be 0


@triton.jit
def expand_rows(x, TRANSPOSED: tl.constexpr):
    """Row values [BLOCK_M] in the shape that broadcasts over a tile: [BLOCK_M, 1], or TRANSPOSED [1, BLOCK_M]."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def tile(base, stride, n, d, D: tl.constexpr, MASK_D: tl.constexpr):
    """Rows n and columns d of a matrix with D columns, 0 beyond D.

    n and d broadcast against each other: [BLOCK, 1] and [1, BLOCK_D], or [1, BLOCK] and [BLOCK_D, 1].
    """
    if MASK_D:
        return tl.load(base + n * stride + d, mask=d < D, other=0.0)
    else:
        return tl.load(base + n * stride + d)


@triton.jit
def row_of(base, stride, n, CONST: tl.constexpr):
    """Pointer to row n of a matrix. n may be a constant: its product with the stride could pass 32 bits."""
    return base + tl.full([], n, CONST.INDEX) * stride


@triton.jit
def queries(f, m):
    """Pointer to the first query of map m."""
    sb, st, sh, sg, _ = f.q_stride
    return f.q + m.b * sb + m.t * st + m.h * sh + m.g * sg


@triton.jit
def keys(f, m):
    """Pointer to the first key of map m."""
    sb, st, sh, sg, _ = f.k_stride
    return f.k + m.b * sb + m.t * st + m.h * sh + m.g * sg


@triton.jit
def map_index(run, t):
    """Map t, or pair t, of a run."""
    return MapIndex(run.b, t, run.z, run.g)


@triton.jit
def chain_map(frames, p, run, n):
    """Frames and index of map n of a run: the second of its pair n - 1, and the first of its pair n.

    One loop over n then has one place where maps are computed: at two places, the compiler could sum them in two
    orders, and equal frames would differ.
    """
    return _select(n > 0, frames.second, frames.first), map_index(run, run.first + n * p.shift)


@triton.jit
def _select(condition, a, b):
    """The frames a if the condition holds, else b."""
    q_stride = ()
    k_stride = ()
    for x in tl.static_range(5):
        q_stride = q_stride + (tl.where(condition, a.q_stride[x], b.q_stride[x]),)
        k_stride = k_stride + (tl.where(condition, a.k_stride[x], b.k_stride[x]),)
    return Frames(
        tl.where(condition, a.q, b.q),
        tl.where(condition, a.k, b.k),
        q_stride,
        k_stride,
        tl.where(condition, a.row_max, b.row_max),
        tl.where(condition, a.row_norm, b.row_norm),
        a.T,
    )


@triton.jit
def map_number(f, p, m):
    """Position of map m in (B, T, H, G)."""
    return ((m.b * f.T + m.t) * p.H + m.h) * p.G + m.g


@triton.jit
def pair_number(p, m):
    """Position of pair m in (B, P, Z, G)."""
    return ((m.b * p.P + m.t) * p.Z + m.h) * p.G + m.g


@triton.jit
def logits(f, m, i, j, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """+-q k^T, [BLOCK_M rows i, BLOCK_N keys j], or TRANSPOSED."""
    q = queries(f, m)
    k = keys(f, m)
    if TRANSPOSED:
        s = tl.zeros([j.shape[0], i.shape[0]], tl.float32)
    else:
        s = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    MASK_D: tl.constexpr = CONST.D % CONST.BLOCK_D != 0
    for d0 in tl.range(0, CONST.D, CONST.BLOCK_D, loop_unroll_factor=2 if CONST.D == 2 * CONST.BLOCK_D else 1):
        d = d0 + tl.arange(0, CONST.BLOCK_D)
        if TRANSPOSED:
            k_tile = tile(k, f.k_stride[4], j[:, None], d[None, :], CONST.D, MASK_D)
            q_tile = tile(q, f.q_stride[4], i[None, :], d[:, None], CONST.D, MASK_D)
            s = matrix_product(k_tile, q_tile, s, CONST.PRECISION)
        else:
            q_tile = tile(q, f.q_stride[4], i[:, None], d[None, :], CONST.D, MASK_D)
            k_tile = tile(k, f.k_stride[4], j[None, :], d[:, None], CONST.D, MASK_D)
            s = matrix_product(q_tile, k_tile, s, CONST.PRECISION)
    if CONST.NEGATE:
        s = -s
    return s


@triton.jit
def head_map(f, p, m, i, j, factor, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A * factor of one head, [BLOCK_M, BLOCK_N], or TRANSPOSED."""
    s = logits(f, m, i, j, CONST, TRANSPOSED)
    row = map_number(f, p, m) * p.Nq
    row_max = tl.load(f.row_max + row + i)
    row_norm = tl.load(f.row_norm + row + i) * factor
    x = tl.exp2(tl.fma(s, p.scale_log2, -expand_rows(row_max, TRANSPOSED)))
    return product(x, expand_rows(row_norm, TRANSPOSED))


@triton.jit
def scaled_map(f, p, m, i, j, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A / temperature, where A is the map whose change is measured: one head's, or the mean over heads."""
    if CONST.MEAN_MAP:
        factor = p.inv_temperature / p.H
        A = tl.zeros([j.shape[0], i.shape[0]] if TRANSPOSED else [i.shape[0], j.shape[0]], tl.float32)
        for h in range(0, p.H):  # m.h is 0, and 64 bits wide as h is not: a head's offset can need them
            A += head_map(f, p, MapIndex(m.b, m.t, m.h + h, m.g), i, j, factor, CONST, TRANSPOSED)
        return A
    else:
        return head_map(f, p, m, i, j, p.inv_temperature, CONST, TRANSPOSED)


@triton.jit
def growth(x, GROWTH: tl.constexpr):
    """e^x - 1; 0 exactly at 0.

    GROWTH: "small", on [0, 1] to 2.3e-7 relative; "large", the same on [0, 64]; "rough", on [0, 1] to 3e-7 of e^x,
    which takes fewer instructions and is sufficient where the result is added to 1.
    """
    if GROWTH == "rough":
        return tl.exp2(x * 1.44269504) - 1.0
    elif GROWTH == "large":
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
def pair_owner(p, grid, CONST: tl.constexpr):
    """Block, chunk and `Run` of this program. Values that can be large are 64 bits wide, frame numbers CONST.INDEX."""
    pid = tl.program_id(0)
    blocks, columns, pairs = grid.blocks >> 1, grid.columns >> 1, grid.chunk >> 1
    block = pid % blocks
    pid = pid // blocks
    chunk = pid % columns
    pid = pid // columns
    chains = tl.minimum(p.step, p.P)
    chain = (pid % chains).to(CONST.INDEX)
    pid = pid // chains
    g = pid % p.G
    pid = pid // p.G
    b, z, g = (pid // p.Z).to(tl.int64), (pid % p.Z).to(tl.int64), g.to(tl.int64)
    first = chain + chunk * pairs * p.step
    length = tl.minimum(pairs, tl.cdiv(p.P - first, p.step))
    return block, chunk, Run(b, z, g, first, length)


@triton.jit
def frame_owner(p, T, grid):
    """Block, map and map number (`map_number`) of this program, which owns a block of one map's rows or columns."""
    pid = tl.program_id(0)
    blocks = grid.blocks >> 1
    number = (pid // blocks).to(tl.int64)
    g = number % p.G
    h = number // p.G % p.H
    t = number // (p.G * p.H) % T
    b = number // (p.G * p.H) // T
    return pid % blocks, MapIndex(b, t, h, g), number
