"""AM flow of live video, frame by frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amflow_kernels.api import am_flow_pair
from amflow_kernels.dispatch import Impl, check_impl
from amflow_kernels.problem import FlowOptions, MapPairs, check_frames, check_options
from amflow_kernels.shards import check_plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AMFlowStream"]


class AMFlowStream:
    """AM flow as frames arrive: keeps copies of q and k of the last `lag` frames, never an attention map.

    The flows are those of `am_flow` on the whole clip (with the CPU kernels bit for bit), without gradients:

        stream = AMFlowStream()
        for frame in video:
            q, k = ...              # (B, heads, N, D) of this frame
            flow = stream(q, k)     # (B, heads, N), or None for the first `lag` frames

    Compiled code may call a stream, with ``fullgraph=True`` too, and its calls may alternate with eager ones.

    Args:
        scale, impl: as in `am_flow`.
        options: `lag`, `temperature`, `head_reduction`, `center` and `out_dtype`, as in `am_flow`.
    """

    def __init__(self, *, scale: float | None = None, impl: Impl | None = None, **options: Unpack[FlowOptions]) -> None:
        check_options(scale, **options)
        check_impl(impl, None)
        self._lag = options.pop("lag", 1)
        self._options: dict[str, Any] = {"scale": scale, "impl": impl, **options}
        self.reset()

    def reset(self) -> None:
        """Forget all frames: the next one begins another video."""
        # Copies of q and k of the last `lag` frames, the oldest one first. All are made with the first frame and then
        # overwritten in turn, so that compiled code meets a list of one length.
        self._frames: list[tuple[Tensor, Tensor]] = []
        self._seen = 0  # frames of this video, counted up to `lag`

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The flow from the frame `lag` frames ago to this one, or None if there is none yet.

        Args:
            q, k: queries (B, *G, Nq, D) and keys (B, *G, Nk, D) of one frame, like `am_flow`'s without T.

        Returns:
            float32 (float64 for float64 inputs) or `out_dtype`: (B, *G, Nk), or (B, *G[1:], Nk) with a head reduction.

        Raises:
            TypeError, ValueError: as `am_flow`; also where shape, dtype or device change from frame to frame. The
                stream is then as it was before the call.
        """
        self._check(q, k)
        if not self._frames:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be overwritten outside of it
                self._frames = [(_room_for(q), _room_for(k)) for _ in range(self._lag)]
        (q_before, k_before), *others = self._frames
        flow = None
        if self._seen == self._lag:
            q_a, k_a, q_b, k_b = (x.unsqueeze(1) for x in (q_before, k_before, q, k))
            flow = am_flow_pair(q_a, k_a, q_b, k_b, **self._options).squeeze(1)
        else:
            self._seen += 1
        self._frames = [*others, (q_before.copy_(q), k_before.copy_(k))]
        return flow

    def _check(self, q: Tensor, k: Tensor) -> None:
        for name, value in (("q", q), ("k", k)):
            check_plain(name, value)
            if isinstance(value, Tensor) and value.dim() not in (4, 5):
                raise ValueError(
                    f"{name}: expected one frame, (B, heads, N, D) or (B, heads, windows, N, D), "
                    f"got {value.dim()} dimensions: {tuple(value.shape)}"
                )
        q_frame, k_frame = (x.unsqueeze(1) if isinstance(x, Tensor) else x for x in (q, k))
        check_frames(q_frame, k_frame, "q", "k")
        if self._options["impl"] is not None:
            check_impl(self._options["impl"], MapPairs(q_frame, k_frame, q_b=q_frame, k_b=k_frame))
        for name, value, last in zip(("q", "k"), (q, k), self._frames[-1] if self._frames else (), strict=False):
            for what in ("shape", "dtype", "device"):
                now, before = getattr(value, what), getattr(last, what)
                if now != before:
                    raise ValueError(
                        f"{name}: expected the {what} of the frame before, {before}, got {now}; "
                        "call reset() to begin another video"
                    )


def _room_for(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor that a copy of x fits into."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
