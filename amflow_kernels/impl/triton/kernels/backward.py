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
    expand_rows,
    expm1,
    frame_owner,
    head_map,
    keys,
    map_index,
    pair_number,
    pair_owner,
    queries,
    reciprocal,
    round_to_tf32,
    scaled_map,
    second_frames,
)


class Gradient(NamedTuple):
    """Gradients of the pairs: scale * (dflow minus its mean), and coefficients of the rows, (B, P, Z, G, Nq) each.

    With y = S w e^|A - A'|, S = sign(A - A'), a pair adds y (g - delta) to the gradient of A and subtracts it from that
    of A'. Without the second softmax w is 1 (NaN in rows that are NaN in either map), y is S w, and delta is 0. For the
    motion operator g is the matrix u v^T, where each query and key has C features; u includes the scale.
    """

    g: Any
    g_stride: Any  # of (batch, pair, Z, window)
    u: Any  # (B, P, Z, G, Nq, C)
    v: Any  # (B, P, Z, G, Nk, C)
    w: Any
    delta: Any
    rho: Any  # the pair's part of temperature * rowsum(A * gradient of A)
    next_rho: Any  # the pair's part of temperature * rowsum(A' * gradient of A')
    head_rho: Any = (
        None  # mean maps only, (B, T, H, G, Nq): temperature * rowsum(A_h * gradient of A_h), A_h head h's map
    )


@triton.jit
def signed_exp(x, w, LOW_TEMPERATURE: tl.constexpr):
    """S w e^|x|, S = sign(x), exactly 0 where x is 0; and w e^|x|."""
    exp = tl.fma(expm1(tl.abs(x), LOW_TEMPERATURE), w, w)
    return tl.where(x == 0, 0.0, tl.where(x < 0, -exp, exp)), exp


@triton.jit
def _signed(x, w, CONST: tl.constexpr):
    """y of `Gradient`, and |y| as the limit from either side of x = 0: w e^|x|, or w without the second softmax."""
    if CONST.SOFTMAX:
        return signed_exp(x, w, CONST.LOW_TEMPERATURE)
    else:
        size = tl.zeros(x.shape, tl.float32) + w
        return tl.where(x == 0, 0.0, tl.where(x < 0, -size, size)), size


@triton.jit
def _incoming(d, p, m, i, key, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """g of pair m, 0 for keys beyond the last: [1, BLOCK_N], with features [BLOCK_M, BLOCK_N]; or TRANSPOSED."""
    if CONST.C == 0:
        sb, sp, sz, sg = d.g_stride
        g_j = tl.load(d.g + m.b * sb + m.t * sp + m.h * sz + m.g * sg + key, mask=key < p.Nk, other=0.0)
        return expand_rows(g_j, not TRANSPOSED)
    else:
        number = pair_number(p, m)
        BLOCK_C: tl.constexpr = 16 if CONST.C <= 16 else 32
        g = tl.zeros([key.shape[0], i.shape[0]] if TRANSPOSED else [i.shape[0], key.shape[0]], tl.float32)
        for c0 in tl.static_range(0, CONST.C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            u = d.u + (number * p.Nq + i) * CONST.C
            v = d.v + (number * p.Nk + key) * CONST.C
            if TRANSPOSED:
                u_tile = tl.load(u[None, :] + c[:, None], mask=c[:, None] < CONST.C, other=0.0)
                v_mask = (c[None, :] < CONST.C) & (key[:, None] < p.Nk)
                v_tile = tl.load(v[:, None] + c[None, :], mask=v_mask, other=0.0)
                g = tl.dot(v_tile, u_tile, acc=g, input_precision="ieee")
            else:
                u_tile = tl.load(u[:, None] + c[None, :], mask=c[None, :] < CONST.C, other=0.0)
                v_mask = (c[:, None] < CONST.C) & (key[None, :] < p.Nk)
                v_tile = tl.load(v[None, :] + c[:, None], mask=v_mask, other=0.0)
                g = tl.dot(u_tile, v_tile, acc=g, input_precision="ieee")
        return g


@triton.jit
def am_flow_bwd_rows_kernel(frames, p, d, e_sum_ptr, grid, CONST: tl.constexpr, TILING: tl.constexpr):
    """The coefficients of `Gradient`. A program: BLOCK_M rows, all keys, CHUNK pairs of a chain."""
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
            A = scaled_map(frames.first, p, map_index(run, run.first), i, j, CONST, False)
            for n in range(0, run.length):
                pair = run.first + n * p.step
                B = scaled_map(second_frames(frames), p, map_index(run, pair + p.shift), i, j, CONST, False)
                g_j = _incoming(d, p, map_index(run, pair), i, key, CONST, False)
                w = tl.full([TILING.BLOCK_M], 1.0, tl.float32)
                if CONST.SOFTMAX:
                    w = reciprocal(p.Nk + tl.load(e_sum_ptr + pair_number(p, map_index(run, pair)) * p.Nq + i))
                y, h = _signed(A - B, w[:, None], CONST)
                y = tl.where(key[None, :] < p.Nk, y, 0.0)
                y_g = y * g_j
                selected = c[None, :] == n
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
        tl.store(d.rho + offset, (A_y_g - delta * A_y) / p.inv_temperature, mask=inside)
        tl.store(d.next_rho + offset, (delta * B_y - B_y_g) / p.inv_temperature, mask=inside)


class Frame(NamedTuple):
    """A set of frames, and the sets that the other frames of their pairs are in.

    Frame t is the first of a pair with a frame of `after` if t < n_after, and the second of a pair with a frame of
    `before` if t >= n_before.
    """

    before: Any
    own: Any
    after: Any
    n_before: Any
    n_after: Any


@triton.jit
def _pair_gradient(A, B, d, p, m, row, key, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The gradient of A through pair m, (A, B); 0 in rows beyond the last."""
    first = pair_number(p, m) * p.Nq
    i = tl.minimum(row, p.Nq - 1)
    w = tl.load(d.w + first + i, mask=row < p.Nq, other=0.0)
    delta = tl.load(d.delta + first + i, mask=row < p.Nq, other=0.0)
    y, _ = _signed(A - B, expand_rows(w, TRANSPOSED), CONST)
    g_j = _incoming(d, p, m, i, key, CONST, TRANSPOSED)
    return y * (g_j - expand_rows(delta, TRANSPOSED))


@triton.jit
def _gradient(f, d, p, m, row, key, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A of the head of m, and the gradient of the map whose change is measured, [BLOCK_M, BLOCK_N], or TRANSPOSED."""
    i = tl.minimum(row, p.Nq - 1)
    j = tl.minimum(key, p.Nk - 1)
    z = m.h
    if CONST.MEAN_MAP:
        z = m.h * 0
    A = scaled_map(f.own, p, MapIndex(m.b, m.t, z, m.g), i, j, CONST, TRANSPOSED)
    dA = tl.zeros_like(A)
    if m.t < f.n_after:
        B = scaled_map(f.after, p, MapIndex(m.b, m.t + p.shift, z, m.g), i, j, CONST, TRANSPOSED)
        dA += _pair_gradient(A, B, d, p, MapIndex(m.b, m.t, z, m.g), row, key, CONST, TRANSPOSED)
    if m.t >= f.n_before:
        pair = MapIndex(m.b, m.t - p.shift, z, m.g)
        B = scaled_map(f.before, p, pair, i, j, CONST, TRANSPOSED)
        dA -= _pair_gradient(B, A, d, p, pair, row, key, CONST, TRANSPOSED)
    if CONST.MEAN_MAP:
        A = head_map(f.own, p, m, i, j, p.inv_temperature, CONST, TRANSPOSED)
    return A, dA


@triton.jit
def am_flow_bwd_rho_kernel(f, d, p, n_blocks, CONST: tl.constexpr, TILING: tl.constexpr):
    """head_rho of `Gradient`, for mean maps. A program: BLOCK_M rows of one head's map."""
    block, m, number = frame_owner(p, f.own.T, n_blocks)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    rho = tl.zeros([TILING.BLOCK_M], tl.float32)
    for j0 in range(0, p.Nk, TILING.BLOCK_N):
        key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
        A, dA = _gradient(f, d, p, m, row, key, CONST, False)
        rho += tl.sum(tl.where(key[None, :] < p.Nk, A * dA, 0.0), 1)
    tl.store(d.head_rho + number * p.Nq + row, rho / p.inv_temperature, mask=row < p.Nq)


@triton.jit
def _rho(f, d, p, m, number, row, MEAN_MAP: tl.constexpr):
    """temperature * rowsum(A * gradient of A) in the rows of map m, the one of this number; 0 beyond the last."""
    inside = row < p.Nq
    if MEAN_MAP:
        return tl.load(d.head_rho + number * p.Nq + row, mask=inside, other=0.0)
    else:
        first = pair_number(p, m) * p.Nq
        rho = tl.zeros([row.shape[0]], tl.float32)
        if m.t < f.n_after:
            rho += tl.load(d.rho + first + row, mask=inside, other=0.0)
        if m.t >= f.n_before:
            rho += tl.load(d.next_rho + (first - p.shift * p.Z * p.G * p.Nq) + row, mask=inside, other=0.0)
        return rho


@triton.jit
def _dlogits(f, d, p, m, number, row, key, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """scale * dL/dlogits, [BLOCK_M, BLOCK_N], or TRANSPOSED; 0 in rows beyond the last."""
    A, dA = _gradient(f, d, p, m, row, key, CONST, TRANSPOSED)
    rho = _rho(f, d, p, m, number, row, CONST.MEAN_MAP)
    dlogits = A * (dA - expand_rows(rho, TRANSPOSED))
    if CONST.MEAN_MAP:
        dlogits /= p.H
    return dlogits


@triton.jit
def matrix(base, stride, n, N, d, D: tl.constexpr, WIDE_D: tl.constexpr):
    """Whole rows n of q or k, [BLOCK, WIDE_D], 0 beyond row N - 1 and beyond D."""
    ptrs = base + n[:, None] * stride + d[None, :]
    if D == WIDE_D:
        return tl.load(ptrs, mask=n[:, None] < N, other=0.0)
    else:
        return tl.load(ptrs, mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)


@triton.jit
def product_with(dlogits, x, acc, PRECISION: tl.constexpr):
    """acc + dlogits x.

    Gradients can underflow float16 but not bfloat16 or float32, so float16 operands are multiplied as TF32, which holds
    them exactly.
    """
    if x.dtype == tl.float16:
        return tl.dot(round_to_tf32(dlogits), x.to(tl.float32), acc=acc, input_precision="tf32")
    else:
        return tl.dot(dlogits.to(x.dtype), x, acc=acc, input_precision=PRECISION)


@triton.jit
def am_flow_bwd_dq_kernel(f, d, p, dq_ptr, n_blocks, CONST: tl.constexpr, TILING: tl.constexpr, WIDE_D: tl.constexpr):
    """dq = scale * dlogits k. A program: BLOCK_M queries of one head and frame, all keys."""
    block, m, number = frame_owner(p, f.own.T, n_blocks)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    col = tl.arange(0, WIDE_D)
    k = keys(f.own, m)
    dq = tl.zeros([TILING.BLOCK_M, WIDE_D], tl.float32)
    for j0 in range(0, p.Nk, TILING.BLOCK_N):
        key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
        dlogits = _dlogits(f, d, p, m, number, row, key, CONST, False)
        k_tile = matrix(k, f.own.k_stride[4], key, p.Nk, col, CONST.D, WIDE_D)
        dq = product_with(dlogits, k_tile, dq, CONST.PRECISION)
    dq_ptrs = dq_ptr + number * p.Nq * CONST.D + row[:, None] * CONST.D + col[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=(row[:, None] < p.Nq) & (col[None, :] < CONST.D))


@triton.jit
def am_flow_bwd_dk_kernel(f, d, p, dk_ptr, n_blocks, CONST: tl.constexpr, TILING: tl.constexpr, WIDE_D: tl.constexpr):
    """dk = scale * dlogits^T q. A program: BLOCK_N keys of one head and frame, all queries."""
    block, m, number = frame_owner(p, f.own.T, n_blocks)
    key = block * TILING.BLOCK_N + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
    col = tl.arange(0, WIDE_D)
    q = queries(f.own, m)
    dk = tl.zeros([TILING.BLOCK_N, WIDE_D], tl.float32)
    for i0 in range(0, p.Nq, TILING.BLOCK_M):
        row = i0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
        dlogits = _dlogits(f, d, p, m, number, row, key, CONST, True)
        q_tile = matrix(q, f.own.q_stride[4], row, p.Nq, col, CONST.D, WIDE_D)
        dk = product_with(dlogits, q_tile, dk, CONST.PRECISION)
    dk_ptrs = dk_ptr + number * p.Nk * CONST.D + key[:, None] * CONST.D + col[None, :]
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=(key[:, None] < p.Nk) & (col[None, :] < CONST.D))
