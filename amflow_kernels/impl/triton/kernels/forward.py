"""The forward in three passes over tiles of the maps, for rows of any length: row statistics, e_sum, flow.

The inner loop of each pass takes whole tiles. The remaining rows or keys are one narrower tile (TAIL), which keeps the
padding small.
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    LOWEST,
    expm1,
    frame_owner,
    keys,
    map_index,
    pair_number,
    pair_owner,
    queries,
    reciprocal,
    scaled_map,
    second_frames,
    tile,
)


@triton.jit
def _statistics(top, total, q_tiles, k, stride, p, key, CONST: tl.constexpr, PARTIAL: tl.constexpr):
    """Row maxima of unscaled logits and row sums, updated with the keys of one tile; PARTIAL: some lie beyond Nk."""
    j = tl.minimum(key, p.Nk - 1)
    s = tl.zeros([top.shape[0], key.shape[0]], tl.float32)
    for n in tl.static_range((CONST.D + CONST.BLOCK_D - 1) // CONST.BLOCK_D):
        d = n * CONST.BLOCK_D + tl.arange(0, CONST.BLOCK_D)
        k_tile = tile(k, stride, j[None, :], d[:, None], CONST.D, CONST.D % CONST.BLOCK_D != 0)
        s = tl.dot(q_tiles[n], k_tile, acc=s, input_precision=CONST.PRECISION)
    if CONST.NEGATE:
        s = -s
    if PARTIAL:
        s = tl.where(key[None, :] < p.Nk, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    scaled_top = tl.maximum(new_top * p.scale_log2, LOWEST)
    x = tl.exp2(tl.fma(s, p.scale_log2, -scaled_top[:, None]))
    total = tl.fma(total, tl.exp2(tl.maximum(top * p.scale_log2, LOWEST) - scaled_top), tl.sum(x, 1))
    return new_top, total


@triton.jit
def am_flow_rows_kernel(f, p, n_blocks, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr):
    """Row statistics of all maps. A program: BLOCK_M rows of one map."""
    block, m, number = frame_owner(p, f.T, n_blocks)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    q_tiles = ()
    for n in tl.static_range((CONST.D + CONST.BLOCK_D - 1) // CONST.BLOCK_D):
        d = n * CONST.BLOCK_D + tl.arange(0, CONST.BLOCK_D)
        q_tile = tile(queries(f, m), f.q_stride[4], i[:, None], d[None, :], CONST.D, CONST.D % CONST.BLOCK_D != 0)
        q_tiles = q_tiles + (q_tile,)
    k = keys(f, m)
    # Bounded by the lowest finite number, the maximum keeps exp2(-inf - top) at 0. A row of -inf has sum 0 and is NaN.
    top = tl.full([TILING.BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([TILING.BLOCK_M], tl.float32)
    whole = p.Nk // TILING.BLOCK_N * TILING.BLOCK_N
    for j0 in range(0, whole, TILING.BLOCK_N):
        key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
        top, total = _statistics(top, total, q_tiles, k, f.k_stride[4], p, key, CONST, False)
    if TAIL:
        key = whole + tl.arange(0, TAIL).to(CONST.INDEX)
        top, total = _statistics(top, total, q_tiles, k, f.k_stride[4], p, key, CONST, True)
    offset = number * p.Nq + row
    tl.store(f.row_max + offset, tl.maximum(top * p.scale_log2, LOWEST), mask=row < p.Nq)
    tl.store(f.row_norm + offset, reciprocal(total), mask=row < p.Nq)


@triton.jit
def _e_sums(sums, frames, p, run, i, key, CONST: tl.constexpr, PARTIAL: tl.constexpr):
    """sums [BLOCK_M, CHUNK] plus e of the keys of one tile; PARTIAL: some lie beyond Nk."""
    c = tl.arange(0, CONST.CHUNK)
    j = tl.minimum(key, p.Nk - 1)
    A = scaled_map(frames.first, p, map_index(run, run.first), i, j, CONST, False)
    for n in range(0, run.length):
        t = run.first + n * p.step + p.shift
        B = scaled_map(second_frames(frames), p, map_index(run, t), i, j, CONST, False)
        e = expm1(tl.abs(A - B), CONST.LOW_TEMPERATURE)
        if PARTIAL:
            e = tl.where(key[None, :] < p.Nk, e, 0.0)
        sums += tl.where(c[None, :] == n, tl.sum(e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_weights_kernel(
    frames, p, e_sum_ptr, w_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr
):
    """e_sum_i = sum_j expm1(|A_ij - A'_ij| / temperature), w_i = 1 / (Nk + e_sum_i).

    A program: BLOCK_M rows, all keys, CHUNK pairs.
    """
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
    A = scaled_map(frames.first, p, map_index(run, run.first), i, j, CONST, True)
    for n in range(0, run.length):
        pair = run.first + n * p.step
        B = scaled_map(second_frames(frames), p, map_index(run, pair + p.shift), i, j, CONST, True)
        w = tl.load(w_ptr + pair_number(p, map_index(run, pair)) * p.Nq + i)
        if PARTIAL:
            w = tl.where(row < p.Nq, w, 0.0)
        e = expm1(tl.abs(A - B), CONST.LOW_TEMPERATURE)
        sums += tl.where(c[None, :] == n, tl.sum(w[None, :] * e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_fwd_kernel(
    frames, p, w_ptr, base_ptr, flow_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr, TAIL: tl.constexpr
):
    """flow_j = base + sum_i w_i e_ij, base (B, P, Z, G). A program: BLOCK_N keys, all rows, CHUNK pairs of a chain."""
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
