"""The whole forward in one pass, where rows of two frames' maps fit in registers.

A row of a map is KEY_TILES tiles of BLOCK_N keys and REST keys more, each a column of its own: 257 keys are one tile
and one column. With PARTIAL the keys do not fill the tiles: the last one begins early and leaves out what the one
before it has, or if there is one alone, reads the last key again. All tiles have one width, since the compiler would
give tiles of different widths layouts in which warps repeat each other's work. A program has ROW_TILES tiles of
BLOCK_M rows, so that keys once loaded serve all of them; the last block of rows, if 16 hold what is left, is one of
16 (TAIL).

The tiles and columns of all rows are one flat tuple: of row tile r, [r * width : (r + 1) * width].
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    LOWEST,
    expm1,
    keys,
    pair_owner,
    product,
    queries,
    reciprocal,
    run_of_pairs,
    tile,
)


@triton.jit
def begins(c, n, BLOCK: tl.constexpr, TILES: tl.constexpr, PARTIAL: tl.constexpr):
    """First of the n rows or keys in tile c."""
    if PARTIAL and c == TILES - 1 and TILES > 1:
        return n - BLOCK
    else:
        return c * BLOCK


@triton.jit
def members(n, BLOCK: tl.constexpr, TILES: tl.constexpr, PARTIAL: tl.constexpr):
    """The rows or keys of a tile, from its first on."""
    if PARTIAL and TILES == 1:
        return tl.minimum(tl.arange(0, BLOCK), n - 1)
    else:
        return tl.arange(0, BLOCK)


@triton.jit
def own_members(n, BLOCK: tl.constexpr, TILES: tl.constexpr, PARTIAL: tl.constexpr):
    """Which of a tile's rows or keys no other tile has."""
    if TILES == 1:
        return tl.arange(0, BLOCK) < n
    else:
        return tl.arange(0, BLOCK) >= TILES * BLOCK - n


@triton.jit
def whole_rows(
    f, p, b, t, h, g, row0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, KEY_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Whole rows of +-q k^T, as a flat tuple."""
    d = tl.arange(0, BLOCK_D)
    j = members(p.Nk, BLOCK_N, KEY_TILES, PARTIAL).to(INDEX)
    sn = f.q_stride[4]
    q = queries(f, b, t, h, g) + row0 * sn
    q_tiles = ()
    for r in tl.static_range(ROW_TILES):
        i = tl.minimum(r * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX), p.Nq - 1 - row0)
        q_tiles = q_tiles + (tile(q, sn, i[:, None], d[None, :], D, D != BLOCK_D),)
    kn = f.k_stride[4]
    k = keys(f, b, t, h, g)
    found = ()
    for c in tl.static_range(KEY_TILES):
        k_tile = tile(
            k + tl.full([], begins(c, p.Nk, BLOCK_N, KEY_TILES, PARTIAL), INDEX) * kn,
            kn,
            j[None, :],
            d[:, None],
            D,
            D != BLOCK_D,
        )
        for r in tl.static_range(ROW_TILES):
            s = tl.dot(q_tiles[r], k_tile)
            if NEGATE:
                s = -s
            if PARTIAL and c == KEY_TILES - 1:
                s = tl.where(own_members(p.Nk, BLOCK_N, KEY_TILES, PARTIAL)[None, :], s, -float("inf"))
            found = found + (s,)
    rest = ()
    for x in tl.static_range(REST):
        k_row = tile(k + tl.full([], KEY_TILES * BLOCK_N + x, INDEX) * kn, kn, 0, d, D, D != BLOCK_D).to(tl.float32)
        for r in tl.static_range(ROW_TILES):
            s = tl.sum(product(q_tiles[r].to(tl.float32), k_row[None, :]), 1)
            if NEGATE:
                s = -s
            rest = rest + (s,)
    rows = ()
    for r in tl.static_range(ROW_TILES):
        for c in tl.static_range(KEY_TILES):
            rows = rows + (found[c * ROW_TILES + r],)
        for x in tl.static_range(REST):
            rows = rows + (rest[x * ROW_TILES + r],)
    return rows


@triton.jit
def row_sum(x, r: tl.constexpr, KEY_TILES: tl.constexpr, REST: tl.constexpr):
    """Of the rows of tile r."""
    width: tl.constexpr = KEY_TILES + REST
    tiles = x[r * width]
    for c in tl.static_range(1, KEY_TILES):
        tiles += x[r * width + c]
    total = tl.sum(tiles, 1)
    for c in tl.static_range(KEY_TILES, width):
        total += x[r * width + c]
    return total


@triton.jit
def _strip(
    f, p, b, t, h, g, row0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, KEY_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Whole rows of A / temperature, as a flat tuple. Stores the row statistics of A."""
    s = whole_rows(
        f, p, b, t, h, g, row0, D, BLOCK_D, NEGATE, INDEX, ROW_TILES, BLOCK_M, KEY_TILES, BLOCK_N, REST, PARTIAL
    )
    width: tl.constexpr = KEY_TILES + REST
    A = ()
    for r in tl.static_range(ROW_TILES):
        high = s[r * width]
        for c in tl.static_range(1, KEY_TILES):
            high = tl.maximum(high, s[r * width + c])
        top = tl.max(high, 1)
        for c in tl.static_range(KEY_TILES, width):
            top = tl.maximum(top, s[r * width + c])
        top = tl.maximum(top * p.scale_log2, LOWEST)  # finite: exp2(-inf - top) has to be 0
        x = ()
        for c in tl.static_range(KEY_TILES):
            x = x + (tl.exp2(tl.fma(s[r * width + c], p.scale_log2, -top[:, None])),)
        for c in tl.static_range(KEY_TILES, width):
            x = x + (tl.exp2(tl.fma(s[r * width + c], p.scale_log2, -top)),)
        norm = reciprocal(row_sum(x, 0, KEY_TILES, REST))
        factor = norm * p.inv_temperature
        for c in tl.static_range(KEY_TILES):
            A = A + (product(x[c], factor[:, None]),)
        for c in tl.static_range(KEY_TILES, width):
            A = A + (product(x[c], factor),)
        row = row0 + r * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
        to = (((b * f.T + t) * p.H + h) * p.G + g) * p.Nq + row
        tl.store(f.row_max + to, top, mask=row < p.Nq)
        tl.store(f.row_norm + to, norm, mask=row < p.Nq)
    return A


@triton.jit
def _rows(
    first, second, p, e_sum_ptr, part, b, z, g, first_pair, pairs, row0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, SHARP: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, KEY_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    REST: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """What ROW_TILES * BLOCK_M rows add to the flow of a run of pairs."""
    width: tl.constexpr = KEY_TILES + REST
    A = _strip(
        first, p, b, first_pair, z, g, row0,
        D, BLOCK_D, NEGATE, INDEX, ROW_TILES, BLOCK_M, KEY_TILES, BLOCK_N, REST, PARTIAL,
    )  # fmt: skip
    for step in range(0, pairs):
        at = first_pair + step * p.step
        B = _strip(
            second, p, b, at + p.shift, z, g, row0,
            D, BLOCK_D, NEGATE, INDEX, ROW_TILES, BLOCK_M, KEY_TILES, BLOCK_N, REST, PARTIAL,
        )  # fmt: skip
        e = ()
        for c in tl.static_range(ROW_TILES * width):
            e = e + (expm1(tl.abs(A[c] - B[c]), SHARP),)
        pair = ((b * p.P + at) * p.Z + z) * p.G + g
        w = ()
        lost = 0.0
        for r in tl.static_range(ROW_TILES):
            row = row0 + r * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
            e_sum = row_sum(e, r, KEY_TILES, REST)
            tl.store(e_sum_ptr + pair * p.Nq + row, e_sum, mask=row < p.Nq)
            w_r = tl.where(row < p.Nq, reciprocal(p.Nk + e_sum), 0.0)
            lost += tl.sum(w_r * e_sum)
            w = w + (w_r,)
        lost = lost / p.Nk
        to = part + pair * p.Nk
        for c in tl.static_range(KEY_TILES):
            x = w[0][:, None] * e[c]
            for r in tl.static_range(1, ROW_TILES):
                x = tl.fma(w[r][:, None], e[r * width + c], x)
            to_tile = to + begins(c, p.Nk, BLOCK_N, KEY_TILES, PARTIAL) + tl.arange(0, BLOCK_N)
            if PARTIAL and c == KEY_TILES - 1:
                tl.store(to_tile, tl.sum(x, 0) - lost, mask=own_members(p.Nk, BLOCK_N, KEY_TILES, PARTIAL))
            else:
                tl.store(to_tile, tl.sum(x, 0) - lost)
        for c in tl.static_range(REST):
            x = w[0] * e[KEY_TILES + c]
            for r in tl.static_range(1, ROW_TILES):
                x = tl.fma(w[r], e[r * width + KEY_TILES + c], x)
            tl.store(to + KEY_TILES * BLOCK_N + c, tl.sum(x) - lost)
        A = B


@triton.jit
def am_flow_strip_kernel(
    first, second, p, e_sum_ptr, part_ptr, part_size, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr, SHARP: tl.constexpr,
    CHUNK: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, KEY_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, REST: tl.constexpr, PARTIAL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program: ROW_TILES * BLOCK_M rows, all keys, CHUNK pairs of a chain.

    Leaves what the backward needs, and part (n_blocks, B, P, Z, G, Nk): sum_i w_i (e_ij - ebar_i) of the block's rows.
    """
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    part = part_ptr + block.to(tl.int64) * part_size
    row0 = block.to(INDEX) * (ROW_TILES * BLOCK_M)
    if pairs > 0:
        if TAIL and block == n_blocks - 1:
            _rows(
                first, second, p, e_sum_ptr, part, b, z, g, first_pair, pairs, row0,
                D, BLOCK_D, NEGATE, INDEX, SHARP, 1, 16, KEY_TILES, BLOCK_N, REST, PARTIAL,
            )  # fmt: skip
        else:
            _rows(
                first, second, p, e_sum_ptr, part, b, z, g, first_pair, pairs, row0,
                D, BLOCK_D, NEGATE, INDEX, SHARP, ROW_TILES, BLOCK_M, KEY_TILES, BLOCK_N, REST, PARTIAL,
            )  # fmt: skip
