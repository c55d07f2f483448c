"""The forward in three passes over tiles of the maps, for rows of any length: row statistics, e_sum, flow.

The inner loop of each pass takes whole tiles. The remaining rows or keys are one narrower tile (TAIL), which keeps the
padding small.
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    LOWEST,
    chain_map,
    decoded,
    frame_owner,
    growth,
    keys,
    logits,
    map_index,
    matrix_product,
    pair_number,
    pair_owner,
    queries,
    reciprocal,
    scaled_map,
    tile,
)


@triton.jit
def _row_logits(f, p, m, q_tile, i, key, CONST: tl.constexpr):
    """+-q k^T of rows i and the keys of one tile. q_tile are the rows' queries, unless heads are wider than BLOCK_D."""
    j = tl.minimum(key, p.Nk - 1)
    if CONST.D > CONST.BLOCK_D:
        return logits(f, m, i, j, CONST, False)
    else:
        d = tl.arange(0, CONST.BLOCK_D)
        k_tile = tile(keys(f, m), f.k_stride[4], j[None, :], d[:, None], CONST.D, CONST.D != CONST.BLOCK_D)
        s = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        s = matrix_product(q_tile, k_tile, s, CONST.PRECISION)
        if CONST.NEGATE:
            s = -s
        return s


@triton.jit
def _statistics(top, total, s, p, key, PARTIAL: tl.constexpr):
    """Row maxima of unscaled logits and row sums, updated with the logits s of a tile; PARTIAL: some lie beyond Nk."""
    if PARTIAL:
        s = tl.where(key[None, :] < p.Nk, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    scaled_top = tl.maximum(new_top * p.scale_log2, LOWEST)
    x = tl.exp2(tl.fma(s, p.scale_log2, -scaled_top[:, None]))
    total = tl.fma(total, tl.exp2(tl.maximum(top * p.scale_log2, LOWEST) - scaled_top), tl.sum(x, 1))
    return new_top, total


@triton.jit
def am_flow_rows_kernel(frames, p, grid, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr):
    """Row statistics of all maps of the first frames. A program: BLOCK_M rows of one map."""
    frames, p = decoded(frames, p, CONST)
    f = frames.first
    block, m, number = frame_owner(p, f.T, grid)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    d = tl.arange(0, CONST.BLOCK_D)
    q_tile = tile(queries(f, m), f.q_stride[4], i[:, None], d[None, :], CONST.D, CONST.D != CONST.BLOCK_D)
    # Bounded by the lowest finite number, the maximum keeps exp2(-inf - top) at 0. A row of -inf has sum 0 and is NaN.
    top = tl.full([TILING.BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([TILING.BLOCK_M], tl.float32)
    whole = p.Nk // TILING.BLOCK_N * TILING.BLOCK_N
    for j0 in range(0, whole, TILING.BLOCK_N):
        key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
        s = _row_logits(f, p, m, q_tile, i, key, CONST)
        top, total = _statistics(top, total, s, p, key, False)
    if TAIL:
        key = whole + tl.arange(0, TAIL).to(CONST.INDEX)
        s = _row_logits(f, p, m, q_tile, i, key, CONST)
        top, total = _statistics(top, total, s, p, key, True)
    offset = number * p.Nq + row
    tl.store(f.row_max + offset, tl.maximum(top * p.scale_log2, LOWEST), mask=row < p.Nq)
    tl.store(f.row_norm + offset, reciprocal(total), mask=row < p.Nq)


@triton.jit
def _e_sums(sums, frames, p, run, i, key, CONST: tl.constexpr, PARTIAL: tl.constexpr):
    """sums [BLOCK_M, CHUNK] plus e of the keys of one tile; PARTIAL: some lie beyond Nk."""
    c = tl.arange(0, CONST.CHUNK)
    j = tl.minimum(key, p.Nk - 1)
    A = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for n in range(0, run.length + 1):
        f, m = chain_map(frames, p, run, n)
        B = scaled_map(f, p, m, i, j, CONST, False)
        if n > 0:
            e = growth(tl.abs(A - B), CONST.GROWTH)
            if PARTIAL:
                e = tl.where(key[None, :] < p.Nk, e, 0.0)
            sums += tl.where(c[None, :] == n - 1, tl.sum(e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_weights_kernel(
    frames, p, e_sum_ptr, w_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr
):
    """e_sum_i = sum_j expm1(|A_ij - A'_ij| / temperature), w_i = 1 / (Nk + e_sum_i).

    A program: BLOCK_M rows, all keys, CHUNK pairs.
    """
    frames, p = decoded(frames, p, CONST)
    block, _, run = pair_owner(p, grid, CONST)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    sums = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    if run.length > 0:
        whole = p.Nk // TILING.BLOCK_N * TILING.BLOCK_N
        for j0 in range(0, whole, TILING.BLOCK_N):
            key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
            sums = _e_sums(sums, frames, p, run, i, key, CONST, False)
        if TAIL:
            key = whole + tl.arange(0, TAIL).to(CONST.INDEX)
            sums = _e_sums(sums, frames, p, run, i, key, CONST, True)
        c = tl.arange(0, CONST.CHUNK)
        pair = run.first + c * p.step
        offset = pair_number(p, map_index(run, pair[None, :])) * p.Nq + row[:, None]
        inside = (row[:, None] < p.Nq) & (c[None, :] < run.length)
        tl.store(e_sum_ptr + offset, sums, mask=inside)
        tl.store(w_ptr + offset, reciprocal(p.Nk + sums), mask=inside)


@triton.jit
def _column_sums(sums, frames, p, w_ptr, run, row, j, CONST: tl.constexpr, PARTIAL: tl.constexpr):
    """sums [BLOCK_N, CHUNK] plus w e of the rows of one tile; PARTIAL: some lie beyond Nq.

    The tiles are transposed: sums along the rows of a tile take far fewer shuffles than sums along its columns.
    """
    c = tl.arange(0, CONST.CHUNK)
    i = tl.minimum(row, p.Nq - 1)
    A = tl.zeros([j.shape[0], i.shape[0]], tl.float32)
    for n in range(0, run.length + 1):
        f, m = chain_map(frames, p, run, n)
        B = scaled_map(f, p, m, i, j, CONST, True)
        pair = run.first + tl.maximum(n - 1, 0) * p.step
        # Outside the branch, so that the load overlaps with the map's.
        w = tl.load(w_ptr + pair_number(p, map_index(run, pair)) * p.Nq + i)
        if PARTIAL:
            w = tl.where(row < p.Nq, w, 0.0)
        if n > 0:
            e = growth(tl.abs(A - B), CONST.GROWTH)
            sums += tl.where(c[None, :] == n - 1, tl.sum(w[None, :] * e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_fwd_kernel(
    frames, p, w_ptr, base_ptr, flow_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr
):
    """flow_j = base + sum_i w_i e_ij, base (B, P, Z, G). A program: BLOCK_N keys, all rows, CHUNK pairs of a chain."""
    frames, p = decoded(frames, p, CONST)
    block, _, run = pair_owner(p, grid, CONST)
    key = block * TILING.BLOCK_N + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
    j = tl.minimum(key, p.Nk - 1)
    sums = tl.zeros([TILING.BLOCK_N, CONST.CHUNK], tl.float32)
    if run.length > 0:
        whole = p.Nq // TILING.BLOCK_M * TILING.BLOCK_M
        for i0 in range(0, whole, TILING.BLOCK_M):
            row = i0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
            sums = _column_sums(sums, frames, p, w_ptr, run, row, j, CONST, False)
        if TAIL:
            row = whole + tl.arange(0, TAIL).to(CONST.INDEX)
            sums = _column_sums(sums, frames, p, w_ptr, run, row, j, CONST, True)
        c = tl.arange(0, CONST.CHUNK)
        number = pair_number(p, map_index(run, (run.first + c * p.step)[None, :]))
        base = tl.load(base_ptr + number, mask=c[None, :] < run.length, other=0.0)
        inside = (key[:, None] < p.Nk) & (c[None, :] < run.length)
        tl.store(flow_ptr + number * p.Nk + key[:, None], base + sums, mask=inside)
