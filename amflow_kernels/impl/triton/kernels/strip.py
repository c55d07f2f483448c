"""The whole forward in one pass, where rows of two frames' maps fit in registers.

A row of a map is TILES tiles of BLOCK_N keys, and REST keys whose columns are computed one by one: 257 keys are one
tile and one column. PARTIAL means that the keys do not fill the tiles: the last tile then starts early and ignores the
keys that it shares with the one before; a single tile reads the last key repeatedly instead. All tiles have one width,
because the compiler would give tiles of different widths layouts in which warps repeat each other's work. A program has
ROW_TILES tiles of BLOCK_M rows, so each loaded key serves all of them; if at most 16 rows remain for the last program,
it has one tile of 16 (TAIL).

A map is computed at one place of the code, the loop over frames: at two places, the compiler may lay out a row in two
ways and hence sum it in two orders, and then equal frames differ.

The tiles and columns of all rows are one flat tuple; row tile r is [r * width : (r + 1) * width].
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    LOWEST,
    chain_map,
    decoded,
    growth,
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


@triton.jit
def tile_start(c, n, BLOCK: tl.constexpr, TILING: tl.constexpr):
    """First of the n rows or keys in tile c of BLOCK."""
    if TILING.PARTIAL and c == TILING.TILES - 1 and TILING.TILES > 1:
        return n - BLOCK
    else:
        return c * BLOCK


@triton.jit
def tile_offsets(n, BLOCK: tl.constexpr, TILING: tl.constexpr):
    """Offsets of a tile's rows or keys from its first."""
    if TILING.PARTIAL and TILING.TILES == 1:
        return tl.minimum(tl.arange(0, BLOCK), n - 1)
    else:
        return tl.arange(0, BLOCK)


@triton.jit
def tile_mask(n, BLOCK: tl.constexpr, TILING: tl.constexpr):
    """Which rows or keys of the last tile are neither beyond n nor in another tile."""
    if TILING.TILES == 1:
        return tl.arange(0, BLOCK) < n
    else:
        return tl.arange(0, BLOCK) >= TILING.TILES * BLOCK - n


@triton.jit
def _rest(q_tiles, k, kn, CONST: tl.constexpr, TILING: tl.constexpr, SAME_BITS: tl.constexpr):
    """The REST columns of +-q k^T, each for all tiles of rows."""
    MASK_D: tl.constexpr = CONST.D != CONST.BLOCK_D
    d = tl.arange(0, CONST.BLOCK_D)
    columns = ()
    for x in tl.static_range(TILING.REST):
        row_ptr = row_of(k, kn, TILING.TILES * TILING.BLOCK_N + x, CONST)
        for r in tl.static_range(TILING.ROW_TILES):
            if SAME_BITS:
                equal_keys = tile(row_ptr, 0, tl.arange(0, 16)[None, :], d[:, None], CONST.D, MASK_D)
                s = tl.max(tl.dot(q_tiles[r], equal_keys), 1)
            else:
                k_row = tile(row_ptr, 0, 0, d, CONST.D, MASK_D).to(tl.float32)
                s = tl.sum(product(q_tiles[r].to(tl.float32), k_row[None, :]), 1)
            if CONST.NEGATE:
                s = -s
            columns = columns + (s,)
    return columns


@triton.jit
def whole_rows(f, p, m, row0, CONST: tl.constexpr, TILING: tl.constexpr, SAME_BITS: tl.constexpr):
    """Whole rows of +-q k^T from row0 on, as a flat tuple.

    SAME_BITS: the REST columns have the bits that they have as part of a tile, since a product of matrices computes
    them. Otherwise sums do, in another order: the forward, which needs no sign of A - A', would have no registers left.
    """
    MASK_D: tl.constexpr = CONST.D != CONST.BLOCK_D
    d = tl.arange(0, CONST.BLOCK_D)
    j = tile_offsets(p.Nk, TILING.BLOCK_N, TILING).to(CONST.INDEX)
    sn = f.q_stride[4]
    q = queries(f, m) + row0 * sn
    q_tiles = ()
    for r in tl.static_range(TILING.ROW_TILES):
        i = tl.minimum(r * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX), p.Nq - 1 - row0)
        q_tiles = q_tiles + (tile(q, sn, i[:, None], d[None, :], CONST.D, MASK_D),)
    kn = f.k_stride[4]
    k = keys(f, m)
    if SAME_BITS:  # before the tiles, when more registers are free
        columns = _rest(q_tiles, k, kn, CONST, TILING, True)
    tiles = ()
    for c in tl.static_range(TILING.TILES):
        first = row_of(k, kn, tile_start(c, p.Nk, TILING.BLOCK_N, TILING), CONST)
        k_tile = tile(first, kn, j[None, :], d[:, None], CONST.D, MASK_D)
        for r in tl.static_range(TILING.ROW_TILES):
            s = tl.dot(q_tiles[r], k_tile)
            if CONST.NEGATE:
                s = -s
            if TILING.PARTIAL and c == TILING.TILES - 1:
                s = tl.where(tile_mask(p.Nk, TILING.BLOCK_N, TILING)[None, :], s, -float("inf"))
            tiles = tiles + (s,)
    if not SAME_BITS:
        columns = _rest(q_tiles, k, kn, CONST, TILING, False)
    rows = ()
    for r in tl.static_range(TILING.ROW_TILES):
        for c in tl.static_range(TILING.TILES):
            rows = rows + (tiles[c * TILING.ROW_TILES + r],)
        for x in tl.static_range(TILING.REST):
            rows = rows + (columns[x * TILING.ROW_TILES + r],)
    return rows


@triton.jit
def zero_rows(TILING: tl.constexpr):
    """Zeros in the shape of whole rows, as a flat tuple."""
    rows = ()
    for _ in tl.static_range(TILING.ROW_TILES):
        for _ in tl.static_range(TILING.TILES):
            rows = rows + (tl.zeros([TILING.BLOCK_M, TILING.BLOCK_N], tl.float32),)
        for _ in tl.static_range(TILING.REST):
            rows = rows + (tl.zeros([TILING.BLOCK_M], tl.float32),)
    return rows


@triton.jit
def row_sum(x, r: tl.constexpr, TILING: tl.constexpr):
    """Sums of the rows of row tile r."""
    width: tl.constexpr = TILING.TILES + TILING.REST
    tiles = x[r * width]
    for c in tl.static_range(1, TILING.TILES):
        tiles += x[r * width + c]
    total = tl.sum(tiles, 1)
    for c in tl.static_range(TILING.TILES, width):
        total += x[r * width + c]
    return total


@triton.jit
def _maps_of_rows(f, p, m, row0, CONST: tl.constexpr, TILING: tl.constexpr):
    """Whole rows of A / temperature from row0 on, as a flat tuple. Stores the row statistics of A."""
    s = whole_rows(f, p, m, row0, CONST, TILING, False)
    width: tl.constexpr = TILING.TILES + TILING.REST
    A = ()
    for r in tl.static_range(TILING.ROW_TILES):
        largest = s[r * width]
        for c in tl.static_range(1, TILING.TILES):
            largest = tl.maximum(largest, s[r * width + c])
        top = tl.max(largest, 1)
        for c in tl.static_range(TILING.TILES, width):
            top = tl.maximum(top, s[r * width + c])
        top = tl.maximum(top * p.scale_log2, LOWEST)  # finite, so that exp2(-inf - top) is 0
        x = ()
        for c in tl.static_range(TILING.TILES):
            x = x + (tl.exp2(tl.fma(s[r * width + c], p.scale_log2, -top[:, None])),)
        for c in tl.static_range(TILING.TILES, width):
            x = x + (tl.exp2(tl.fma(s[r * width + c], p.scale_log2, -top)),)
        norm = reciprocal(row_sum(x, 0, TILING))
        factor = norm * p.inv_temperature
        for c in tl.static_range(TILING.TILES):
            A = A + (product(x[c], factor[:, None]),)
        for c in tl.static_range(TILING.TILES, width):
            A = A + (product(x[c], factor),)
        row = row0 + r * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
        offset = map_number(f, p, m) * p.Nq + row
        tl.store(f.row_max + offset, top, mask=row < p.Nq)
        tl.store(f.row_norm + offset, norm, mask=row < p.Nq)
    return A


@triton.jit
def _flow_of_pair(p, e_sum_ptr, part, m, row0, A, B, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores the share of a program's rows in the flow of pair m, (A, B), and e_sum."""
    width: tl.constexpr = TILING.TILES + TILING.REST
    e = ()
    for c in tl.static_range(TILING.ROW_TILES * width):
        e = e + (growth(tl.abs(A[c] - B[c]), CONST.GROWTH),)
    number = pair_number(p, m)
    w = ()
    mean = 0.0
    for r in tl.static_range(TILING.ROW_TILES):
        row = row0 + r * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
        e_sum = row_sum(e, r, TILING)
        tl.store(e_sum_ptr + number * p.Nq + row, e_sum, mask=row < p.Nq)
        w_r = tl.where(row < p.Nq, reciprocal(p.Nk + e_sum), 0.0)
        # Not fused with the sum: a lane would round its own product differently from that of the lane it adds.
        mean += tl.sum(product(w_r, e_sum))
        w = w + (w_r,)
    mean = mean / p.Nk
    part_ptr = part + number * p.Nk
    for c in tl.static_range(TILING.TILES):
        x = w[0][:, None] * e[c]
        for r in tl.static_range(1, TILING.ROW_TILES):
            x = tl.fma(w[r][:, None], e[r * width + c], x)
        tile_ptrs = part_ptr + tile_start(c, p.Nk, TILING.BLOCK_N, TILING) + tl.arange(0, TILING.BLOCK_N)
        if TILING.PARTIAL and c == TILING.TILES - 1:
            tl.store(tile_ptrs, tl.sum(x, 0) - mean, mask=tile_mask(p.Nk, TILING.BLOCK_N, TILING))
        else:
            tl.store(tile_ptrs, tl.sum(x, 0) - mean)
    for c in tl.static_range(TILING.REST):
        x = product(w[0], e[TILING.TILES + c])
        for r in tl.static_range(1, TILING.ROW_TILES):
            x = tl.fma(w[r], e[r * width + TILING.TILES + c], x)
        tl.store(part_ptr + TILING.TILES * TILING.BLOCK_N + c, tl.sum(x) - mean)


@triton.jit
def _flow_of_rows(frames, p, e_sum_ptr, part, run, row0, CONST: tl.constexpr, TILING: tl.constexpr):
    """Stores the share of a program's rows in the flow of its pairs."""
    A = zero_rows(TILING)
    for n in range(0, run.length + 1):
        f, m = chain_map(frames, p, run, n)
        B = _maps_of_rows(f, p, m, row0, CONST, TILING)
        if n > 0:
            _flow_of_pair(p, e_sum_ptr, part, map_index(run, run.first + (n - 1) * p.step), row0, A, B, CONST, TILING)
        A = B


@triton.jit(do_not_specialize=["part_size"])
def am_flow_strip_kernel(
    frames,
    p,
    e_sum_ptr,
    part_ptr,
    part_size: tl.int64,
    grid,
    CONST: tl.constexpr,
    TILING: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A program: ROW_TILES * BLOCK_M rows, all keys, CHUNK pairs of a chain. The last block of rows is tiled by TAIL,
    unless that is None.

    Stores row statistics and e_sum for the backward, and part (blocks, B, P, Z, G, Nk): sum_i w_i (e_ij - ebar_i) over
    the block's rows.
    """
    frames, p = decoded(frames, p, CONST)
    block, _, run = pair_owner(p, grid, CONST)
    part = part_ptr + block.to(tl.int64) * part_size
    row0 = block.to(CONST.INDEX) * (TILING.ROW_TILES * TILING.BLOCK_M)
    if run.length > 0:
        if TAIL is not None and block == (grid.blocks >> 1) - 1:
            _flow_of_rows(frames, p, e_sum_ptr, part, run, row0, CONST, TAIL)
        else:
            _flow_of_rows(frames, p, e_sum_ptr, part, run, row0, CONST, TILING)
