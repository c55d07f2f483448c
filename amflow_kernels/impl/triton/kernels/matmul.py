"""The motion operator times features: M x and e x by programs that own queries, their transposes by owners of keys.

e = expm1(M / temperature) is what P = w (1 + e) has besides a constant, whose part the host adds. docs/maths.md.
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import expm1, head_map


@triton.jit
def _pair(p, n_blocks, n_columns):
    """Block of rows, block of features, b, pair, h, g of this program, which has one pair of a head; its number."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    column = pid // n_blocks % n_columns
    at = (pid // (n_blocks * n_columns)).to(tl.int64)
    g = at % p.G
    h = at // p.G % p.H
    pair = at // (p.G * p.H) % p.P
    return block, column, at // (p.G * p.H) // p.P, pair, h, g, at


@triton.jit
def _change(
    first, second, p, b, pair, h, g, i, j,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr,
    SOFTMAX: tl.constexpr, SHARP: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """M, or with SOFTMAX e: [BLOCK_M, BLOCK_N], or TURNED."""
    unit = p.inv_temperature
    A = head_map(first, p, b, pair, h, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, TURNED)
    B = head_map(second, p, b, pair + p.shift, h, g, i, j, unit, D, BLOCK_D, PRECISION, NEGATE, TURNED)
    change = tl.abs(A - B)
    if SOFTMAX:
        change = expm1(change, SHARP)
    return change


@triton.jit
def am_flow_matmul_q_kernel(
    first, second, p, v_ptr, y_ptr, C, n_blocks, n_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    SOFTMAX: tl.constexpr, SHARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, P, H, G, Nq, C) = M v or e v, v (B, P, H, G, Nk, C). A program: BLOCK_M rows, BLOCK_C features, a pair."""
    block, column, b, pair, h, g, at = _pair(p, n_blocks, n_columns)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
    i = tl.minimum(row, p.Nq - 1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for j0 in range(0, p.Nk, BLOCK_N):
        key = j0 + tl.arange(0, BLOCK_N).to(INDEX)
        j = tl.minimum(key, p.Nk - 1)
        m = _change(first, second, p, b, pair, h, g, i, j, D, BLOCK_D, PRECISION, NEGATE, SOFTMAX, SHARP, False)
        m = tl.where(key[None, :] < p.Nk, m, 0.0)
        v = tl.load(
            v_ptr + (at * p.Nk + j[:, None]) * C + c[None, :], mask=(key[:, None] < p.Nk) & (c[None, :] < C), other=0.0
        )
        acc = tl.dot(m, v, acc=acc, input_precision="ieee")
    to = y_ptr + (at * p.Nq + row[:, None]) * C + c[None, :]
    tl.store(to, acc, mask=(row[:, None] < p.Nq) & (c[None, :] < C))


@triton.jit
def am_flow_matmul_k_kernel(
    first, second, p, u_ptr, y_ptr, C, n_blocks, n_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, NEGATE: tl.constexpr, INDEX: tl.constexpr,
    SOFTMAX: tl.constexpr, SHARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, P, H, G, Nk, C) = M^T u or e^T u, u (B, P, H, G, Nq, C). A program: BLOCK_N keys, BLOCK_C features, a pair.

    Maps are turned.
    """
    block, column, b, pair, h, g, at = _pair(p, n_blocks, n_columns)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX)
    j = tl.minimum(key, p.Nk - 1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i0 in range(0, p.Nq, BLOCK_M):
        row = i0 + tl.arange(0, BLOCK_M).to(INDEX)
        i = tl.minimum(row, p.Nq - 1)
        m = _change(first, second, p, b, pair, h, g, i, j, D, BLOCK_D, PRECISION, NEGATE, SOFTMAX, SHARP, True)
        m = tl.where(row[None, :] < p.Nq, m, 0.0)
        u = tl.load(
            u_ptr + (at * p.Nq + i[:, None]) * C + c[None, :], mask=(row[:, None] < p.Nq) & (c[None, :] < C), other=0.0
        )
        acc = tl.dot(m, u, acc=acc, input_precision="ieee")
    to = y_ptr + (at * p.Nk + key[:, None]) * C + c[None, :]
    tl.store(to, acc, mask=(key[:, None] < p.Nk) & (c[None, :] < C))
