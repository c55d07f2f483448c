"""What the forward saves for the backward, and the gradient that comes in."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from amflow_kernels.problem import MapPairs, Problem


def saved_sizes(problem: MapPairs) -> list[int]:
    """Floats that the forward saves: row_max and row_norm of each set of frames, then e_sum of all pairs.

    Each is a multiple of 16 bytes, so that the addresses are, too: for others Triton would compile its kernels anew.
    """
    B, T, heads, *rows, _ = problem.q.shape
    mean_map = isinstance(problem, Problem) and problem.head_reduction == "mean_map"
    maps = B * T * heads * prod(rows)
    pairs = B * problem.P * (1 if mean_map else heads) * prod(rows)
    return [-(-n // 4) * 4 for n in [maps] * (4 if problem.pair else 2) + [pairs]]


def new_saved(problem: Problem) -> Tensor:
    """Room for `saved_sizes`; zeros if some frames are in no pair, for which a forward may store nothing."""
    new = torch.zeros if problem.shift > problem.P else torch.empty
    return new(sum(saved_sizes(problem)), dtype=torch.float32, device=problem.q.device)


def subtract_mean(dflow: Tensor) -> Tensor:
    """The flow's gradient (..., Nk) less its mean over keys, contiguous.

    A constant has no effect, as the rows of P sum to 1; without it a constant gives exactly 0.
    """
    return (dflow - dflow.mean(-1, keepdim=True, dtype=torch.float64).to(dflow.dtype)).contiguous()
