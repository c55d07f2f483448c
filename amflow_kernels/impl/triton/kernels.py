"""Device code: AM flow of tiles of the attention maps, forward and backward. The maths is derived in docs/maths.md.

No map is ever stored. A tile of a map, A = exp2(scale log2(e) q k^T - row_max) * row_norm, is computed where it is
needed from the row statistics that `am_flow_rows_kernel` leaves, and the frames of a clip are the innermost loop, so
that a tile that belongs to two pairs of frames is computed once for both. Programs own the rows or the columns they
sum up: nothing is atomic, and the same input gives the same bits.

Shapes: q (B, T, H, G, Nq, D), k (B, T, H, G, Nk, D), H heads, G windows; row statistics (B, T, H, G, Nq). What belongs
to pairs of maps is (B, P, Z, G, N): Z = 1 with a mean over the heads' maps, else H. A pair p is
((q, k)[p], (q, k)[p + shift]) of two sets of frames, which are one and the same for a clip (shift = lag) and two in
pair form (shift = 0). Pairs p, p + step, p + 2 step ... are a chain: the second map of one is the first of the next.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Frames(NamedTuple):
    """One set of frames: pointers, strides of (batch, frame, head, window, token), statistics of the maps' rows."""

    q: Any
    k: Any
    q_stride: Any
    k_stride: Any
    row_max: Any  # largest logit of a row, times log2(e)
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
    scale_log2: Any  # of the logits, times log2(e)
    inv_temperature: Any


@triton.jit
def _tile(base, stride, n, N, d, D: tl.constexpr, MASK_N: tl.constexpr, MASK_D: tl.constexpr):
    """Rows n of a (N, D) matrix, columns d, zero outside; n and d broadcast: [BLOCK, 1] and [1, BLOCK_D] or turned."""
    at = base + n * stride + d
    if MASK_N and MASK_D:
        return tl.load(at, mask=(n < N) & (d < D), other=0.0)
    elif MASK_N:
        return tl.load(at, mask=n < N, other=0.0)
    elif MASK_D:
        return tl.load(at, mask=d < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _logits(f, p, b, t, h, g, i, j, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T, [BLOCK_M rows i, BLOCK_N keys j]."""
    sb, st, sh, sg, sn = f.q_stride
    q = f.q + b * sb + t * st + h * sh + g * sg
    kb, kt, kh, kg, kn = f.k_stride
    k = f.k + b * kb + t * kt + h * kh + g * kg
    s = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for d0 in tl.static_range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q_tile = _tile(q, sn, i[:, None], p.Nq, d[None, :], D, True, D % BLOCK_D != 0)
        k_tile = _tile(k, kn, j[None, :], p.Nk, d[:, None], D, True, D % BLOCK_D != 0)
        s = tl.dot(q_tile, k_tile, acc=s, input_precision=PRECISION)
    return s


@triton.jit
def _head_map(f, p, b, t, h, g, i, j, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """A of one head, [BLOCK_M, BLOCK_N]; zero outside."""
    s = _logits(f, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION)
    row = (((b * f.T + t) * p.H + h) * p.G + g) * p.Nq
    row_max = tl.load(f.row_max + row + i, mask=i < p.Nq, other=0.0)
    row_norm = tl.load(f.row_norm + row + i, mask=i < p.Nq, other=0.0)
    A = tl.exp2(tl.fma(s, p.scale_log2, -row_max[:, None])) * row_norm[:, None]
    return tl.where((i[:, None] < p.Nq) & (j[None, :] < p.Nk), A, 0.0)  # 0 * inf outside is NaN


@triton.jit
def _map(
    f, p, b, t, z, g, i, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MEAN_MAP: tl.constexpr,
):  # fmt: skip
    """The map whose change is measured: head z's, or the mean of all heads'."""
    if MEAN_MAP:
        A = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for h in range(0, p.H):
            A += _head_map(f, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION)
        return A / p.H
    else:
        return _head_map(f, p, b, t, z, g, i, j, D, BLOCK_D, PRECISION)


@triton.jit
def _expm1(x, SHARP: tl.constexpr):
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
def _signed_exp(d, inv_temperature, SHARP: tl.constexpr):
    """S e^(|d| / temperature), S = sign(d), exactly 0 where d is 0; and e^(|d| / temperature) - 1."""
    e = _expm1(tl.abs(d) * inv_temperature, SHARP)
    y = tl.where(d < 0, -1.0 - e, 1.0 + e)
    return tl.where(d == 0, 0.0, y), e


@triton.jit
def _owner(p, n_blocks, n_chunks):
    """Block, chunk, chain, b, z, g of this program; sizes that can be large in 64 bits."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    pid = pid // n_blocks
    chunk = pid % n_chunks
    pid = pid // n_chunks
    chains = tl.minimum(p.step, p.P)
    chain = pid % chains
    pid = pid // chains
    g = pid % p.G
    pid = pid // p.G
    return block, chunk, chain, (pid // p.Z).to(tl.int64), (pid % p.Z).to(tl.int64), g.to(tl.int64)


@triton.jit
def _frame_owner(p, T, n_blocks):
    """Block and b, t, h, g of this program, which owns a block of one map's rows or columns; and (((b, t), h), g)."""
    pid = tl.program_id(0)
    at = (pid // n_blocks).to(tl.int64)
    g = at % p.G
    h = at // p.G % p.H
    t = at // (p.G * p.H) % T
    b = at // (p.G * p.H) // T
    return pid % n_blocks, b, t, h, g, at


@triton.jit
def am_flow_rows_kernel(
    f, p, row_max_ptr, row_norm_ptr, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Row statistics of all maps. A program: BLOCK_M rows of one map."""
    block, b, t, h, g, at = _frame_owner(p, f.T, n_blocks)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    # The lowest finite number keeps exp2(-inf - top) at 0. A row of -inf alone has the sum 0 and becomes NaN.
    top = tl.full([BLOCK_M], -3.40282347e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        s = _logits(f, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION)
        new_top = tl.maximum(top, tl.max(tl.where(j[None, :] < p.Nk, s * p.scale_log2, -3.40282347e38), 1))
        x = tl.exp2(tl.fma(s, p.scale_log2, -new_top[:, None]))
        total = tl.fma(total, tl.exp2(top - new_top), tl.sum(tl.where(j[None, :] < p.Nk, x, 0.0), 1))
        top = new_top
    row = at * p.Nq
    tl.store(row_max_ptr + row + i, top, mask=i < p.Nq)
    tl.store(row_norm_ptr + row + i, 1.0 / total, mask=i < p.Nq)


@triton.jit
def am_flow_weights_kernel(
    first, second, p, e_sum_ptr, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """e_sum_i = sum_j expm1(|A_ij - A'_ij| / temperature). A program: BLOCK_M rows, all keys, CHUNK pairs."""
    block, chunk, chain, b, z, g = _owner(p, n_blocks, n_chunks)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    c = tl.arange(0, CHUNK)
    pair = chain + (chunk * CHUNK + c) * p.step
    first_pair = chain + chunk * CHUNK * p.step
    pairs = tl.minimum(CHUNK, tl.cdiv(p.P - first_pair, p.step))
    sums = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if pairs > 0:
        for j0 in range(0, p.Nk, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
            A = _map(first, p, b, first_pair, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
            for n in range(0, pairs):
                t = first_pair + n * p.step + p.shift
                B = _map(second, p, b, t, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
                e = _expm1(tl.abs(A - B) * p.inv_temperature, SHARP)
                sums += tl.where(c[None, :] == n, tl.sum(e, 1)[:, None], 0.0)
                A = B
        row = (((b * p.P + pair[None, :]) * p.Z + z) * p.G + g) * p.Nq + i[:, None]
        tl.store(e_sum_ptr + row, sums, mask=(i[:, None] < p.Nq) & (c[None, :] < pairs))


@triton.jit
def am_flow_fwd_kernel(
    first, second, p, e_sum_ptr, flow_ptr, base, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """flow_j = base + sum_i w_i (e_ij - ebar_i). A program: BLOCK_N keys, all rows, CHUNK pairs of a chain."""
    block, chunk, chain, b, z, g = _owner(p, n_blocks, n_chunks)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    c = tl.arange(0, CHUNK)
    pair = chain + (chunk * CHUNK + c) * p.step
    first_pair = chain + chunk * CHUNK * p.step
    pairs = tl.minimum(CHUNK, tl.cdiv(p.P - first_pair, p.step))
    sums = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    if pairs > 0:
        for i0 in range(0, p.Nq, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M).to(INDEX)
            A = _map(first, p, b, first_pair, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
            for n in range(0, pairs):
                at = first_pair + n * p.step
                B = _map(second, p, b, at + p.shift, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
                row = (((b * p.P + at) * p.Z + z) * p.G + g) * p.Nq
                e_sum = tl.load(e_sum_ptr + row + i, mask=i < p.Nq, other=0.0)
                w = tl.where(i < p.Nq, 1.0 / (p.Nk + e_sum), 0.0)
                e = _expm1(tl.abs(A - B) * p.inv_temperature, SHARP)
                column = tl.sum(w[:, None] * e, 0) - tl.sum(w * e_sum) / p.Nk
                sums += tl.where(c[None, :] == n, column[:, None], 0.0)
                A = B
        to = (((b * p.P + pair[None, :]) * p.Z + z) * p.G + g) * p.Nk + j[:, None]
        tl.store(flow_ptr + to, base + sums, mask=(j[:, None] < p.Nk) & (c[None, :] < pairs))


@triton.jit
def _strip(f, p, b, t, h, g, i, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr):
    """Whole rows i of A / temperature: BLOCK_N keys as a tile, each of the REST last as a column; row statistics of A.

    One matrix product in the loop over frames and no more: with a second one the compiler would lay both out so that
    warps repeat each other's work. The last keys are too few for one anyway.
    """
    j = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    sb, st, sh, sg, sn = f.q_stride
    q = _tile(f.q + b * sb + t * st + h * sh + g * sg, sn, i[:, None], p.Nq, d[None, :], D, False, D != BLOCK_D)
    kb, kt, kh, kg, kn = f.k_stride
    k = f.k + b * kb + t * kt + h * kh + g * kg
    s = tl.dot(q, _tile(k, kn, j[None, :].to(i.dtype), p.Nk, d[:, None], D, False, D != BLOCK_D))
    top = tl.max(s * p.scale_log2, 1)
    rest = ()
    for r in tl.static_range(REST):
        k_row = _tile(k, kn, BLOCK_N + r, p.Nk, d, D, False, D != BLOCK_D).to(tl.float32)
        s_r = tl.sum(q.to(tl.float32) * k_row[None, :], 1)
        top = tl.maximum(top, s_r * p.scale_log2)
        rest = rest + (s_r,)
    top = tl.maximum(top, -3.40282347e38)
    A = tl.exp2(tl.fma(s, p.scale_log2, -top[:, None]))
    total = tl.sum(A, 1)
    weights = ()
    for r in tl.static_range(REST):
        x = tl.exp2(tl.fma(rest[r], p.scale_log2, -top))
        total += x
        weights = weights + (x,)
    norm = 1.0 / total
    factor = norm * p.inv_temperature
    columns = ()
    for r in tl.static_range(REST):
        columns = columns + (weights[r] * factor,)
    return A * factor[:, None], columns, top, norm


@triton.jit
def am_flow_strip_kernel(
    first, second, p, e_sum_ptr, part_ptr, part_size, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """The whole forward, where a row of a map fits in registers. A program: BLOCK_M rows, all keys, CHUNK pairs.

    Leaves what the backward needs, and part (n_blocks, B, P, Z, G, Nk): sum_i w_i (e_ij - ebar_i) of the block's rows.
    """
    block, chunk, chain, b, z, g = _owner(p, n_blocks, n_chunks)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)  # surplus rows repeat the last one with weight 0: they are NaN only where it is
    first_pair = chain + chunk * CHUNK * p.step
    pairs = tl.minimum(CHUNK, tl.cdiv(p.P - first_pair, p.step))
    if pairs > 0:
        A, A_rest, top, norm = _strip(first, p, b, first_pair, z, g, i, D, BLOCK_D, BLOCK_N, REST)
        to = (((b * first.T + first_pair) * p.H + z) * p.G + g) * p.Nq
        tl.store(first.row_max + to + row, top, mask=row < p.Nq)
        tl.store(first.row_norm + to + row, norm, mask=row < p.Nq)
        for n in range(0, pairs):
            at = first_pair + n * p.step
            t = at + p.shift
            B, B_rest, top, norm = _strip(second, p, b, t, z, g, i, D, BLOCK_D, BLOCK_N, REST)
            to = (((b * second.T + t) * p.H + z) * p.G + g) * p.Nq
            tl.store(second.row_max + to + row, top, mask=row < p.Nq)
            tl.store(second.row_norm + to + row, norm, mask=row < p.Nq)
            e = _expm1(tl.abs(A - B), SHARP)
            e_sum = tl.sum(e, 1)
            e_rest = ()
            for r in tl.static_range(REST):
                e_r = _expm1(tl.abs(A_rest[r] - B_rest[r]), SHARP)
                e_sum += e_r
                e_rest = e_rest + (e_r,)
            pair = ((b * p.P + at) * p.Z + z) * p.G + g
            tl.store(e_sum_ptr + pair * p.Nq + row, e_sum, mask=row < p.Nq)
            w = tl.where(row < p.Nq, 1.0 / (p.Nk + e_sum), 0.0)
            lost = tl.sum(w * e_sum) / p.Nk
            part = part_ptr + block.to(tl.int64) * part_size + pair * p.Nk
            tl.store(part + tl.arange(0, BLOCK_N), tl.sum(w[:, None] * e, 0) - lost)
            for r in tl.static_range(REST):
                tl.store(part + BLOCK_N + r, tl.sum(w * e_rest[r]) - lost)
            A = B
            A_rest = B_rest


class Gradient(NamedTuple):
    """What the backward knows of the pairs: dflow less its mean, and rows of coefficients, (B, P, Z, G, Nq) each.

    With y = S e^(|A - A'| / temperature), a pair adds y (slope g - offset) to scale * dL/dA and takes it from
    scale * dL/dA'.
    """

    g: Any
    g_stride: Any  # of (batch, pair, Z, window)
    slope: Any
    offset: Any
    rho: Any  # the pair's part of rowsum(A * scale * dL/dA)
    next_rho: Any  # and of rowsum(A' * scale * dL/dA')


@triton.jit
def _dflow(d, p, b, pair, z, g, j):
    sb, sp, sz, sg = d.g_stride
    return tl.load(d.g + b * sb + pair * sp + z * sz + g * sg + j, mask=j < p.Nk, other=0.0)


@triton.jit
def am_flow_bwd_rows_kernel(
    first, second, p, d, e_sum_ptr, scale, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """The coefficients of `Gradient`. A program: BLOCK_M rows, all keys, CHUNK pairs of a chain."""
    block, chunk, chain, b, z, g = _owner(p, n_blocks, n_chunks)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    c = tl.arange(0, CHUNK)
    pair = chain + (chunk * CHUNK + c) * p.step
    first_pair = chain + chunk * CHUNK * p.step
    pairs = tl.minimum(CHUNK, tl.cdiv(p.P - first_pair, p.step))
    g_sum = tl.zeros([CHUNK], tl.float32)
    e_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    A_y = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    A_y_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    B_y = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    B_y_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if pairs > 0:
        for j0 in range(0, p.Nk, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
            A = _map(first, p, b, first_pair, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
            for n in range(0, pairs):
                at = first_pair + n * p.step
                B = _map(second, p, b, at + p.shift, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
                g_j = _dflow(d, p, b, at, z, g, j)
                y, e = _signed_exp(A - B, p.inv_temperature, SHARP)
                y_g = y * g_j[None, :]
                here = c[None, :] == n
                g_sum += tl.where(c == n, tl.sum(g_j), 0.0)
                e_g += tl.where(here, tl.sum(e * g_j[None, :], 1)[:, None], 0.0)
                A_y += tl.where(here, tl.sum(A * y, 1)[:, None], 0.0)
                A_y_g += tl.where(here, tl.sum(A * y_g, 1)[:, None], 0.0)
                B_y += tl.where(here, tl.sum(B * y, 1)[:, None], 0.0)
                B_y_g += tl.where(here, tl.sum(B * y_g, 1)[:, None], 0.0)
                A = B
        row = (((b * p.P + pair[None, :]) * p.Z + z) * p.G + g) * p.Nq + i[:, None]
        inside = (i[:, None] < p.Nq) & (c[None, :] < pairs)
        w = 1.0 / (p.Nk + tl.load(e_sum_ptr + row, mask=inside, other=0.0))
        delta = w * (g_sum[None, :] + e_g)
        slope = scale * w * p.inv_temperature
        tl.store(d.slope + row, slope, mask=inside)
        tl.store(d.offset + row, slope * delta, mask=inside)
        tl.store(d.rho + row, slope * (A_y_g - delta * A_y), mask=inside)
        tl.store(d.next_rho + row, -slope * (B_y_g - delta * B_y), mask=inside)


class Frame(NamedTuple):
    """Where a frame's map stands: it is first in a pair with `after` if t < n_after, second in one with `before` if
    t >= n_before."""

    before: Any
    own: Any
    after: Any
    n_before: Any
    n_after: Any


@triton.jit
def _pair_gradient(A, B, d, p, b, pair, z, g, i, j, SHARP: tl.constexpr):
    """scale * dL/dA of the pair (A, B)."""
    y, _ = _signed_exp(A - B, p.inv_temperature, SHARP)
    row = (((b * p.P + pair) * p.Z + z) * p.G + g) * p.Nq
    slope = tl.load(d.slope + row + i, mask=i < p.Nq, other=0.0)
    offset = tl.load(d.offset + row + i, mask=i < p.Nq, other=0.0)
    g_j = _dflow(d, p, b, pair, z, g, j)
    return y * tl.fma(slope[:, None], g_j[None, :], -offset[:, None])


@triton.jit
def _gradient(
    f, d, p, b, t, h, g, i, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """A of head h and scale * dL/dA of the map whose change is measured, [BLOCK_M, BLOCK_N]."""
    z = h
    if MEAN_MAP:
        z = h * 0
    A = _map(f.own, p, b, t, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
    dA = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    if t < f.n_after:
        B = _map(f.after, p, b, t + p.shift, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
        dA += _pair_gradient(A, B, d, p, b, t, z, g, i, j, SHARP)
    if t >= f.n_before:
        B = _map(f.before, p, b, t - p.shift, z, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP)
        dA -= _pair_gradient(B, A, d, p, b, t - p.shift, z, g, i, j, SHARP)
    if MEAN_MAP:
        A = _head_map(f.own, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION)
    return A, dA


@triton.jit
def am_flow_bwd_rho_kernel(
    f, d, p, rho_ptr, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """rho = rowsum(A_h * scale * dL/dA) of every head of a mean map. A program: BLOCK_M rows of one head's map."""
    block, b, t, h, g, at = _frame_owner(p, f.own.T, n_blocks)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    rho = tl.zeros([BLOCK_M], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        A, dA = _gradient(f, d, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION, True, SHARP)
        rho += tl.sum(A * dA, 1)
    tl.store(rho_ptr + at * p.Nq + i, rho, mask=i < p.Nq)


@triton.jit
def _rho(f, d, p, rho_ptr, b, t, h, g, at, i, MEAN_MAP: tl.constexpr):
    inside = i < p.Nq
    if MEAN_MAP:
        return tl.load(rho_ptr + at * p.Nq + i, mask=inside, other=0.0)
    else:
        row = (((b * p.P + t) * p.Z + h) * p.G + g) * p.Nq
        rho = tl.zeros([i.shape[0]], tl.float32)
        if t < f.n_after:
            rho += tl.load(d.rho + row + i, mask=inside, other=0.0)
        if t >= f.n_before:
            rho += tl.load(d.next_rho + (row - p.shift * p.Z * p.G * p.Nq) + i, mask=inside, other=0.0)
        return rho


@triton.jit
def _dlogits(
    f, d, p, rho_ptr, b, t, h, g, at, i, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """scale * dL/dlogits, [BLOCK_M, BLOCK_N]."""
    A, dA = _gradient(f, d, p, b, t, h, g, i, j, D, BLOCK_D, PRECISION, MEAN_MAP, SHARP)
    rho = _rho(f, d, p, rho_ptr, b, t, h, g, at, i, MEAN_MAP)
    dlogits = A * (dA - rho[:, None])
    if MEAN_MAP:
        dlogits /= p.H
    return dlogits


@triton.jit
def _dot(dlogits, x, acc, PRECISION: tl.constexpr):
    """Gradients reach far below float16's range, bfloat16's or float32's they fit."""
    if x.dtype == tl.float16:
        return tl.dot(dlogits, x.to(tl.float32), acc=acc, input_precision="tf32")  # float16 fits in tf32
    else:
        return tl.dot(dlogits.to(x.dtype), x, acc=acc, input_precision=PRECISION)


@triton.jit
def am_flow_bwd_dq_kernel(
    f, d, p, rho_ptr, dq_ptr, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_D: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """dq = scale * dlogits k. A program: BLOCK_M queries of one head and frame, all keys."""
    block, b, t, h, g, at = _frame_owner(p, f.own.T, n_blocks)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    col = tl.arange(0, WIDE_D)
    kb, kt, kh, kg, kn = f.own.k_stride
    k = f.own.k + b * kb + t * kt + h * kh + g * kg
    dq = tl.zeros([BLOCK_M, WIDE_D], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        dlogits = _dlogits(f, d, p, rho_ptr, b, t, h, g, at, i, j, D, BLOCK_D, PRECISION, MEAN_MAP, SHARP)
        k_tile = _tile(k, kn, j[:, None], p.Nk, col[None, :], D, True, D != WIDE_D)
        dq = _dot(dlogits, k_tile, dq, PRECISION)
    to = dq_ptr + at * p.Nq * D + i[:, None] * D + col[None, :]
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=(i[:, None] < p.Nq) & (col[None, :] < D))


@triton.jit
def am_flow_bwd_dk_kernel(
    f, d, p, rho_ptr, dk_ptr, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_D: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """dk = scale * dlogits^T q. A program: BLOCK_N keys of one head and frame, all queries."""
    block, b, t, h, g, at = _frame_owner(p, f.own.T, n_blocks)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    col = tl.arange(0, WIDE_D)
    sb, st, sh, sg, sn = f.own.q_stride
    q = f.own.q + b * sb + t * st + h * sh + g * sg
    dk = tl.zeros([BLOCK_N, WIDE_D], tl.float32)
    for i0 in range(0, p.Nq, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M).to(INDEX)
        dlogits = _dlogits(f, d, p, rho_ptr, b, t, h, g, at, i, j, D, BLOCK_D, PRECISION, MEAN_MAP, SHARP)
        q_tile = _tile(q, sn, i[:, None], p.Nq, col[None, :], D, True, D != WIDE_D)
        dk = _dot(tl.trans(dlogits), q_tile, dk, PRECISION)
    to = dk_ptr + at * p.Nk * D + j[:, None] * D + col[None, :]
    tl.store(to, dk.to(dk_ptr.dtype.element_ty), mask=(j[:, None] < p.Nk) & (col[None, :] < D))
