"""What the implementations for GPUs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def saved_sizes(q: Tensor, pair: bool, lag: int, head_reduction: str) -> list[int]:
    """Floats that the forward leaves for the backward: row_max, row_norm of each set of frames, e_sum of all pairs."""
    windows, Nq = prod(q.shape[3:-2]), q.shape[-2]
    B, T, H = q.shape[:3]
    maps, pairs = B * T * H * windows * Nq, B * (T - lag) * (1 if head_reduction == "mean_map" else H) * windows * Nq
    return [maps] * (4 if pair else 2) + [pairs]


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Contiguous tensors for the gradients of q, k, q_b, k_b that are needed; for the others, tensors without elements.

    The first of the inputs is q, whose dtype and device all have.
    """
    q = inputs[0]
    assert q is not None
    return tuple(
        torch.empty(x.shape if needed and x is not None else 0, dtype=q.dtype, device=q.device)
        for x, needed in zip(inputs, needs, strict=True)
    )


def less_mean(dflow: Tensor) -> Tensor:
    """The flow's gradient (..., Nk) less its mean over keys, contiguous.

    A constant has no effect, as the rows of P sum to 1; without it a constant gives exactly 0.
    """
    return (dflow - dflow.mean(-1, keepdim=True, dtype=torch.float64).to(dflow.dtype)).contiguous()
