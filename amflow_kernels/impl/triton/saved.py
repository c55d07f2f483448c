"""What the forward saves for the backward, and the gradient that comes in."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from amflow_kernels.problem import MapPairs, Problem


def saved_sizes(problem: MapPairs) -> list[int]:
    """Floats that the forward saves: row_max and row_norm of each set of frames, then e_sum of all pairs."""
    q = problem.q
    rows = prod(q.shape[3:-1])  # of all windows of a head's map
    mean_map = isinstance(problem, Problem) and problem.head_reduction == "mean_map"
    pair_heads = 1 if mean_map else problem.heads
    maps = problem.B * problem.T * problem.heads * rows
    pairs = problem.B * problem.P * pair_heads * rows
    return [maps] * (4 if problem.pair else 2) + [pairs]


def new_saved(problem: Problem) -> Tensor:
    """Zeros of `saved_sizes`: frames that are in no pair keep them."""
    return problem.q.new_zeros(sum(saved_sizes(problem)), dtype=torch.float32)


def subtract_mean(dflow: Tensor) -> Tensor:
    """The flow's gradient (..., Nk) less its mean over keys, contiguous.

    A constant has no effect, as the rows of P sum to 1; without it a constant gives exactly 0.
    """
    return (dflow - dflow.mean(-1, keepdim=True, dtype=torch.float64).to(dflow.dtype)).contiguous()
