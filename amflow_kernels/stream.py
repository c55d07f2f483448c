"""AM flow of live video, frame by frame."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from amflow_kernels.api import am_flow_pair
from amflow_kernels.dispatch import check_impl
from amflow_kernels.problem import MapPairs, check_frames, check_options

__all__ = ["AMFlowStream"]


class AMFlowStream:
    """AM flow as frames arrive: keeps copies of q and k of the last `lag` frames, never an attention map.

    The flows are those of `am_flow` on the whole clip (on the CPU bit for bit), without gradients::

        stream = AMFlowStream()
        for frame in video:
            q, k = ...              # (B, heads, N, D) of this frame
            flow = stream(q, k)     # (B, heads, N), or None for the first `lag` frames

    Args:
        lag: distance in frames of the two maps that are compared, at least 1.
        impl: as in `am_flow`.
        options: `scale`, `temperature`, `head_reduction` and `center`, as in `am_flow`.
    """

    def __init__(self, *, lag: int = 1, impl: str | None = None, **options: Any) -> None:
        check_options(lag=lag, **options)
        check_impl(impl, None)
        self._options: dict[str, Any] = {"impl": impl, **options}
        self._frames: deque[tuple[Tensor, Tensor]] = deque(maxlen=lag)

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The flow from the frame `lag` frames ago to this one, or None if there is none yet.

        Args:
            q, k: queries (B, *G, Nq, D) and keys (B, *G, Nk, D) of one frame, like `am_flow`'s without T.

        Returns:
            float32 (float64 for float64 inputs): (B, *G, Nk), or (B, *G[1:], Nk) with a head reduction.

        Raises:
            TypeError, ValueError: as `am_flow`; also where shape, dtype or device change from frame to frame. The
                stream is then as it was before the call.
        """
        self._check(q, k)
        before = self._frames[0] if len(self._frames) == self._frames.maxlen else None
        flow = None
        if before is not None:
            q_a, k_a, q_b, k_b = (x.unsqueeze(1) for x in (*before, q, k))
            flow = am_flow_pair(q_a, k_a, q_b, k_b, **self._options).squeeze(1)
        self._frames.append((q.clone(), k.clone()))
        return flow

    def _check(self, q: Tensor, k: Tensor) -> None:
        for name, value in (("q", q), ("k", k)):
            if isinstance(value, Tensor) and value.dim() not in (4, 5):
                raise ValueError(
                    f"{name}: expected one frame, (B, heads, N, D) or (B, heads, windows, N, D), "
                    f"got {value.dim()} dimensions: {tuple(value.shape)}"
                )
        q_frame, k_frame = (x.unsqueeze(1) if isinstance(x, Tensor) else x for x in (q, k))
        check_frames(q_frame, k_frame, "q", "k")
        check_impl(self._options["impl"], MapPairs(q_frame, k_frame, q_b=q_frame, k_b=k_frame))
        for name, value, last in zip(("q", "k"), (q, k), self._frames[-1] if self._frames else (), strict=False):
            for what in ("shape", "dtype", "device"):
                now, before = getattr(value, what), getattr(last, what)
                if now != before:
                    raise ValueError(
                        f"{name}: expected the {what} of the frame before, {before}, got {now}; "
                        "call reset() to begin another video"
                    )

    def reset(self) -> None:
        """Forget all frames: the next one begins another video."""
        self._frames.clear()
