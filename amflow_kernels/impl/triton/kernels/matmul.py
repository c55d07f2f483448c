"""The motion operator times features: programs that own queries compute M x and e x, owners of keys the transposes.

P = w (1 + e) with e = expm1(M / temperature): the host adds the term of the constant 1. See docs/maths.md.
"""

import triton
import triton.language as tl

from amflow_kernels.impl.triton.kernels.maps import MapIndex, decoded, growth, head_map, matrix_product


@triton.jit
def _pair_owner(p, grid):
    """Block of rows or keys, block of features, pair and its position in (B, P, H, G) of this program."""
    pid = tl.program_id(0)
    blocks, columns = grid.blocks >> 1, grid.columns >> 1
    block = pid % blocks
    column = pid // blocks % columns
    number = (pid // (blocks * columns)).to(tl.int64)
    g = number % p.G
    h = number // p.G % p.H
    pair = number // (p.G * p.H) % p.P
    return block, column, MapIndex(number // (p.G * p.H) // p.P, pair, h, g), number


@triton.jit
def _change(frames, p, m, i, j, CONST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """M, or with SOFTMAX e, of pair m: [BLOCK_M, BLOCK_N], or TRANSPOSED."""
    A = head_map(frames.first, p, m, i, j, p.inv_temperature, CONST, TRANSPOSED)
    m_second = MapIndex(m.b, m.t + p.shift, m.h, m.g)
    B = head_map(frames.second, p, m_second, i, j, p.inv_temperature, CONST, TRANSPOSED)
    change = tl.abs(A - B)
    if CONST.SOFTMAX:
        change = growth(change, CONST.GROWTH)
    return change


@triton.jit
def am_flow_matmul_q_kernel(
    frames, p, v_ptr, y_ptr, C, grid, CONST: tl.constexpr, TILING: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y (B, P, H, G, Nq, C) = M v or e v, v (B, P, H, G, Nk, C). A program: BLOCK_M rows, BLOCK_C features, a pair."""
    frames, p = decoded(frames, p, CONST)
    block, column, m, number = _pair_owner(p, grid)
    row = block * TILING.BLOCK_M + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
    i = tl.minimum(row, p.Nq - 1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([TILING.BLOCK_M, BLOCK_C], tl.float32)
    for j0 in range(0, p.Nk, TILING.BLOCK_N):
        key = j0 + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
        j = tl.minimum(key, p.Nk - 1)
        change = _change(frames, p, m, i, j, CONST, False)
        change = tl.where(key[None, :] < p.Nk, change, 0.0)
        v = tl.load(
            v_ptr + (number * p.Nk + j[:, None]) * C + c[None, :],
            mask=(key[:, None] < p.Nk) & (c[None, :] < C),
            other=0.0,
        )
        acc = matrix_product(change, v, acc, "tf32x3")
    y_ptrs = y_ptr + (number * p.Nq + row[:, None]) * C + c[None, :]
    tl.store(y_ptrs, acc, mask=(row[:, None] < p.Nq) & (c[None, :] < C))


@triton.jit
def am_flow_matmul_k_kernel(
    frames, p, u_ptr, y_ptr, C, grid, CONST: tl.constexpr, TILING: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y (B, P, H, G, Nk, C) = M^T u or e^T u, u (B, P, H, G, Nq, C). A program: BLOCK_N keys, BLOCK_C features, a pair.

    Tiles of the maps are transposed.
    """
    frames, p = decoded(frames, p, CONST)
    block, column, m, number = _pair_owner(p, grid)
    key = block * TILING.BLOCK_N + tl.arange(0, TILING.BLOCK_N).to(CONST.INDEX)
    j = tl.minimum(key, p.Nk - 1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([TILING.BLOCK_N, BLOCK_C], tl.float32)
    for i0 in range(0, p.Nq, TILING.BLOCK_M):
        row = i0 + tl.arange(0, TILING.BLOCK_M).to(CONST.INDEX)
        i = tl.minimum(row, p.Nq - 1)
        change = _change(frames, p, m, i, j, CONST, True)
        change = tl.where(row[None, :] < p.Nq, change, 0.0)
        u = tl.load(
            u_ptr + (number * p.Nq + i[:, None]) * C + c[None, :],
            mask=(row[:, None] < p.Nq) & (c[None, :] < C),
            other=0.0,
        )
        acc = matrix_product(change, u, acc, "tf32x3")
    y_ptrs = y_ptr + (number * p.Nk + key[:, None]) * C + c[None, :]
    tl.store(y_ptrs, acc, mask=(key[:, None] < p.Nk) & (c[None, :] < C))
