"""The backward: coefficients of every pair's gradient, then dq and dk of every frame. docs/maths.md derives it.

Maps here are A / temperature, and gradients of them are scale * temperature * dL/dA.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import (
    any_map,
    expm1,
    frame_owner,
    head_map,
    keys,
    of_rows,
    pair_owner,
    queries,
    reciprocal,
    run_of_pairs,
)


class Gradient(NamedTuple):
    """What the backward knows of the pairs: dflow less its mean, and rows of coefficients, (B, P, Z, G, Nq) each.

    With y = S e^|A - A'|, a pair adds y (slope g - offset) to the gradient of A and takes it from that of A'. Of the
    motion operator g is a matrix, u v^T: C features of each query and key. Without the second softmax y is S.
    """

    g: Any
    g_stride: Any  # of (batch, pair, Z, window)
    u: Any  # (B, P, Z, G, Nq, C)
    v: Any  # (B, P, Z, G, Nk, C)
    slope: Any
    offset: Any
    rho: Any  # the pair's part of temperature * rowsum(A * gradient of A)
    next_rho: Any  # and of temperature * rowsum(A' * gradient of A')


@triton.jit
def _signed(d, SOFTMAX: tl.constexpr, SHARP: tl.constexpr):
    """y of `Gradient`, and e^|d|; without the second softmax the sign and 1."""
    if SOFTMAX:
        return signed_exp(d, SHARP)
    else:
        one = tl.full(d.shape, 1.0, tl.float32)
        return tl.where(d == 0, 0.0, tl.where(d < 0, -one, one)), one


@triton.jit
def signed_exp(d, SHARP: tl.constexpr):
    """S e^|d|, S = sign(d), exactly 0 where d is 0; and e^|d|."""
    h = 1.0 + expm1(tl.abs(d), SHARP)
    return tl.where(d == 0, 0.0, tl.where(d < 0, -h, h)), h


@triton.jit
def _incoming(d, p, b, pair, z, g, i, key, C: tl.constexpr, TURNED: tl.constexpr):
    """g of keys, 0 beyond the last: [1, BLOCK_N], or with features [BLOCK_M, BLOCK_N]; or TURNED."""
    if C == 0:
        sb, sp, sz, sg = d.g_stride
        g_j = tl.load(d.g + b * sb + pair * sp + z * sz + g * sg + key, mask=key < p.Nk, other=0.0)
        return of_rows(g_j, not TURNED)
    else:
        at = ((b * p.P + pair) * p.Z + z) * p.G + g
        block: tl.constexpr = 16 if C <= 16 else 32
        found = tl.zeros([key.shape[0], i.shape[0]] if TURNED else [i.shape[0], key.shape[0]], tl.float32)
        for c0 in tl.static_range(0, C, block):
            c = c0 + tl.arange(0, block)
            u = d.u + (at * p.Nq + i) * C
            v = d.v + (at * p.Nk + key) * C
            if TURNED:
                u_tile = tl.load(u[None, :] + c[:, None], mask=c[:, None] < C, other=0.0)
                v_tile = tl.load(v[:, None] + c[None, :], mask=(c[None, :] < C) & (key[:, None] < p.Nk), other=0.0)
                found = tl.dot(v_tile, u_tile, acc=found, input_precision="ieee")
            else:
                u_tile = tl.load(u[:, None] + c[None, :], mask=c[None, :] < C, other=0.0)
                v_tile = tl.load(v[None, :] + c[:, None], mask=(c[:, None] < C) & (key[None, :] < p.Nk), other=0.0)
                found = tl.dot(u_tile, v_tile, acc=found, input_precision="ieee")
        return found


@triton.jit
def am_flow_bwd_rows_kernel(
    first, second, p, d, e_sum_ptr, scale, n_blocks, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The coefficients of `Gradient`. A program: BLOCK_M rows, all keys, CHUNK pairs of a chain."""
    block, chunk, chain, b, z, g = pair_owner(p, n_blocks, n_chunks, INDEX)
    first_pair, pairs = run_of_pairs(p, chain, chunk, CHUNK)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    c = tl.arange(0, CHUNK)
    unit = p.inv_temperature
    h_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    A_y = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    A_y_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    B_y = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    B_y_g = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if pairs > 0:
        for j0 in range(0, p.Nk, BLOCK_N):
            key = j0 + tl.arange(0, BLOCK_N).to(INDEX)
            j = tl.minimum(key, p.Nk - 1)
            A = any_map(first, p, b, first_pair, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, False)
            for n in range(0, pairs):
                at = first_pair + n * p.step
                B = any_map(
                    second, p, b, at + p.shift, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, False
                )
                g_j = _incoming(d, p, b, at, z, g, i, key, C, False)
                y, h = _signed(A - B, SOFTMAX, SHARP)
                y = tl.where(key[None, :] < p.Nk, y, 0.0)
                y_g = y * g_j
                here = c[None, :] == n
                h_g += tl.where(here, tl.sum(h * g_j, 1)[:, None], 0.0)
                A_y += tl.where(here, tl.sum(A * y, 1)[:, None], 0.0)
                A_y_g += tl.where(here, tl.sum(A * y_g, 1)[:, None], 0.0)
                B_y += tl.where(here, tl.sum(B * y, 1)[:, None], 0.0)
                B_y_g += tl.where(here, tl.sum(B * y_g, 1)[:, None], 0.0)
                A = B
        pair = first_pair + c * p.step
        to = (((b * p.P + pair[None, :]) * p.Z + z) * p.G + g) * p.Nq + row[:, None]
        inside = (row[:, None] < p.Nq) & (c[None, :] < pairs)
        w = tl.full([BLOCK_M, CHUNK], 1.0, tl.float32)
        delta = tl.zeros([BLOCK_M, CHUNK], tl.float32)
        if SOFTMAX:
            w = reciprocal(p.Nk + tl.load(e_sum_ptr + to, mask=inside, other=0.0))
            delta = w * h_g
        slope = scale * w
        tl.store(d.slope + to, slope, mask=inside)
        tl.store(d.offset + to, slope * delta, mask=inside)
        tl.store(d.rho + to, slope / unit * (A_y_g - delta * A_y), mask=inside)
        tl.store(d.next_rho + to, -slope / unit * (B_y_g - delta * B_y), mask=inside)


class Frame(NamedTuple):
    """Where a frame's map stands: it is first in a pair with `after` if t < n_after, second in one with `before` if
    t >= n_before."""

    before: Any
    own: Any
    after: Any
    n_before: Any
    n_after: Any


@triton.jit
def _pair_gradient(
    A, B, d, p, b, pair, z, g, row, i, key,
    SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """What the pair (A, B) adds to the gradient of A; 0 in rows beyond the last."""
    y, _ = _signed(A - B, SOFTMAX, SHARP)
    at = (((b * p.P + pair) * p.Z + z) * p.G + g) * p.Nq
    slope = tl.load(d.slope + at + i, mask=row < p.Nq, other=0.0)
    offset = tl.load(d.offset + at + i, mask=row < p.Nq, other=0.0)
    g_j = _incoming(d, p, b, pair, z, g, i, key, C, TURNED)
    return y * (of_rows(slope, TURNED) * g_j - of_rows(offset, TURNED))


@triton.jit
def _gradient(
    f, d, p, b, t, h, g, row, key,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A of head h, and the gradient of the map whose change is measured, [BLOCK_M, BLOCK_N], or TURNED."""
    i = tl.minimum(row, p.Nq - 1)
    j = tl.minimum(key, p.Nk - 1)
    unit = p.inv_temperature
    z = h
    if MEAN_MAP:
        z = h * 0
    A = any_map(f.own, p, b, t, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, TURNED)
    dA = tl.zeros_like(A)
    if t < f.n_after:
        B = any_map(f.after, p, b, t + p.shift, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, TURNED)
        dA += _pair_gradient(A, B, d, p, b, t, z, g, row, i, key, SHARP, C, SOFTMAX, TURNED)
    if t >= f.n_before:
        B = any_map(f.before, p, b, t - p.shift, z, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, TURNED)
        dA -= _pair_gradient(B, A, d, p, b, t - p.shift, z, g, row, i, key, SHARP, C, SOFTMAX, TURNED)
    if MEAN_MAP:
        A = head_map(f.own, p, b, t, h, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, TURNED)
    return A, dA


@triton.jit
def am_flow_bwd_rho_kernel(
    f, d, p, rho_ptr, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    SHARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """temperature * rowsum(A_h * gradient) of every head of a mean map. A program: BLOCK_M rows of one head's map."""
    block, b, t, h, g, at = frame_owner(p, f.own.T, n_blocks)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    rho = tl.zeros([BLOCK_M], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        key = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        A, dA = _gradient(f, d, p, b, t, h, g, row, key, D, BLOCK_D, PRECISION, NEGATE, True, SHARP, 0, True, False)
        rho += tl.sum(tl.where(key[None, :] < p.Nk, A * dA, 0.0), 1)
    tl.store(rho_ptr + at * p.Nq + row, rho / p.inv_temperature, mask=row < p.Nq)


@triton.jit
def _rho(f, d, p, rho_ptr, b, t, h, g, at, row, MEAN_MAP: tl.constexpr):
    inside = row < p.Nq
    if MEAN_MAP:
        return tl.load(rho_ptr + at * p.Nq + row, mask=inside, other=0.0)
    else:
        to = (((b * p.P + t) * p.Z + h) * p.G + g) * p.Nq
        rho = tl.zeros([row.shape[0]], tl.float32)
        if t < f.n_after:
            rho += tl.load(d.rho + to + row, mask=inside, other=0.0)
        if t >= f.n_before:
            rho += tl.load(d.next_rho + (to - p.shift * p.Z * p.G * p.Nq) + row, mask=inside, other=0.0)
        return rho


@triton.jit
def _dlogits(
    f, d, p, rho_ptr, b, t, h, g, at, row, key,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr,
    MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """scale * dL/dlogits, [BLOCK_M, BLOCK_N], or TURNED; 0 in rows beyond the last."""
    A, dA = _gradient(f, d, p, b, t, h, g, row, key, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, SHARP, C, SOFTMAX, TURNED)
    rho = _rho(f, d, p, rho_ptr, b, t, h, g, at, row, MEAN_MAP)
    dlogits = A * (dA - of_rows(rho, TURNED))
    if MEAN_MAP:
        dlogits /= p.H
    return dlogits


@triton.jit
def matrix(base, stride, n, N, d, D: tl.constexpr, WIDE_D: tl.constexpr):
    """Whole rows n of q or k, [BLOCK, WIDE_D], 0 beyond the last and beyond D."""
    at = base + n[:, None] * stride + d[None, :]
    if D == WIDE_D:
        return tl.load(at, mask=n[:, None] < N, other=0.0)
    else:
        return tl.load(at, mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)


@triton.jit
def product_with(dlogits, x, acc, PRECISION: tl.constexpr):
    """Gradients reach far below float16's range, bfloat16's or float32's they fit."""
    if x.dtype == tl.float16:
        return tl.dot(dlogits, x.to(tl.float32), acc=acc, input_precision="tf32")  # float16 fits in tf32
    else:
        return tl.dot(dlogits.to(x.dtype), x, acc=acc, input_precision=PRECISION)


@triton.jit
def am_flow_bwd_dq_kernel(
    f, d, p, rho_ptr, dq_ptr, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr,
    INDEX: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = scale * dlogits k. A program: BLOCK_M queries of one head and frame, all keys."""
    block, b, t, h, g, at = frame_owner(p, f.own.T, n_blocks)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    col = tl.arange(0, WIDE_D)
    k = keys(f.own, b, t, h, g)
    dq = tl.zeros([BLOCK_M, WIDE_D], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        key = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        dlogits = _dlogits(
            f,
            d,
            p,
            rho_ptr,
            b,
            t,
            h,
            g,
            at,
            row,
            key,
            D,
            BLOCK_D,
            PRECISION,
            NEGATE,
            MEAN_MAP,
            SHARP,
            C,
            SOFTMAX,
            False,
        )
        dq = product_with(dlogits, matrix(k, f.own.k_stride[4], key, p.Nk, col, D, WIDE_D), dq, PRECISION)
    to = dq_ptr + at * p.Nq * D + row[:, None] * D + col[None, :]
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=(row[:, None] < p.Nq) & (col[None, :] < D))


@triton.jit
def am_flow_bwd_dk_kernel(
    f, d, p, rho_ptr, dk_ptr, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr,
    INDEX: tl.constexpr, MEAN_MAP: tl.constexpr, SHARP: tl.constexpr, C: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk = scale * dlogits^T q. A program: BLOCK_N keys of one head and frame, all queries."""
    block, b, t, h, g, at = frame_owner(p, f.own.T, n_blocks)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    col = tl.arange(0, WIDE_D)
    q = queries(f.own, b, t, h, g)
    dk = tl.zeros([BLOCK_N, WIDE_D], tl.float32)
    for i0 in range(0, p.Nq, BLOCK_M):
        row = i0 + tl.arange(0, BLOCK_M).to(INDEX)
        dlogits = _dlogits(
            f, d, p, rho_ptr, b, t, h, g, at, row, key, D, BLOCK_D, PRECISION, NEGATE, MEAN_MAP, SHARP, C, SOFTMAX, True
        )
        dk = product_with(dlogits, matrix(q, f.own.q_stride[4], row, p.Nq, col, D, WIDE_D), dk, PRECISION)
    to = dk_ptr + at * p.Nk * D + key[:, None] * D + col[None, :]
    tl.store(to, dk.to(dk_ptr.dtype.element_ty), mask=(key[:, None] < p.Nk) & (col[None, :] < D))
