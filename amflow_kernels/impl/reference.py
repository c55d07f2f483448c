"""AM flow in eager PyTorch: the specification, and the oracle of every test when run in float64.

It forms the (Nq, Nk) maps, so its memory grows with Nq * Nk; everything else in this package exists to avoid
that. Formulas: Agrawal et al., "AM Flow: Adapters for Temporal Processing in Action Recognition",
arXiv 2411.02065; the centred form and the gradient are derived in docs/maths.md.

Shapes: q (B, T, *G, Nq, D), k (B, T, *G, Nk, D), G = (heads,) or (heads, windows). In pair form q, k are frames
a and q_b, k_b frames b, (B, P, *G, N, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HEADS = 2  # the heads' dimension in (B, T, heads, ...)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype everything is computed and returned in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_maps(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A = softmax_keys(scale * q k^T), (B, T, *G, Nq, Nk)."""
    dtype = compute_dtype(q.dtype)
    return torch.softmax(scale * (q.to(dtype) @ k.to(dtype).mT), dim=-1)


def _frame_maps(
    q: Tensor, k: Tensor, q_b: Tensor | None, k_b: Tensor | None, scale: float, lag: int
) -> tuple[Tensor, Tensor]:
    """The maps A[t] and A[t + lag] of every pair, each (B, P, *G, Nq, Nk)."""
    A = attention_maps(q, k, scale)
    if q_b is None or k_b is None:
        return A[:, :-lag], A[:, lag:]
    return A, attention_maps(q_b, k_b, scale)


def _row_weights(A_a: Tensor, A_b: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """e = expm1(M / temperature), its row mean ebar, and w = 1 / (Nk (1 + ebar)), so that P = w (1 + e)."""
    e = torch.expm1((A_a - A_b).abs() / temperature)
    ebar = e.mean(dim=-1, keepdim=True)
    return e, ebar, 1 / (e.shape[-1] * (1 + ebar))


def am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
) -> Tensor:
    """flow = P^T 1 of every frame pair, (B, P, *G, Nk); differentiable by autograd. Options as in `am_flow`."""
    with torch.autocast(q.device.type, enabled=False):
        A_a, A_b = _frame_maps(q, k, q_b, k_b, scale, lag)
        if head_reduction == "mean_map":
            A_a, A_b = A_a.mean(HEADS), A_b.mean(HEADS)
        e, ebar, w = _row_weights(A_a, A_b, temperature)
        flow = (w * (e - ebar)).sum(dim=-2)  # flow - Nq / Nk: sums to 0, keeps full relative precision
        if head_reduction == "mean":
            flow = flow.mean(HEADS)
        return flow if center else flow + q.shape[-2] / k.shape[-2]


def am_flow_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dq_b, dk_b for dflow = dL/dflow, written out as in docs/maths.md; empty where `needs` is False.

    The gradient does not depend on `center`: the two results differ by a constant.
    """
    with torch.autocast(q.device.type, enabled=False):
        A_a, A_b = _frame_maps(q, k, q_b, k_b, scale, lag)
        heads = q.shape[HEADS]
        g = dflow.to(A_a.dtype)
        if head_reduction != "none":
            g = g.unsqueeze(HEADS) / heads
        if head_reduction == "mean_map":
            M_a, M_b = A_a.mean(HEADS, keepdim=True), A_b.mean(HEADS, keepdim=True)
        else:
            M_a, M_b = A_a, A_b
        e, _, w = _row_weights(M_a, M_b, temperature)
        P = w * (1 + e)
        g = g.unsqueeze(-2)  # (B, P, *G, 1, Nk)
        delta = (P * g).sum(-1, keepdim=True)
        S_dM = torch.sign(M_a - M_b) * P * (g - delta) / temperature
        return _maps_backward(q, k, q_b, k_b, A_a, A_b, S_dM, scale, lag, needs)


def _maps_backward(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    A_a: Tensor,
    A_b: Tensor,
    S_dM: Tensor,
    scale: float,
    lag: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dq_b, dk_b, where every pair sends S * dM to its first map and -S * dM to its second."""
    if q_b is not None and k_b is not None:
        grads = (*_map_backward(q, k, A_a, S_dM, scale), *_map_backward(q_b, k_b, A_b, -S_dM, scale))
    else:
        A = attention_maps(q, k, scale)
        dA = torch.zeros_like(A)
        dA[:, :-lag] += S_dM
        dA[:, lag:] -= S_dM
        empty = q.new_empty(0)
        grads = (*_map_backward(q, k, A, dA, scale), empty, empty)
    dq, dk, dq_b, dk_b = (grad if needed else q.new_empty(0) for grad, needed in zip(grads, needs, strict=True))
    return dq, dk, dq_b, dk_b


def _map_backward(q: Tensor, k: Tensor, A: Tensor, dA: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dlogits = A * (dA - (A * dA).sum(-1, keepdim=True))
    dq = scale * (dlogits @ k.to(A.dtype))
    dk = scale * (dlogits.mT @ q.to(A.dtype))
    return dq.to(q.dtype), dk.to(k.dtype)


def am_flow_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
) -> Tensor:
    """M x or M^T x, or with `softmax` P x or P^T x, of every frame pair; differentiable by autograd.

    x is (B, P, *G, Nk, C) and the result (B, P, *G, Nq, C), the other way round if transposed.
    """
    with torch.autocast(q.device.type, enabled=False):
        A_a, A_b = _frame_maps(q, k, q_b, k_b, scale, lag)
        x = x.to(A_a.dtype)
        if not softmax:
            M = (A_a - A_b).abs()
            return M.mT @ x if transpose else M @ x
        # P = w (1 + e): what the 1 gives is nearly all of the result, and summed up without rounding errors.
        e, _, w = _row_weights(A_a, A_b, temperature)
        terms = w * x if transpose else x
        total = terms.sum(-2, keepdim=True, dtype=torch.float64).to(x.dtype)
        return total + e.mT @ terms if transpose else w * (total + e @ terms)


def am_flow_matmul_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dq_b, dk_b, dx for dy = dL/dy, written out as in docs/maths.md; empty where `needs` is False."""
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dq_b, dk_b, dx = (q.new_empty(0) for _ in needs)
        if needs[4]:
            dx = am_flow_matmul(q, k, q_b, k_b, dy, scale, lag, temperature, not transpose, softmax).to(x.dtype)
        if any(needs[:4]):
            A_a, A_b = _frame_maps(q, k, q_b, k_b, scale, lag)
            u, v = (x, dy) if transpose else (dy, x)  # of the queries, of the keys
            u, v = u.to(A_a.dtype), v.to(A_a.dtype)
            if softmax:  # a constant in a column of v has no effect: without it v that are equal give exactly 0
                e, _, w = _row_weights(A_a, A_b, temperature)
                P, G = w * (1 + e), u @ (v - v.mean(-2, keepdim=True)).mT
                dM = P * (G - (P * G).sum(-1, keepdim=True)) / temperature
            else:
                dM = u @ v.mT
            dq, dk, dq_b, dk_b = _maps_backward(
                q, k, q_b, k_b, A_a, A_b, torch.sign(A_a - A_b) * dM, scale, lag, needs[:4]
            )
    return dq, dk, dq_b, dk_b, dx
