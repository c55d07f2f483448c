"""Gates: the weight of each token of each frame in a temporal unit."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from amflow_models.suggestions import check_known

GateKind = Literal["am_flow", "raw", "frame_difference", "flow_times_difference", "constant"]
GATES = get_args(GateKind)
FLOW_GATES = ("am_flow", "raw", "flow_times_difference")  # which take AM flow
EPS = 1e-12  # added to a standard deviation; that of AM flow is 1e-4 to 1e-2


class Gate(nn.Module):
    """Weights of tokens from AM flow, or from an alternative for comparison.

    AM flow is 1 plus a signal of 1e-4 to 1e-2, so multiplying by it has hardly any effect. The default therefore
    standardises it: ``weight = 1 + gain (flow - mean) / std``, with mean and standard deviation over a frame's tokens
    and a learnable `gain` that starts at 1.

    T frames have T - 1 flows, one per pair. The flow of a frame is the mean over its pairs: one pair for the first and
    the last frame, two for the others.

    Args:
        kind: ``"am_flow"``, as above; ``"raw"``, weight = flow, the paper's formula to the letter;
            ``"frame_difference"``, as ``"am_flow"`` with the norm of the difference of the adapter's input tokens
            between frames instead of the flow; ``"flow_times_difference"``, as ``"am_flow"`` with the product of that
            norm and of the flow above its least in the frame; ``"constant"``, weight = gain.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: GateKind = "am_flow") -> None:
        super().__init__()
        check_known("gate", kind, GATES)
        self.kind = kind
        self.gain = nn.Parameter(torch.ones(1), requires_grad=kind != "raw")

    @property
    def needs_flow(self) -> bool:
        """Whether `forward` takes a flow."""
        return self.kind in FLOW_GATES

    @property
    def centred(self) -> bool:
        """Whether `forward` takes the centred flow, flow - Nq / Nk, which keeps full relative precision."""
        return self.kind != "raw"

    def forward(self, x: Tensor, flow: Tensor | None) -> Tensor:
        """Computes the weights.

        Args:
            x: the adapter's input tokens, (B, T, N, C).
            flow: AM flow, (B, T - 1, N); None unless `needs_flow`.

        Returns:
            Weights (B, T, N), float32; (1,) for the kind "constant".

        Raises:
            ValueError: the flow is missing.
        """
        if self.kind == "constant":
            return self.gain
        if self.needs_flow and flow is None:
            raise ValueError(f"flow: expected a tensor for the gate {self.kind!r}, got None")
        change = pairs_to_frames(self._change(x, flow))
        if self.kind == "raw":
            return change
        std, mean = torch.std_mean(change, dim=-1, correction=0, keepdim=True)
        return 1 + self.gain * (change - mean) / (std + EPS)

    def _change(self, x: Tensor, flow: Tensor | None) -> Tensor:
        """How much each token changes from a frame to the next: (B, T - 1, N), float32."""
        if flow is not None and self.kind != "flow_times_difference":
            return flow.float()
        difference = (x[:, 1:] - x[:, :-1]).float().norm(dim=-1)
        if flow is None:
            return difference
        # Without its least value, the flow is 1 plus a thousandth and would not change the product.
        return (flow.float() - flow.float().amin(-1, keepdim=True)) * difference

    def extra_repr(self) -> str:
        return self.kind


def pairs_to_frames(pairs: Tensor) -> Tensor:
    """Values of frames, (B, T, N), from values of pairs of frames, (B, T - 1, N): the mean over a frame's pairs."""
    before, after = pairs[:, :1], pairs[:, -1:]
    return (torch.cat([before, pairs], 1) + torch.cat([pairs, after], 1)) / 2
