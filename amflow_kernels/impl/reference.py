"""AM flow in eager PyTorch: the specification, and the oracle of every test when run in float64.

It forms the (Nq, Nk) maps, so its memory grows with Nq * Nk; everything else in this package exists to avoid
that. Formulas: Agrawal et al., "AM Flow: Adapters for Temporal Processing in Action Recognition",
arXiv 2411.02065; the centred form and the gradient are derived in docs/maths.md.

Shapes: q (B, T, *G, Nq, D), k (B, T, *G, Nk, D), G = (heads,) or (heads, windows). In pair form q, k are frames
a and q_b, k_b frames b, (B, P, *G, N, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from amflow_kernels.impl.base import Implementation, clear_unpaired
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

HEADS = 2  # the heads' dimension in (B, T, heads, ...)


class Reference(Implementation):
    """Eager PyTorch for every device and dtype. The forwards are differentiable by autograd, too."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """flow = P^T 1 of every pair of frames."""
        with torch.autocast(problem.q.device.type, enabled=False):
            A_a, A_b = pair_maps(problem)
            if problem.head_reduction == "mean_map":
                A_a, A_b = A_a.mean(HEADS), A_b.mean(HEADS)
            e, ebar, w = _row_weights(A_a, A_b, problem.temperature)
            flow = (w * (e - ebar)).sum(dim=-2)  # flow - Nq / Nk: sums to 0, keeps full relative precision
            if problem.head_reduction == "mean":
                flow = flow.mean(HEADS)
            return flow if problem.center else flow + problem.Nq / problem.Nk, None

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """The gradients written out as in docs/maths.md.

        They do not depend on `center`: the two results differ by a constant.
        """
        with torch.autocast(problem.q.device.type, enabled=False):
            A_a, A_b = pair_maps(problem)
            g = dflow.to(A_a.dtype)
            if problem.head_reduction != "none":
                g = g.unsqueeze(HEADS) / problem.heads
            if problem.head_reduction == "mean_map":
                M_a, M_b = A_a.mean(HEADS, keepdim=True), A_b.mean(HEADS, keepdim=True)
            else:
                M_a, M_b = A_a, A_b
            e, _, w = _row_weights(M_a, M_b, problem.temperature)
            P = w * (1 + e)
            g = g.unsqueeze(-2)  # (B, P, *G, 1, Nk)
            delta = (P * g).sum(-1, keepdim=True)
            S_dM = torch.sign(M_a - M_b) * P * (g - delta) / problem.temperature
            return _maps_backward(problem, A_a, A_b, S_dM, needs)

    def matmul(self, problem: MatmulProblem) -> Tensor:
        """M x or M^T x, or with `softmax` P x or P^T x, of every pair of frames."""
        return _product(problem, problem.x, problem.transpose)

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """The gradients written out as in docs/maths.md; that of x is the transposed product with dy."""
        q, x = problem.q, problem.x
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dq_b, dk_b, dx = (q.new_empty(0) for _ in needs)
            if needs[4]:
                dx = _product(problem, dy, not problem.transpose).to(x.dtype)
            if any(needs[:4]):
                A_a, A_b = pair_maps(problem)
                u, v = (x, dy) if problem.transpose else (dy, x)  # of the queries, of the keys
                u, v = u.to(A_a.dtype), v.to(A_a.dtype)
                if problem.softmax:  # a constant in a column of v has no effect: without it equal v give exactly 0
                    e, _, w = _row_weights(A_a, A_b, problem.temperature)
                    P, G = w * (1 + e), u @ (v - v.mean(-2, keepdim=True)).mT
                    dM = P * (G - (P * G).sum(-1, keepdim=True)) / problem.temperature
                else:  # a row of the result that is NaN has a gradient of NaN; sign(NaN) is 0
                    dM = (u @ v.mT).masked_fill((A_a - A_b).isnan(), nan)
                dq, dk, dq_b, dk_b = _maps_backward(problem, A_a, A_b, torch.sign(A_a - A_b) * dM, needs[:4])
        return dq, dk, dq_b, dk_b, dx

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        return []


def attention_maps(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A = softmax_keys(scale * q k^T), (B, T, *G, Nq, Nk), in float32, or in float64 for float64 inputs."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    A = torch.softmax(scale * (q.to(dtype) @ k.to(dtype).mT), dim=-1)
    # `softmax` sums long rows less exactly than `sum`. That error is the same for equal rows, and adds up in the flow.
    return A / A.sum(dim=-1, keepdim=True)


def pair_maps(problem: MapPairs) -> tuple[Tensor, Tensor]:
    """The two maps of every pair of frames, each (B, P, *G, Nq, Nk)."""
    A = attention_maps(problem.q, problem.k, problem.logit_scale)
    if problem.q_b is None or problem.k_b is None:
        return A[:, : -problem.lag], A[:, problem.lag :]
    return A, attention_maps(problem.q_b, problem.k_b, problem.logit_scale)


def _row_weights(A_a: Tensor, A_b: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """e = expm1(M / temperature), its row mean ebar, and w = 1 / (Nk (1 + ebar)), so that P = w (1 + e)."""
    e = torch.expm1((A_a - A_b).abs() / temperature)
    ebar = e.mean(dim=-1, keepdim=True)
    return e, ebar, 1 / (e.shape[-1] * (1 + ebar))


def _product(problem: MatmulProblem, x: Tensor, transpose: bool) -> Tensor:
    """The operator, or its transpose, times x."""
    with torch.autocast(problem.q.device.type, enabled=False):
        A_a, A_b = pair_maps(problem)
        x = x.to(A_a.dtype)
        if not problem.softmax:
            M = (A_a - A_b).abs()
            return M.mT @ x if transpose else M @ x
        # P = w (1 + e): the 1 gives nearly all of the result, and is summed in float64, without rounding errors.
        # w multiplies e before x does: at low temperatures w x could underflow.
        e, _, w = _row_weights(A_a, A_b, problem.temperature)
        terms = w * x if transpose else x
        total = terms.sum(-2, keepdim=True, dtype=torch.float64).to(x.dtype)
        return total + (w * e).mT @ x if transpose else w * total + (w * e) @ x


def _maps_backward(
    problem: MapPairs, A_a: Tensor, A_b: Tensor, S_dM: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dq, dk, dq_b, dk_b, where every pair sends S * dM to its first map and -S * dM to its second."""
    q, k, q_b, k_b = problem.frames
    scale, lag = problem.logit_scale, problem.lag
    if q_b is not None and k_b is not None:
        grads = (*_map_backward(q, k, A_a, S_dM, scale), *_map_backward(q_b, k_b, A_b, -S_dM, scale))
    else:
        A = attention_maps(q, k, scale)
        dA = torch.zeros_like(A)
        dA[:, :-lag] += S_dM
        dA[:, lag:] -= S_dM
        grads = (*_map_backward(q, k, A, dA, scale), q.new_empty(0), q.new_empty(0))
        clear_unpaired(problem, grads)
    return tuple(grad if needed else q.new_empty(0) for grad, needed in zip(grads, needs, strict=True))


def _map_backward(q: Tensor, k: Tensor, A: Tensor, dA: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dlogits = A * (dA - (A * dA).sum(-1, keepdim=True))
    dq = scale * (dlogits @ k.to(A.dtype))
    dk = scale * (dlogits.mT @ q.to(A.dtype))
    return dq.to(q.dtype), dk.to(k.dtype)
