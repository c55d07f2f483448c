"""What the forward on a GPU leaves for its backward."""

from __future__ import annotations

from math import prod

from torch import Tensor


def saved_sizes(q: Tensor, pair: bool, lag: int, head_reduction: str) -> list[int]:
    """Floats that the forward leaves for the backward: row_max, row_norm of each set of frames, e_sum of all pairs."""
    windows, Nq = prod(q.shape[3:-2]), q.shape[-2]
    B, T, H = q.shape[:3]
    maps, pairs = B * T * H * windows * Nq, B * (T - lag) * (1 if head_reduction == "mean_map" else H) * windows * Nq
    return [maps] * (4 if pair else 2) + [pairs]
