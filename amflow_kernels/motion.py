"""Where and how attention maps change: motion heat maps, and the leading components of the change, matrix-free."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from amflow_kernels.api import am_flow_matmul
from amflow_kernels.dispatch import Impl
from amflow_kernels.problem import MAX_FEATURES, MapPairs, clips_of
from amflow_kernels.shards import on_shards

__all__ = ["MotionPCA", "motion_maps", "motion_pca"]

EXTRA = 5  # random directions beyond the components asked for
BLOCKS = 11  # of the Krylov basis; each makes a component 1.25 times as large as the rest 4 times as exact


class MotionPCA(NamedTuple):
    """Principal components of the rows of M, per pair of frames, head and window.

    G = (heads,) or (heads, windows); a head reduction drops the heads.
    """

    scores: Tensor  # (B, T - lag, *G, Nq, rank): of each query
    components: Tensor  # (B, T - lag, *G, Nk, rank): orthonormal, the largest entry of each is positive
    singular_values: Tensor  # (B, T - lag, *G, rank), falling; scores = centred M @ components
    mean: Tensor  # (B, T - lag, *G, Nk): the mean row of M


@on_shards()
@torch.no_grad()
def motion_maps(
    q: Tensor,
    k: Tensor,
    *,
    num_frames: int | None = None,
    scale: float | None = None,
    lag: int = 1,
    head_reduction: Literal["none", "mean"] = "none",
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """How much attention from each query, and to each key, changes from frame t to frame t + lag.

    With ``M[t] = |A[t] - A[t + lag]|``, the L1 norms of its rows and of its columns.

    Args:
        q, k, num_frames, scale, lag, impl: as in `am_flow`; DTensors, too.
        head_reduction: ``"none"``, or ``"mean"`` for the mean of the heads' M.

    Returns:
        rows: (B, T - lag, *G, Nq), each at most 2, and columns: (B, T - lag, *G, Nk), float32 (float64 for float64
        inputs); a head reduction drops the heads. Neither has gradients: multiply ones by `am_flow_matmul` for those.
    """
    q, k = clips_of("q", q, num_frames), clips_of("k", k, num_frames)
    M = _Change(q, k, scale, lag, head_reduction, impl)
    ones_k, ones_q = (q.new_ones((*M.lead, N, 1), dtype=torch.float32) for N in (k.shape[-2], q.shape[-2]))
    return M.times(ones_k).squeeze(-1), M.times(ones_q, transpose=True).squeeze(-1)


@on_shards()
@torch.no_grad()
def motion_pca(
    q: Tensor,
    k: Tensor,
    *,
    num_frames: int | None = None,
    rank: int = 3,
    scale: float | None = None,
    lag: int = 1,
    head_reduction: Literal["none", "mean"] = "none",
    impl: Impl | None = None,
    seed: int = 0,
) -> MotionPCA:
    """Principal components of the rows of M: of the changes of attention from each query. M is never formed.

    The scores of three components, as red, green and blue, are a picture of motion: tokens whose attention changes in
    the same way have the same colour. This is our reading of "PCA along the channel dimension" in the paper's
    supplement: the channels of a query are its row of M[t] = |A[t] - A[t + lag]|, and the mean row is subtracted.

    The method is randomised block Krylov iteration (Musco and Musco, "Randomized Block Krylov Methods for Stronger and
    Faster Approximate Singular Value Decomposition", arXiv 1504.05477) with a fixed number of products, so that the
    same input gives the same result. A component whose singular value is 1.25 times the next is found to 1e-3 rad.

    Args:
        q, k, num_frames, scale, lag, impl: as in `am_flow`; DTensors, too.
        head_reduction: ``"none"``, or ``"mean"`` for the mean of the heads' M.
        rank: components, at least 1; at most what Nq and Nk allow.
        seed: of the random directions to begin with.

    Returns:
        `MotionPCA` in float32 (float64 for float64 inputs), without gradients. Where M has fewer components (for equal
        frames it has none), the others have a singular value of 0.

    Raises:
        TypeError, ValueError: as `am_flow`, and for a rank that is too large.
    """
    q, k = clips_of("q", q, num_frames), clips_of("k", k, num_frames)
    M = _Change(q, k, scale, lag, head_reduction, impl)
    Nq, Nk = q.shape[-2], k.shape[-2]
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an int, got {type(rank).__name__}")
    if not 1 <= rank <= min(Nq, Nk):
        raise ValueError(f"rank: expected from 1 to min(Nq, Nk) = {min(Nq, Nk)}, got {rank}")
    with torch.autocast(q.device.type, enabled=False):
        M.subtract_mean_row()
        basis = _left_basis(M, Nq, Nk, rank + EXTRA, seed)
        rows = M.centred_transposed(basis)  # (..., Nk, columns of the basis): centred M is about basis @ rows^T
        # The decomposition refuses NaN and infinities: these pairs are zeroed before and NaN after it.
        bad = ~rows.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        V, S, _ = torch.linalg.svd(rows.masked_fill(bad, 0.0), full_matrices=False)
        V, S = V[..., :rank].masked_fill(bad, float("nan")), S[..., :rank].masked_fill(bad.squeeze(-1), float("nan"))
        largest = V.gather(-2, V.abs().argmax(-2, keepdim=True))
        V = torch.where(largest < 0, -V, V)
        return MotionPCA(M.centred(V), V, S, M.mean.squeeze(-1))


def _left_basis(M: _Change, Nq: int, Nk: int, width: int, seed: int) -> Tensor:
    """Orthonormal columns (..., Nq, n) that hold the leading left singular vectors of centred M."""
    device, dtype = M.mean.device, M.mean.dtype
    if width * BLOCKS >= min(Nq, Nk):
        return torch.eye(Nq, device=device, dtype=dtype).expand(*M.lead, Nq, Nq)
    generator = torch.Generator(device).manual_seed(seed)
    start = torch.randn(*M.lead, Nk, width, generator=generator, device=device, dtype=dtype)
    blocks = [_orthonormal(M.centred(start))]
    while len(blocks) < BLOCKS:
        blocks.append(_orthonormal(M.centred(_orthonormal(M.centred_transposed(blocks[-1])))))
    return _orthonormal(torch.cat(blocks, -1))


class _Change:
    """M of every pair of frames, as an operator."""

    def __init__(
        self, q: Tensor, k: Tensor, scale: float | None, lag: int, head_reduction: str, impl: Impl | None
    ) -> None:
        MapPairs(q, k, scale=scale, lag=lag)  # makes the checks
        if head_reduction not in ("none", "mean"):
            raise ValueError(f"head_reduction: expected 'none' or 'mean', got {head_reduction!r}")
        self.frames = q, k
        self.options: dict[str, Any] = {"scale": scale, "lag": lag, "impl": impl}
        self.heads = q.shape[2] if head_reduction == "mean" else None
        self.lead = (q.shape[0], q.shape[1] - lag, *q.shape[2 if self.heads is None else 3 : -2])

    def times(self, x: Tensor, transpose: bool = False) -> Tensor:
        """M x, or M^T x, of x (*lead, N, any number of columns)."""
        if self.heads is not None:
            x = x.unsqueeze(2).expand(-1, -1, self.heads, *x.shape[2:])
        y = torch.cat(
            [
                am_flow_matmul(*self.frames, part.contiguous(), transpose=transpose, **self.options)
                for part in x.split(MAX_FEATURES, -1)
            ],
            -1,
        )
        return y if self.heads is None else y.mean(2)

    def subtract_mean_row(self) -> None:
        """Prepares the centred products."""
        q, Nq = self.frames[0], self.frames[0].shape[-2]
        ones = q.new_ones((*self.lead, Nq, 1), dtype=torch.float32)
        self.mean = self.times(ones, transpose=True) / Nq  # (..., Nk, 1)

    def centred(self, x: Tensor) -> Tensor:
        """(M - 1 mean^T) x"""
        return self.times(x) - self.mean.mT @ x

    def centred_transposed(self, y: Tensor) -> Tensor:
        """(M - 1 mean^T)^T y"""
        return self.times(y, transpose=True) - self.mean * y.sum(-2, keepdim=True)


def _orthonormal(x: Tensor) -> Tensor:
    """A basis of the columns of x."""
    return torch.linalg.qr(x).Q
