"""The backward in two passes, where whole rows or columns of a few maps fit in registers: dq by rows, dk by columns.

Programs loop over frames as in the forward's strips, with the same tiles and columns (strip.py). A frame's gradient is
the sum of its parts from the pair that it ends, which is carried along, and from the pair that it begins. Meaning and
units are those of backward.py.

Both passes must see the same bits of a map: with others, the sign of A - A' can differ, and row sums of one pass do not
fit elements of the other. Hence both multiply q k^T as matrices. A row after the tiles (REST) has no map in the pass by
columns, which takes its dlogits from the pass by rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.backward import product_with, signed_exp
from amflow_kernels.impl.triton.kernels.maps import (
    chain_map,
    decoded,
    decoded_strides,
    keys,
    map_index,
    map_number,
    pair_number,
    pair_owner,
    product,
    queries,
    reciprocal,
    row_of,
    tile,
)
from amflow_kernels.impl.triton.kernels.strip import row_sum, tile_mask, tile_offsets, tile_start, whole_rows, zero_rows


class StripGradient(NamedTuple):
    """Row coefficients of the pairs, (B, P, Z, G, Nq), and of the maps, (B, T, H, G, Nq).

    The pass by rows computes all but g, and the pass by columns reads them.
    """

    g: Any  # scale * (dflow minus its mean)
    g_stride: Any  # of (batch, pair, Z, window)
    w: Any  # of the pairs, as in `backward.Gradient`
    delta: Any
    rho: Any  # temperature * rowsum(A * gradient of A) of the frames that begin pairs (of all frames of a clip)
    rho_b: Any  # the same of the frames that end them
    last: Any  # scale * dL/dlogits of the last rows of the same frames as rho's, (B, T, H, G, Nk); None: not needed
    last_b: Any  # and of the same frames as rho_b's


class RowOutput(NamedTuple):
    """Destinations of the results for the rows of one frame."""

    rho: Any
    last: Any  # None: not needed
    dq: Any  # None: not needed
    store: Any  # False: another program, which owns the pair, stores them


@triton.jit
def _maps_of_rows(f, p, m, row0, CONST: tl.constexpr, TILING: tl.constexpr):
    """Whole rows of A / temperature from row0 on; 0 beyond the last key."""
    s = whole_rows(f, p, m, row0, CONST, TILING, True)
    i = tl.minimum(row0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX), p.Nq - 1)
    offset = map_number(f, p, m) * p.Nq + i
    row_max = tl.load(f.row_max + offset)
    factor = tl.load(f.row_norm + offset) * p.inv_temperature
    A = ()
    for c in tl.static_range(TILING.TILES):
        A = A + (product(tl.exp2(tl.fma(s[c], p.scale_log2, -row_max[:, None])), factor[:, None]),)
    for c in tl.static_range(TILING.TILES, TILING.TILES + TILING.REST):
        A = A + (product(tl.exp2(tl.fma(s[c], p.scale_log2, -row_max)), factor),)
    return A


@triton.jit
def _store_last_row(out, f, p, m, row0, j, A, dA, rho, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores dlogits of the last row of a map if it is among the rows from row0 on."""
    if row0 + TILING.BLOCK_M >= p.Nq:
        row = row0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
        is_last = (row == p.Nq - 1) & out.store
        last = out.last + map_number(f, p, m) * p.Nk
        for c in tl.static_range(TILING.TILES):
            key = tile_start(c, p.Nk, TILING.BLOCK_N, TILING) + j
            mask = is_last[:, None]
            if TILING.PARTIAL and c == TILING.TILES - 1:
                mask = mask & tile_mask(p.Nk, TILING.BLOCK_N, TILING)[None, :]
            dlogits = A[c] * (dA[c] - rho[:, None])
            tl.store(tl.broadcast_to((last + key)[None, :], dlogits.shape), dlogits, mask=mask)
        for c in tl.static_range(TILING.TILES, TILING.TILES + TILING.REST):
            ptr = last + TILING.TILES * (TILING.BLOCK_N - 1) + c
            tl.store(tl.broadcast_to(ptr, row.shape), A[c] * (dA[c] - rho), mask=is_last)


@triton.jit
def _finish_rows(f, p, m, row0, A, dA, out, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores the `RowOutput` of a map whose gradient dA is complete."""
    row = row0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    x = ()
    for c in tl.static_range(TILING.TILES + TILING.REST):
        x = x + (A[c] * dA[c],)
    rho = row_sum(x, 0, TILING) / p.inv_temperature
    first = map_number(f, p, m) * p.Nq
    tl.store(out.rho + first + row, rho, mask=(row < p.Nq) & out.store)
    j = tile_offsets(p.Nk, TILING.BLOCK_N, TILING).to(CONST.INDEX)
    if out.last is not None:
        _store_last_row(out, f, p, m, row0, j, A, dA, rho, CONST, TILING)
    if out.dq is not None:
        MASK_D: tl.constexpr = CONST.D != CONST.BLOCK_D
        d = tl.arange(0, CONST.BLOCK_D)
        k = keys(f, m)
        kn = f.k_stride[4]
        dq = tl.zeros([row.shape[0], CONST.BLOCK_D], tl.float32)
        for c in tl.static_range(TILING.TILES):
            first_key = row_of(k, kn, tile_start(c, p.Nk, TILING.BLOCK_N, TILING), CONST)
            k_tile = tile(first_key, kn, j[:, None], d[None, :], CONST.D, MASK_D)
            dq = product_with(A[c] * (dA[c] - rho[:, None]), k_tile, dq, True, CONST.PRECISION)
        for c in tl.static_range(TILING.TILES, TILING.TILES + TILING.REST):
            row_ptr = row_of(k, kn, TILING.TILES * (TILING.BLOCK_N - 1) + c, CONST)
            k_row = tile(row_ptr, 0, 0, d, CONST.D, MASK_D).to(tl.float32)
            dq += (A[c] * (dA[c] - rho))[:, None] * k_row[None, :]
        dq_ptrs = out.dq + (first + row[:, None]) * CONST.D + d[None, :]
        inside = (row[:, None] < p.Nq) & (d[None, :] < CONST.D) & out.store
        tl.store(dq_ptrs, dq.to(out.dq.dtype.element_ty), mask=inside)


@triton.jit
def _dflow_tiles(dflow, p, key, TILING: tl.constexpr):
    """dflow of all keys: [1, BLOCK_N] for each tile, 0 where it repeats keys; then scalars for the REST."""
    g_j = ()
    for c in tl.static_range(TILING.TILES):
        g_c = tl.load(dflow + tile_start(c, p.Nk, TILING.BLOCK_N, TILING) + key)
        if TILING.PARTIAL and c == TILING.TILES - 1:
            g_c = tl.where(tile_mask(p.Nk, TILING.BLOCK_N, TILING), g_c, 0.0)
        g_j = g_j + (g_c[None, :],)
    for c in tl.static_range(TILING.REST):
        g_j = g_j + (tl.load(dflow + TILING.TILES * TILING.BLOCK_N + c),)
    return g_j


@triton.jit
def am_flow_bwd_strip_q_kernel(frames, p, d, e_sum_ptr, dq_ptrs, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores `StripGradient`, dq of frames that begin pairs (of all frames of a clip), and dq of frames that end them.

    A dq that is not needed is None. A program: BLOCK_M rows, all keys, the frames of CHUNK pairs of a chain.
    """
    frames, p = decoded(frames, p, CONST)
    block, chunk, run = pair_owner(p, grid, CONST)
    row0 = block.to(CONST.INDEX) * TILING.BLOCK_M
    row = row0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    key = tile_offsets(p.Nk, TILING.BLOCK_N, TILING)
    sb, sp, sz, sg = decoded_strides(d.g_stride, 4, 1)
    if run.length > 0:
        A = zero_rows(TILING)
        G = zero_rows(TILING)  # its negative is the gradient of A through the pair that A ends
        # The gradient of a chunk's first frame has a part from the pair that ends with it: start with that pair.
        start = tl.where(chunk > 0, -1, 0)
        for n in range(start, run.length + 1):
            f, m = chain_map(frames, p, run, n)
            B = _maps_of_rows(f, p, m, row0, CONST, TILING)
            if n > start:
                own = n > 0  # whether this program owns the pair that ends with map n
                t = run.first + (n - 1) * p.step
                g_j = _dflow_tiles(d.g + run.b * sb + t * sp + run.z * sz + run.g * sg, p, key, TILING)
                first = pair_number(p, map_index(run, t)) * p.Nq
                w = reciprocal(p.Nk + tl.load(e_sum_ptr + first + i))
                x = ()
                y = ()
                for c in tl.static_range(TILING.TILES + TILING.REST):
                    y_c, h = signed_exp(A[c] - B[c], w[:, None] if c < TILING.TILES else w, CONST.GROWTH)
                    x = x + (h * g_j[c],)
                    y = y + (y_c,)
                delta = row_sum(x, 0, TILING)
                inside = (row < p.Nq) & own
                tl.store(d.w + first + row, w, mask=inside)
                tl.store(d.delta + first + row, delta, mask=inside)
                dA = ()
                next_G = ()
                for c in tl.static_range(TILING.TILES + TILING.REST):
                    G_c = y[c] * (g_j[c] - (delta[:, None] if c < TILING.TILES else delta))
                    dA = dA + (G_c - G[c],)
                    next_G = next_G + (G_c,)
                out = RowOutput(d.rho, d.last, dq_ptrs[0], own)
                _finish_rows(frames.first, p, map_index(run, t), row0, A, dA, out, CONST, TILING)
                G = next_G
            A = B
        end = run.first + run.length * p.step
        if end >= p.P:
            dA = ()
            for c in tl.static_range(TILING.TILES + TILING.REST):
                dA = dA + (-G[c],)
            last = map_index(run, end - p.step + p.shift)
            out = RowOutput(d.rho_b, d.last_b, dq_ptrs[1], True)
            _finish_rows(frames.second, p, last, row0, A, dA, out, CONST, TILING)


@triton.jit
def _row_values(ptr, p, c, TILING: tl.constexpr):
    """Values of the rows of tile c of the strip: [1, BLOCK_M]."""
    offset = tile_offsets(p.Nq, TILING.BLOCK_M, TILING)
    return tl.load(ptr + tile_start(c, p.Nq, TILING.BLOCK_M, TILING) + offset)[None, :]


@triton.jit
def _queries(f, p, m, c, CONST: tl.constexpr, TILING: tl.constexpr):
    """The queries of tile c of the strip: [BLOCK_M, BLOCK_D]."""
    sn = f.q_stride[4]
    d = tl.arange(0, CONST.BLOCK_D)
    offset = tile_offsets(p.Nq, TILING.BLOCK_M, TILING).to(CONST.INDEX)
    first = row_of(queries(f, m), sn, tile_start(c, p.Nq, TILING.BLOCK_M, TILING), CONST)
    return tile(first, sn, offset[:, None], d[None, :], CONST.D, CONST.D != CONST.BLOCK_D)


@triton.jit
def _column_map(f, p, m, k_tile, c, CONST: tl.constexpr, TILING: tl.constexpr):
    """Tile c of columns of A / temperature: [BLOCK_N, BLOCK_M], 0 in rows that it repeats."""
    s = tl.dot(k_tile, tl.trans(_queries(f, p, m, c, CONST, TILING)))
    if CONST.NEGATE:
        s = -s
    first = map_number(f, p, m) * p.Nq
    row_max = _row_values(f.row_max + first, p, c, TILING)
    factor = _row_values(f.row_norm + first, p, c, TILING) * p.inv_temperature
    A = product(tl.exp2(tl.fma(s, p.scale_log2, -row_max)), factor)
    if TILING.PARTIAL and c == TILING.TILES - 1:
        A = tl.where(tile_mask(p.Nq, TILING.BLOCK_M, TILING)[None, :], A, 0.0)
    return A


@triton.jit
def _add_last_row(dk, last_ptr, f, p, m, j, CONST: tl.constexpr, TILING: tl.constexpr):
    """dk [BLOCK_N, BLOCK_D] plus the share of the row after the tiles, if there is one."""
    if TILING.REST:
        d = tl.arange(0, CONST.BLOCK_D)
        row_ptr = row_of(queries(f, m), f.q_stride[4], TILING.TILES * TILING.BLOCK_M, CONST)
        q = tile(row_ptr, 0, 0, d, CONST.D, CONST.D != CONST.BLOCK_D).to(tl.float32)
        dlogits = tl.load(last_ptr + map_number(f, p, m) * p.Nk + j)
        dk += dlogits[:, None] * q[None, :]
    return dk


@triton.jit
def am_flow_bwd_strip_k_kernel(frames, p, d, dk_ptrs, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores dk of frames that begin pairs (of all frames of a clip), and dk of frames that end them.

    A dk that is not needed is None. A program: BLOCK_N keys, all rows, the frames of CHUNK pairs of a chain. Tiles of
    the maps are transposed.
    """
    MASK_D: tl.constexpr = CONST.D != CONST.BLOCK_D
    frames, p = decoded(frames, p, CONST)
    block, chunk, run = pair_owner(p, grid, CONST)
    key = block.to(CONST.INDEX) * TILING.BLOCK_N + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
    j = tl.minimum(key, p.Nk - 1)
    col = tl.arange(0, CONST.BLOCK_D)
    inside = (key[:, None] < p.Nk) & (col[None, :] < CONST.D)
    sb, sp, sz, sg = decoded_strides(d.g_stride, 4, 1)
    if run.length > 0:
        A = ()
        for _c in tl.static_range(TILING.TILES):
            A = A + (tl.zeros([TILING.BLOCK_N, TILING.BLOCK_M], tl.float32),)
        carry = A  # the gradient of A through the pair that A ends
        start = tl.where(chunk > 0, -1, 0)
        for n in range(start, run.length + 1):
            f, m = chain_map(frames, p, run, n)
            k_tile = tile(keys(f, m), f.k_stride[4], j[:, None], col[None, :], CONST.D, MASK_D)
            B = ()
            for c in tl.static_range(TILING.TILES):
                B = B + (_column_map(f, p, m, k_tile, c, CONST, TILING),)
            if n > start:
                own = map_index(run, run.first + (n - 1) * p.step)
                g_j = tl.load(d.g + run.b * sb + own.t * sp + run.z * sz + run.g * sg + j)
                pair_row = pair_number(p, own) * p.Nq
                dk = tl.zeros([TILING.BLOCK_N, CONST.BLOCK_D], tl.float32)
                next_carry = ()
                for c in tl.static_range(TILING.TILES):
                    w = _row_values(d.w + pair_row, p, c, TILING)
                    delta = _row_values(d.delta + pair_row, p, c, TILING)
                    y = signed_exp(A[c] - B[c], w, CONST.GROWTH)[0]
                    G = y * (g_j[:, None] - delta)
                    if dk_ptrs[0] is not None:
                        dA = carry[c] + G
                        rho_ptr = d.rho + map_number(frames.first, p, own) * p.Nq
                        dlogits = A[c] * (dA - _row_values(rho_ptr, p, c, TILING))
                        q_tile = _queries(frames.first, p, own, c, CONST, TILING)
                        dk = product_with(dlogits, q_tile, dk, TILING.TILES == 1, CONST.PRECISION)
                    next_carry = next_carry + (-G,)
                carry = next_carry
                if dk_ptrs[0] is not None:
                    dk = _add_last_row(dk, d.last, frames.first, p, own, j, CONST, TILING)
                    first_key = map_number(frames.first, p, own) * p.Nk
                    ptrs = dk_ptrs[0] + (first_key + key[:, None]) * CONST.D + col[None, :]
                    tl.store(ptrs, dk.to(dk_ptrs[0].dtype.element_ty), mask=inside & (n > 0))
            A = B
        end = run.first + run.length * p.step
        if dk_ptrs[1] is not None and end >= p.P:
            last = map_index(run, end - p.step + p.shift)
            f = frames.second
            dk = tl.zeros([TILING.BLOCK_N, CONST.BLOCK_D], tl.float32)
            for c in tl.static_range(TILING.TILES):
                rho_ptr = d.rho_b + map_number(f, p, last) * p.Nq
                dlogits = A[c] * (carry[c] - _row_values(rho_ptr, p, c, TILING))
                dk = product_with(
                    dlogits, _queries(f, p, last, c, CONST, TILING), dk, TILING.TILES == 1, CONST.PRECISION
                )
            dk = _add_last_row(dk, d.last_b, f, p, last, j, CONST, TILING)
            ptrs = dk_ptrs[1] + (map_number(f, p, last) * p.Nk + key[:, None]) * CONST.D + col[None, :]
            tl.store(ptrs, dk.to(dk_ptrs[1].dtype.element_ty), mask=inside)
