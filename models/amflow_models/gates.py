"""How much each token of each frame counts in a temporal unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amflow_models.errors import check_known

GATES = ("am_flow", "raw", "frame_difference", "constant")
EPS = 1e-12  # of a standard deviation: the flow's own is 1e-4 to 1e-2


class Gate(nn.Module):
    """Weights of tokens from AM flow, or from one of its rivals.

    AM flow is 1 plus a signal of 1e-4 to 1e-2, and multiplying by it changes nothing that a network could see. So the
    default standardises it: ``weight = 1 + gain (flow - mean) / std``, mean and standard deviation over a frame's
    tokens, `gain` learnable from 1.

    Args:
        kind: ``"am_flow"``, as above; ``"raw"``, weight = flow, the paper's formula to the letter;
            ``"frame_difference"``, in the place of flow the norm of the difference between frames of the tokens that
            the adapter reads, standardised; ``"constant"``, weight = gain, which sees nothing.

    Of T frames, T - 1 pairs have a flow. A frame's is the mean over the pairs that it belongs to: one for the first and
    the last frame, two for the others.
    """

    def __init__(self, kind: str = "am_flow") -> None:
        super().__init__()
        check_known("gate", kind, GATES)
        self.kind = kind
        self.gain = nn.Parameter(torch.ones(1), requires_grad=kind != "raw")

    @property
    def needs_flow(self) -> bool:
        return self.kind in ("am_flow", "raw")

    @property
    def centred(self) -> bool:
        """Whether the flow is wanted as flow - Nq / Nk, which keeps its precision, or as it is."""
        return self.kind == "am_flow"

    def forward(self, x: Tensor, flow: Tensor | None) -> Tensor:
        """x: the tokens that the adapter reads (B, T, N, C); flow: (B, T - 1, N), if needed. Returns (B, T, N) float32,
        or a number (1,)."""
        if self.kind == "constant":
            return self.gain
        change = flow if self.needs_flow else (x[:, 1:] - x[:, :-1]).float().norm(dim=-1)
        if change is None:
            raise ValueError(f"flow: expected a tensor for the gate {self.kind!r}, got None")
        change = of_frames(change.float())
        if self.kind == "raw":
            return change
        std, mean = torch.std_mean(change, dim=-1, correction=0, keepdim=True)
        return 1 + self.gain * (change - mean) / (std + EPS)

    def extra_repr(self) -> str:
        return self.kind


def of_frames(pairs: Tensor) -> Tensor:
    """From what belongs to pairs of frames (B, T - 1, N) to frames (B, T, N): the mean over a frame's pairs."""
    before, after = pairs[:, :1], pairs[:, -1:]
    return (torch.cat([before, pairs], 1) + torch.cat([pairs, after], 1)) / 2
