"""The backward: coefficients of every pair's gradient, then dq and dk of every frame. docs/maths.md derives it.

Here maps are A / temperature, and gradients with respect to them scale * temperature * dL/dA; g includes the scale.
A row's w multiplies e before anything else does: at low temperatures w can be 1e-31 and e 1e27, and w times anything
else could underflow.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    MapIndex,
    chain_map,
    decoded,
    decoded_strides,
    growth,
    head_map,
    keys,
    map_index,
    map_number,
    matrix_product,
    pair_number,
    pair_owner,
    queries,
    reciprocal,
    round_to_tf32,
    scaled_map,
)

SIGN = tl.constexpr(-(2**31))  # the sign bit of a float32


class Gradient(NamedTuple):
    """Gradients of the pairs: scale * (dflow minus its mean), and coefficients of the rows.

    With y = S w e^|A - A'|, S = sign(A - A'), a pair adds y (g - delta) to the gradient of A and subtracts it from that
    of A'. Without the second softmax w is 1 (NaN in rows that are NaN in either map), y is S w, and delta is 0. For the
    motion operator g is the matrix u v^T, where each query and key has C features; u includes the scale.
    """

    g: Any
    g_stride: Any  # of (batch, pair, Z, window)
    u: Any  # (B, P, Z, G, Nq, C)
    v: Any  # (B, P, Z, G, Nk, C)
    w: Any  # (B, P, Z, G, Nq)
    delta: Any  # the same shape
    rho: Any  # temperature * rowsum(A * gradient of A), (B, T, H, G, Nq): of frames that begin pairs, or of a clip
    rho_b: Any  # the same of the frames that end pairs; for a clip, the same tensor


class RowParts(NamedTuple):
    """The parts that pairs add to the coefficients of their rows, (B, P, Z, G, Nq) each."""

    rho: Any  # to rho of the frame that begins the pair
    next_rho: Any  # to rho of the frame that ends it


@triton.jit
def signed_exp(x, w, GROWTH: tl.constexpr):
    """S w e^|x|, S = sign(x), exactly 0 where x is 0; and w e^|x|."""
    exp = tl.fma(growth(tl.abs(x), GROWTH), w, w)
    return with_sign(exp, x), exp


@triton.jit
def with_sign(size, x):
    """size with the sign of x, 0 where x is 0; size >= 0."""
    bits = size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)
    return tl.where(x == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _signed(x, w, CONST: tl.constexpr):
    """y of `Gradient`, and |y| as the limit from either side of x = 0: w e^|x|, or w without the second softmax."""
    if CONST.SOFTMAX:
        return signed_exp(x, w, CONST.GROWTH)
    else:
        size = tl.zeros(x.shape, tl.float32) + w
        return with_sign(size, x), size


@triton.jit
def _incoming(d, p, m, i, j, wanted, CONST: tl.constexpr):
    """g of pair m: [1, BLOCK_N], with features [BLOCK_M, BLOCK_N]; 0 if it is not wanted."""
    if CONST.C == 0:
        sb, sp, sz, sg = decoded_strides(d.g_stride, 4, 1)
        g = d.g + m.b * sb + m.t * sp + m.h * sz + m.g * sg
        return tl.load(g + j, mask=wanted, other=0.0)[None, :]
    else:
        number = pair_number(p, m)
        BLOCK_C: tl.constexpr = 16 if CONST.C <= 16 else 32
        g = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        u = d.u + (number * p.Nq + i[:, None]) * CONST.C
        v = d.v + (number * p.Nk + j[None, :]) * CONST.C
        for c0 in tl.range(0, CONST.C, BLOCK_C, num_stages=1):
            c = c0 + tl.arange(0, BLOCK_C)
            u_tile = tl.load(u + c[None, :], mask=(c[None, :] < CONST.C) & wanted, other=0.0)
            v_tile = tl.load(v + c[:, None], mask=(c[:, None] < CONST.C) & wanted, other=0.0)
            g = matrix_product(u_tile, v_tile, g, "tf32x3")
        return g


@triton.jit
def am_flow_bwd_rows_kernel(frames, p, d, parts, e_sum_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """w and delta of `Gradient`, and `RowParts`. A program: BLOCK_M rows, all keys, CHUNK pairs of a chain."""
    frames, p = decoded(frames, p, CONST)
    block, _, run = pair_owner(p, grid, CONST)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    c = tl.arange(0, CONST.CHUNK)
    delta = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    A_y = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    A_y_g = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    B_y = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    B_y_g = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
    if run.length > 0:
        for j0 in range(0, p.Nk, TILING.BLOCK_N):
            key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
            j = tl.minimum(key, p.Nk - 1)
            A = tl.zeros([TILING.BLOCK_M, TILING.BLOCK_N], tl.float32)
            for n in range(0, run.length + 1):  # map n; before the first map there is no pair, its sums are dropped
                f, m = chain_map(frames, p, run, n)
                B = scaled_map(f, p, m, i, j, CONST, False)
                if n > 0:
                    pair = map_index(run, run.first + (n - 1) * p.step)
                    g_j = _incoming(d, p, pair, i, j, True, CONST)
                    w = tl.full([TILING.BLOCK_M], 1.0, tl.float32)
                    if CONST.SOFTMAX:
                        w = reciprocal(p.Nk + tl.load(e_sum_ptr + pair_number(p, pair) * p.Nq + i))
                    y, h = _signed(A - B, w[:, None], CONST)
                    y = tl.where(key[None, :] < p.Nk, y, 0.0)
                    h = tl.where(key[None, :] < p.Nk, h, 0.0)
                    y_g = y * g_j
                    selected = c[None, :] == n - 1
                    delta += tl.where(selected, tl.sum(h * g_j, 1)[:, None], 0.0)
                    A_y += tl.where(selected, tl.sum(A * y, 1)[:, None], 0.0)
                    A_y_g += tl.where(selected, tl.sum(A * y_g, 1)[:, None], 0.0)
                    B_y += tl.where(selected, tl.sum(B * y, 1)[:, None], 0.0)
                    B_y_g += tl.where(selected, tl.sum(B * y_g, 1)[:, None], 0.0)
                A = B
        pair = run.first + c * p.step
        offset = pair_number(p, map_index(run, pair[None, :])) * p.Nq + row[:, None]
        inside = (row[:, None] < p.Nq) & (c[None, :] < run.length)
        w = tl.full([TILING.BLOCK_M, CONST.CHUNK], 1.0, tl.float32)
        if CONST.SOFTMAX:
            w = reciprocal(p.Nk + tl.load(e_sum_ptr + offset, mask=inside, other=0.0))
        else:
            w += 0.0 * (A_y + B_y)
            delta = tl.zeros([TILING.BLOCK_M, CONST.CHUNK], tl.float32)
        tl.store(d.w + offset, w, mask=inside)
        tl.store(d.delta + offset, delta, mask=inside)
        tl.store(parts.rho + offset, (A_y_g - delta * A_y) / p.inv_temperature, mask=inside)
        tl.store(parts.next_rho + offset, (delta * B_y - B_y_g) / p.inv_temperature, mask=inside)


@triton.jit
def _pair_gradient(A, B, d, p, m, wanted, i, j, CONST: tl.constexpr):
    """The gradient of A through pair m, (A, B); 0 if it is not wanted, since there may be no such pair."""
    first = pair_number(p, m) * p.Nq
    w = tl.load(d.w + first + i, mask=wanted, other=0.0)
    delta = tl.load(d.delta + first + i, mask=wanted, other=0.0)
    y, _ = _signed(A - B, w[:, None], CONST)
    return y * (_incoming(d, p, m, i, j, wanted, CONST) - delta[:, None])


class Tile(NamedTuple):
    """The rows and keys of a tile, by the roles that they have for its program."""

    owned: Any
    n_owned: Any
    inner: Any
    new: Any  # which of the inner ones no tile before had
    later: Any  # not the first tile of the program: results are there to be added to


@triton.jit
def _either(condition, a, b):
    """a if the condition holds, else b; the one that is not None if the other is."""
    if a is None:
        return b
    elif b is None:
        return a
    else:
        return tl.where(condition, a, b)


@triton.jit
def _add_gradient(out, f, p, m, A, dA, rho, tile, CONST: tl.constexpr, TILING: tl.constexpr, OWNS_KEYS: tl.constexpr):
    """Adds a tile's share, dlogits k or dlogits^T q, to the gradient of the queries or keys of map m of one head.

    dA is the gradient of the map whose change is measured, A / temperature is the map of the head.
    """
    dlogits = A * (dA - rho[:, None])
    if CONST.MEAN_MAP:
        dlogits /= p.H
    if OWNS_KEYS:
        dlogits = tl.trans(dlogits)
        base, stride = queries(f, m), f.q_stride[4]
    else:
        base, stride = keys(f, m), f.k_stride[4]
    base += tile.inner[:, None] * stride
    out += (map_number(f, p, m) * tile.n_owned + tile.owned[:, None]) * CONST.D
    # Few columns at a time: more would need more registers, as do products that are not in bfloat16.
    WIDTH: tl.constexpr = min(CONST.BLOCK_D, 32 if f.q.dtype.element_ty == tl.bfloat16 else 16)
    for d0 in tl.static_range(0, CONST.D, WIDTH):
        col = d0 + tl.arange(0, WIDTH)[None, :]
        inside = (tile.owned[:, None] < tile.n_owned) & (col < CONST.D)
        acc = tl.load(out + col, mask=inside & tile.later, other=0.0)
        x = tl.load(base + col, mask=tile.new[:, None] & (col < CONST.D), other=0.0)
        acc = product_with(dlogits, x, acc, not OWNS_KEYS or TILING.PARTIAL, CONST.PRECISION)
        tl.store(out + col, acc, mask=inside)


@triton.jit
def _add_rho(out, f, p, m, A, dA, tile):
    """Adds a tile's share to temperature * rowsum(A * gradient of A) of map m of one head."""
    out += map_number(f, p, m) * tile.n_owned + tile.owned
    acc = tl.load(out, mask=(tile.owned < tile.n_owned) & tile.later, other=0.0)
    rho = tl.sum(tl.where(tile.new[None, :], A * dA, 0.0), 1) / p.inv_temperature
    tl.store(out, acc + rho, mask=tile.owned < tile.n_owned)


@triton.jit
def _add_shares(
    out,
    d,
    f,
    p,
    m,
    second,
    A,
    dA,
    i,
    j,
    tile,
    CONST: tl.constexpr,
    TILING: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
    RHO: tl.constexpr,
):
    """Adds a tile's shares to the results for map m; for those of every head if A is the mean of their maps."""
    rho_ptr = _either(second, d.rho_b, d.rho)
    out = _either(second, out[1], out[0])
    if CONST.MEAN_MAP:
        for h in range(0, p.H):
            m_h = MapIndex(m.b, m.t, m.h + h, m.g)
            A_h = head_map(f, p, m_h, i, j, p.inv_temperature, CONST, False)
            if RHO:
                _add_rho(out, f, p, m_h, A_h, dA, tile)
            else:
                rho = tl.load(rho_ptr + map_number(f, p, m_h) * p.Nq + i)
                _add_gradient(out, f, p, m_h, A_h, dA, rho, tile, CONST, TILING, OWNS_KEYS)
    else:
        rho = tl.load(rho_ptr + map_number(f, p, m) * p.Nq + i)
        _add_gradient(out, f, p, m, A, dA, rho, tile, CONST, TILING, OWNS_KEYS)


@triton.jit
def product_with(dlogits, x, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + dlogits x.

    Gradients can underflow float16 but not bfloat16 or float32, so float16 operands are multiplied as TF32, which holds
    them exactly. EXACT: not only dlogits rounded to these types is multiplied, but also what rounding leaves. That is
    needed for rows, which sum to 0: what all keys have in common cancels, but not if dlogits is rounded. And it is
    needed for few summands, whose errors don't average out.
    """
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
        rounded = round_to_tf32(dlogits)
        if EXACT:
            acc = tl.dot(dlogits - rounded, x, acc=acc, input_precision="tf32")
        return tl.dot(rounded, x, acc=acc, input_precision="tf32")
    elif x.dtype == tl.bfloat16:
        rounded = dlogits.to(tl.bfloat16)
        if EXACT:
            acc = tl.dot((dlogits - rounded.to(tl.float32)).to(tl.bfloat16), x, acc=acc)
        return tl.dot(rounded, x, acc=acc)
    else:
        return matrix_product(dlogits, x, acc, PRECISION)


@triton.jit
def _frames_backward(
    frames, p, d, out, grid, CONST: tl.constexpr, TILING: tl.constexpr, OWNS_KEYS: tl.constexpr, RHO: tl.constexpr
):
    """Results for the frames of the CHUNK pairs of a program, added up in memory tile by tile.

    A frame's gradient has a part from the pair that it ends, which is carried along, and one from the pair that it
    begins. A program owns BLOCK_M rows, or OWNS_KEYS, BLOCK_N keys; nobody else reads or writes its results.
    """
    frames, p = decoded(frames, p, CONST)
    block, chunk, run = pair_owner(p, grid, CONST)
    if OWNS_KEYS:
        OWNED: tl.constexpr = TILING.BLOCK_N
        INNER: tl.constexpr = TILING.BLOCK_M
        n_inner = p.Nq
        n_owned = p.Nk
    else:
        OWNED: tl.constexpr = TILING.BLOCK_M
        INNER: tl.constexpr = TILING.BLOCK_N
        n_inner = p.Nk
        n_owned = p.Nq
    owned = block * OWNED + tl.arange(0, OWNED).to(CONST.INDEX)
    if run.length > 0:
        # The first frame's part from the pair that ends with it: begin with that pair.
        start = tl.where(chunk > 0, -1, 0)
        # After the last pair of a chain, the frame that ends it is left to finish: in a round more.
        rounds = run.length + 1 + (run.first + run.length * p.step >= p.P).to(tl.int32)
        for inner0 in range(0, n_inner, INNER):
            # The last tile begins early, so that no read lies beyond the end, and ignores what the one before it has.
            inner = tl.minimum(inner0, tl.maximum(n_inner - INNER, 0)) + tl.arange(0, INNER).to(CONST.INDEX)
            new = (inner >= inner0) & (inner < n_inner)
            if TILING.PARTIAL:  # fewer than one tile
                inner = tl.minimum(inner, n_inner - 1)
            A = tl.zeros([TILING.BLOCK_M, TILING.BLOCK_N], tl.float32)
            carry = tl.zeros([TILING.BLOCK_M, TILING.BLOCK_N], tl.float32)
            for n in range(start, rounds):
                f, m = chain_map(frames, p, run, tl.minimum(n, run.length))
                i, j = inner, tl.minimum(owned, n_owned - 1)
                if not OWNS_KEYS:
                    i, j = j, i
                B = scaled_map(f, p, m, i, j, CONST, False)
                pair = map_index(run, run.first + (n - 1) * p.step)
                is_pair = (n > start) & (n <= run.length)
                G = _pair_gradient(A, B, d, p, pair, is_pair, i, j, CONST)
                finished = n > 0
                if out[0] is None:
                    finished = n > 1
                if out[1] is None:
                    finished = n == 1
                if finished:
                    f, m = chain_map(frames, p, run, n - 1)
                    tile = Tile(owned, n_owned, inner, new, inner0 > 0)
                    _add_shares(out, d, f, p, m, n > 1, A, carry + G, i, j, tile, CONST, TILING, OWNS_KEYS, RHO)
                A = B
                carry = -G
            tl.debug_barrier()  # other threads of the program may read what this one wrote


@triton.jit
def am_flow_bwd_rho_kernel(frames, p, d, rho_ptrs, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """rho of `Gradient`, for mean maps."""
    _frames_backward(frames, p, d, rho_ptrs, grid, CONST, TILING, False, True)


@triton.jit
def am_flow_bwd_dq_kernel(frames, p, d, dq_ptrs, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """dq = scale * dlogits k, float32."""
    _frames_backward(frames, p, d, dq_ptrs, grid, CONST, TILING, False, False)


@triton.jit
def am_flow_bwd_dk_kernel(frames, p, d, dk_ptrs, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """dk = scale * dlogits^T q, float32."""
    _frames_backward(frames, p, d, dk_ptrs, grid, CONST, TILING, True, False)
