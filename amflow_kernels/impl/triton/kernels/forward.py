"""The forward in three passes over tiles of the maps, for rows of any length: row statistics, e_sum, flow.

The inner loop of each takes whole tiles; what is left of the rows or keys is one narrower tile (TAIL) of its own, so
that little is computed that only fills up.
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    LOWEST,
    any_map,
    expm1,
    frame_owner,
    keys,
    pair_owner,
    queries,
    reciprocal,
    run_of_pairs,
    tile,
)


@triton.jit
def _statistics(
    top, total, q_tiles, k, kn, p, j0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Row maxima (of unscaled logits) and sums, with BLOCK_N keys more; PARTIAL: with those of them that there are."""
    j = j0 + tl.arange(0, BLOCK_N).to(INDEX)
    s = tl.zeros([top.shape[0], BLOCK_N], tl.float32)
    for n in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        d = n * BLOCK_D + tl.arange(0, BLOCK_D)
        k_tile = tile(k, kn, tl.minimum(j, p.Nk - 1)[None, :], d[:, None], D, D % BLOCK_D != 0)
        s = tl.dot(q_tiles[n], k_tile, acc=s, input_precision=PRECISION)
    if NEGATE:
        s = -s
    if PARTIAL:
        s = tl.where(j[None, :] < p.Nk, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    high = tl.maximum(new_top * p.scale_log2, LOWEST)
    x = tl.exp2(tl.fma(s, p.scale_log2, -high[:, None]))
    total = tl.fma(total, tl.exp2(tl.maximum(top * p.scale_log2, LOWEST) - high), tl.sum(x, 1))
    return new_top, total


@triton.jit
def am_flow_rows_kernel(
    f, p, row_max_ptr, row_norm_ptr, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Row statistics of all maps. A program: BLOCK_M rows of one map."""
    block, b, t, h, g, at = frame_owner(p, f.T, n_blocks)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    q_tiles = ()
    for n in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        d = n * BLOCK_D + tl.arange(0, BLOCK_D)
        q_tile = tile(queries(f, b, t, h, g), f.q_stride[4], i[:, None], d[None, :], D, D % BLOCK_D != 0)
        q_tiles = q_tiles + (q_tile,)
    k = keys(f, b, t, h, g)
    kn = f.k_stride[4]
    # The lowest finite number keeps exp2(-inf - top) at 0. A row of -inf alone has the sum 0 and becomes NaN.
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = p.Nk // BLOCK_N * BLOCK_N
    for j0 in range(0, whole, BLOCK_N):
        top, total = _statistics(
            top, total, q_tiles, k, kn, p, j0, D, BLOCK_D, PRECISION, NEGATE, INDEX, BLOCK_N, False
        )
    if TAIL:
        top, total = _statistics(top, total, q_tiles, k, kn, p, whole, D, BLOCK_D, PRECISION, NEGATE, INDEX, TAIL, True)
    to = at * p.Nq + row
    tl.store(row_max_ptr + to, tl.maximum(top * p.scale_log2, LOWEST), mask=row < p.Nq)
    tl.store(row_norm_ptr + to, reciprocal(total), mask=row < p.Nq)


@triton.jit
def _e_sums(
    sums, first, second, p, b, z, g, first_pair, pairs, i, j0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_M, CHUNK], with BLOCK_N keys more; PARTIAL: with those of them that there are."""
    c = tl.arange(0, CHUNK)
    key = j0 + tl.arange(0, BLOCK_N).to(INDEX)
    j = tl.minimum(key, p.Nk - 1)
    unit = p.inv_temperature
    A = any_map(first, p, b, first_pair, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, False)
    for n in range(0, pairs):
        t = first_pair + n * p.step + p.shift
        B = any_map(second, p, b, t, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, False)
        e = expm1(tl.abs(A - B), SHARP)
        if PARTIAL:
            e = tl.where(key[None, :] < p.Nk, e, 0.0)
        sums += tl.where(c[None, :] == n, tl.sum(e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_weights_kernel(
    first, second, p, e_sum_ptr, w_ptr, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """e_sum_i = sum_j expm1(|A_ij - A'_ij| / temperature), w_i = 1 / (Nk + e_sum_i).

    A program: BLOCK_M rows, all keys, CHUNK pairs.
    """
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    sums = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if pairs > 0:
        whole = p.Nk // BLOCK_N * BLOCK_N
        for j0 in range(0, whole, BLOCK_N):
            sums = _e_sums(
                sums, first, second, p, b, z, g, first_pair, pairs, i, j0,
                D, BLOCK_D, PRECISION, NEGATE, INDEX, MEAN_MAP, SHARP, CHUNK, BLOCK_N, False,
            )  # fmt: skip
        if TAIL:
            sums = _e_sums(
                sums, first, second, p, b, z, g, first_pair, pairs, i, whole,
                D, BLOCK_D, PRECISION, NEGATE, INDEX, MEAN_MAP, SHARP, CHUNK, TAIL, True,
            )  # fmt: skip
        c = tl.arange(0, CHUNK)
        pair = first_pair + c * p.step
        to = (((b * p.P + pair[None, :]) * p.Z + z) * p.G + g) * p.Nq + row[:, None]
        inside = (row[:, None] < p.Nq) & (c[None, :] < pairs)
        tl.store(e_sum_ptr + to, sums, mask=inside)
        tl.store(w_ptr + to, reciprocal(p.Nk + sums), mask=inside)


@triton.jit
def _column_sums(
    sums, first, second, p, w_ptr, b, z, g, first_pair, pairs, i0, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_N, CHUNK], with BLOCK_M rows more; PARTIAL: with those of them that there are.

    The maps are turned: sums over what is along the rows of a tile need far fewer shuffles than sums down its columns.
    """
    c = tl.arange(0, CHUNK)
    row = i0 + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    unit = p.inv_temperature
    A = any_map(first, p, b, first_pair, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, True)
    for n in range(0, pairs):
        at = first_pair + n * p.step
        B = any_map(second, p, b, at + p.shift, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, True)
        w = tl.load(w_ptr + (((b * p.P + at) * p.Z + z) * p.G + g) * p.Nq + i)
        if PARTIAL:
            w = tl.where(row < p.Nq, w, 0.0)
        e = expm1(tl.abs(A - B), SHARP)
        sums += tl.where(c[None, :] == n, tl.sum(w[None, :] * e, 1)[:, None], 0.0)
        A = B
    return sums


@triton.jit
def am_flow_fwd_kernel(
    first, second, p, w_ptr, base_ptr, flow_ptr, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """flow_j = base + sum_i w_i e_ij, base (B, P, Z, G). A program: BLOCK_N keys, all rows, CHUNK pairs of a chain."""
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    j = tl.minimum(key, p.Nk - 1)
    sums = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    if pairs > 0:
        whole = p.Nq // BLOCK_M * BLOCK_M
        for i0 in range(0, whole, BLOCK_M):
            sums = _column_sums(
                sums, first, second, p, w_ptr, b, z, g, first_pair, pairs, i0, j,
                D, BLOCK_D, PRECISION, NEGATE, INDEX, MEAN_MAP, SHARP, CHUNK, BLOCK_M, False,
            )  # fmt: skip
        if TAIL:
            sums = _column_sums(
                sums, first, second, p, w_ptr, b, z, g, first_pair, pairs, whole, j,
                D, BLOCK_D, PRECISION, NEGATE, INDEX, MEAN_MAP, SHARP, CHUNK, TAIL, True,
            )  # fmt: skip
        c = tl.arange(0, CHUNK)
        pair = first_pair + c * p.step
        at = ((b * p.P + pair[None, :]) * p.Z + z) * p.G + g
        base = tl.load(base_ptr + at, mask=c[None, :] < pairs, other=0.0)
        inside = (key[:, None] < p.Nk) & (c[None, :] < pairs)
        tl.store(flow_ptr + at * p.Nk + key[:, None], base + sums, mask=inside)
