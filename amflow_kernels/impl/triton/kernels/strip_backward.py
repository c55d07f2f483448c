"""The backward in two passes, where whole rows or columns of a few maps fit in registers: dq by rows, dk by columns.

Frames stream by as in the forward's strips, whose tiles and columns these are, too (kernels/strip.py). A frame's
gradient has a part from the pair that it ends, carried along, and one from the pair that it begins. Meaning and units
are those of kernels/backward.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.backward import product_with, signed_exp
from amflow_kernels.impl.triton.kernels.maps import (
    keys,
    pair_owner,
    product,
    queries,
    reciprocal,
    run_of_pairs,
    tile,
)
from amflow_kernels.impl.triton.kernels.strip import begins, members, own_members, row_sum, whole_rows


class StripGradient(NamedTuple):
    """What the first pass leaves the second: coefficients of the pairs, (B, P, Z, G, Nq), and of the frames' maps."""

    g: Any  # dflow less its mean
    g_stride: Any  # of (batch, pair, Z, window)
    slope: Any
    offset: Any
    rho: Any  # temperature * rowsum(A * gradient of A), of the frames that begin pairs (of all, in a clip)
    rho_b: Any  # of those that end them


@triton.jit
def _row_maps(
    f, p, b, t, z, g, row0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Whole rows of A / temperature; 0 beyond the last key."""
    s = whole_rows(f, p, b, t, z, g, row0, D, BLOCK_D, NEGATE, INDEX, 1, BLOCK_M, TILES, BLOCK_N, REST, PARTIAL)
    i = tl.minimum(row0 + tl.arange(0, BLOCK_M).to(INDEX), p.Nq - 1)
    at = (((b * f.T + t) * p.H + z) * p.G + g) * p.Nq + i
    row_max = tl.load(f.row_max + at)
    factor = tl.load(f.row_norm + at) * p.inv_temperature
    A = ()
    for c in tl.static_range(TILES):
        A = A + (product(tl.exp2(tl.fma(s[c], p.scale_log2, -row_max[:, None])), factor[:, None]),)
    for c in tl.static_range(TILES, TILES + REST):
        A = A + (product(tl.exp2(tl.fma(s[c], p.scale_log2, -row_max)), factor),)
    return A


@triton.jit
def _finish_rows(
    f, p, b, t, z, g, row, A, dA, rho_ptr, dq_ptr, wanted,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, PARTIAL: tl.constexpr, NEEDED: tl.constexpr,
):  # fmt: skip
    """rho and, if NEEDED, dq of the rows of a map whose gradient dA is complete."""
    x = ()
    for c in tl.static_range(TILES + REST):
        x = x + (A[c] * dA[c],)
    rho = row_sum(x, 0, TILES, REST) / p.inv_temperature
    at = (((b * f.T + t) * p.H + z) * p.G + g) * p.Nq
    tl.store(rho_ptr + at + row, rho, mask=(row < p.Nq) & wanted)
    if NEEDED:
        j = members(p.Nk, BLOCK_N, TILES, PARTIAL).to(INDEX)
        d = tl.arange(0, BLOCK_D)
        k = keys(f, b, t, z, g)
        kn = f.k_stride[4]
        dq = tl.zeros([row.shape[0], BLOCK_D], tl.float32)
        for c in tl.static_range(TILES):
            k_tile = tile(
                k + begins(c, p.Nk, BLOCK_N, TILES, PARTIAL) * kn, kn, j[:, None], d[None, :], D, D != BLOCK_D
            )
            dq = product_with(A[c] * (dA[c] - rho[:, None]), k_tile, dq, "ieee")
        for c in tl.static_range(TILES, TILES + REST):
            k_row = tile(k + tl.full([], TILES * (BLOCK_N - 1) + c, INDEX) * kn, kn, 0, d, D, D != BLOCK_D).to(
                tl.float32
            )
            dq += (A[c] * (dA[c] - rho))[:, None] * k_row[None, :]
        to = dq_ptr + (at + row[:, None]) * D + d[None, :]
        tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=(row[:, None] < p.Nq) & (d[None, :] < D) & wanted)


@triton.jit
def am_flow_bwd_strip_q_kernel(
    first, second, p, d, e_sum_ptr, dq_ptr, dq_b_ptr, scale, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, SHARP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, PARTIAL: tl.constexpr, NEEDED: tl.constexpr, NEEDED_B: tl.constexpr,
):  # fmt: skip
    """dq, and what the columns' pass needs. A program: BLOCK_M rows, all keys, the frames of CHUNK pairs of a chain."""
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    row0 = block.to(INDEX) * BLOCK_M
    row = row0 + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    key = members(p.Nk, BLOCK_N, TILES, PARTIAL)
    sb, sp, sz, sg = d.g_stride
    if pairs > 0:
        begin = tl.where(chunk > 0, -1, 0)  # the pair that ends with the chunk's first frame has a part in its gradient
        A = _row_maps(
            first, p, b, first_pair + begin * p.step, z, g, row0,
            D, BLOCK_D, NEGATE, INDEX, BLOCK_M, TILES, BLOCK_N, REST, PARTIAL,
        )  # fmt: skip
        carry = ()
        for c in tl.static_range(TILES + REST):
            carry = carry + (tl.zeros_like(A[c]),)
        for n in range(begin, pairs):
            at = first_pair + n * p.step
            B = _row_maps(
                second, p, b, at + p.shift, z, g, row0,
                D, BLOCK_D, NEGATE, INDEX, BLOCK_M, TILES, BLOCK_N, REST, PARTIAL,
            )  # fmt: skip
            dflow = d.g + b * sb + at * sp + z * sz + g * sg
            x = ()
            y = ()
            g_j = ()
            for c in tl.static_range(TILES):
                g_c = tl.load(dflow + begins(c, p.Nk, BLOCK_N, TILES, PARTIAL) + key)
                if PARTIAL and c == TILES - 1:
                    g_c = tl.where(own_members(p.Nk, BLOCK_N, TILES, PARTIAL), g_c, 0.0)
                g_j = g_j + (g_c[None, :],)
            for c in tl.static_range(REST):
                g_j = g_j + (tl.load(dflow + TILES * BLOCK_N + c),)
            for c in tl.static_range(TILES + REST):
                S_exp, h = signed_exp(A[c] - B[c], SHARP)
                x = x + (h * g_j[c],)
                y = y + (S_exp,)
            pair = (((b * p.P + at) * p.Z + z) * p.G + g) * p.Nq
            w = reciprocal(p.Nk + tl.load(e_sum_ptr + pair + i))
            slope = scale * w
            offset = slope * w * row_sum(x, 0, TILES, REST)
            inside = (row < p.Nq) & (n >= 0)
            tl.store(d.slope + pair + row, slope, mask=inside)
            tl.store(d.offset + pair + row, offset, mask=inside)
            dA = ()
            onward = ()
            for c in tl.static_range(TILES + REST):
                if c < TILES:
                    G = y[c] * tl.fma(slope[:, None], g_j[c], -offset[:, None])
                else:
                    G = y[c] * tl.fma(slope, g_j[c], -offset)
                dA = dA + (carry[c] + G,)
                onward = onward + (-G,)
            _finish_rows(
                first, p, b, at, z, g, row, A, dA, d.rho, dq_ptr, n >= 0,
                D, BLOCK_D, INDEX, TILES, BLOCK_N, REST, PARTIAL, NEEDED,
            )  # fmt: skip
            A = B
            carry = onward
        at = first_pair + pairs * p.step
        if at >= p.P:
            _finish_rows(
                second, p, b, at - p.step + p.shift, z, g, row, A, carry, d.rho_b, dq_b_ptr, True,
                D, BLOCK_D, INDEX, TILES, BLOCK_N, REST, PARTIAL, NEEDED_B,
            )  # fmt: skip


@triton.jit
def _by_row(ptr, p, c, BLOCK_M: tl.constexpr, TILES: tl.constexpr, PARTIAL: tl.constexpr):
    """What belongs to the rows of piece c: [1, BLOCK_M], or of one row."""
    if c < TILES:
        m = members(p.Nq, BLOCK_M, TILES, PARTIAL)
        return tl.load(ptr + begins(c, p.Nq, BLOCK_M, TILES, PARTIAL) + m)[None, :]
    else:
        return tl.load(ptr + TILES * (BLOCK_M - 1) + c)


@triton.jit
def _queries(
    f, p, b, t, z, g, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """The queries of piece c: [BLOCK_M, BLOCK_D], or of one row [BLOCK_D]."""
    q = queries(f, b, t, z, g)
    sn = f.q_stride[4]
    d = tl.arange(0, BLOCK_D)
    if c < TILES:
        m = members(p.Nq, BLOCK_M, TILES, PARTIAL).to(INDEX)
        return tile(
            q + tl.full([], begins(c, p.Nq, BLOCK_M, TILES, PARTIAL), INDEX) * sn,
            sn,
            m[:, None],
            d[None, :],
            D,
            D != BLOCK_D,
        )
    else:
        return tile(q + tl.full([], TILES * (BLOCK_M - 1) + c, INDEX) * sn, sn, 0, d, D, D != BLOCK_D)


@triton.jit
def _column_map(
    f, p, b, t, z, g, k_tile, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Piece c of columns of A / temperature, turned: [BLOCK_N, BLOCK_M], 0 in rows of other pieces, or [BLOCK_N]."""
    q = _queries(f, p, b, t, z, g, c, D, BLOCK_D, INDEX, BLOCK_M, TILES, PARTIAL)
    if c < TILES:
        s = tl.dot(k_tile, tl.trans(q))
    else:
        s = tl.sum(product(k_tile.to(tl.float32), q.to(tl.float32)[None, :]), 1)
    if NEGATE:
        s = -s
    at = (((b * f.T + t) * p.H + z) * p.G + g) * p.Nq
    row_max = _by_row(f.row_max + at, p, c, BLOCK_M, TILES, PARTIAL)
    factor = _by_row(f.row_norm + at, p, c, BLOCK_M, TILES, PARTIAL) * p.inv_temperature
    A = product(tl.exp2(tl.fma(s, p.scale_log2, -row_max)), factor)
    if PARTIAL and c == TILES - 1:
        A = tl.where(own_members(p.Nq, BLOCK_M, TILES, PARTIAL)[None, :], A, 0.0)
    return A


@triton.jit
def _finish_columns(
    f, p, b, t, z, g, A, dA, rho_ptr, c, dk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """dk with piece c, whose gradient dA is complete."""
    at = (((b * f.T + t) * p.H + z) * p.G + g) * p.Nq
    dlogits = A * (dA - _by_row(rho_ptr + at, p, c, BLOCK_M, TILES, PARTIAL))
    q = _queries(f, p, b, t, z, g, c, D, BLOCK_D, INDEX, BLOCK_M, TILES, PARTIAL)
    if c < TILES:
        return product_with(dlogits, q, dk, "ieee")
    else:
        return dk + dlogits[:, None] * q.to(tl.float32)[None, :]


@triton.jit
def am_flow_bwd_strip_k_kernel(
    first, second, p, d, dk_ptr, dk_b_ptr, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, SHARP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, REST: tl.constexpr,
    PARTIAL: tl.constexpr, NEEDED: tl.constexpr, NEEDED_B: tl.constexpr,
):  # fmt: skip
    """dk. A program: BLOCK_N keys, all rows, the frames of CHUNK pairs of a chain. Maps are turned."""
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    key = block.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    j = tl.minimum(key, p.Nk - 1)
    col = tl.arange(0, BLOCK_D)
    inside = (key[:, None] < p.Nk) & (col[None, :] < D)
    sb, sp, sz, sg = d.g_stride
    if pairs > 0:
        begin = tl.where(chunk > 0, -1, 0)
        t = first_pair + begin * p.step
        k_tile = tile(keys(first, b, t, z, g), first.k_stride[4], j[:, None], col[None, :], D, D != BLOCK_D)
        A = ()
        carry = ()
        for c in tl.static_range(TILES + REST):
            x = _column_map(first, p, b, t, z, g, k_tile, c, D, BLOCK_D, NEGATE, INDEX, BLOCK_M, TILES, PARTIAL)
            A = A + (x,)
            carry = carry + (tl.zeros_like(x),)
        for n in range(begin, pairs):
            at = first_pair + n * p.step
            t = at + p.shift
            k_tile = tile(keys(second, b, t, z, g), second.k_stride[4], j[:, None], col[None, :], D, D != BLOCK_D)
            g_j = tl.load(d.g + b * sb + at * sp + z * sz + g * sg + j)
            pair = (((b * p.P + at) * p.Z + z) * p.G + g) * p.Nq
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            B = ()
            onward = ()
            for c in tl.static_range(TILES + REST):
                x = _column_map(second, p, b, t, z, g, k_tile, c, D, BLOCK_D, NEGATE, INDEX, BLOCK_M, TILES, PARTIAL)
                slope = _by_row(d.slope + pair, p, c, BLOCK_M, TILES, PARTIAL)
                offset = _by_row(d.offset + pair, p, c, BLOCK_M, TILES, PARTIAL)
                y, _ = signed_exp(A[c] - x, SHARP)
                if c < TILES:
                    G = y * tl.fma(slope, g_j[:, None], -offset)
                else:
                    G = y * tl.fma(slope, g_j, -offset)
                if NEEDED:
                    dk = _finish_columns(
                        first, p, b, at, z, g, A[c], carry[c] + G, d.rho, c, dk,
                        D, BLOCK_D, INDEX, BLOCK_M, TILES, PARTIAL,
                    )  # fmt: skip
                B = B + (x,)
                onward = onward + (-G,)
            A = B
            carry = onward
            if NEEDED:
                to = dk_ptr + ((((b * first.T + at) * p.H + z) * p.G + g) * p.Nk + key[:, None]) * D + col[None, :]
                tl.store(to, dk.to(dk_ptr.dtype.element_ty), mask=inside & (n >= 0))
        at = first_pair + pairs * p.step
        if NEEDED_B and at >= p.P:
            t = at - p.step + p.shift
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for c in tl.static_range(TILES + REST):
                dk = _finish_columns(
                    second, p, b, t, z, g, A[c], carry[c], d.rho_b, c, dk,
                    D, BLOCK_D, INDEX, BLOCK_M, TILES, PARTIAL,
                )  # fmt: skip
            to = dk_b_ptr + ((((b * second.T + t) * p.H + z) * p.G + g) * p.Nk + key[:, None]) * D + col[None, :]
            tl.store(to, dk.to(dk_b_ptr.dtype.element_ty), mask=inside)
