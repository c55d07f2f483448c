"""Temporal units: layers that mix the frames of a clip in the bottleneck of an adapter."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from amflow_models.suggestions import check_known

UnitKind = Literal["conv", "tcn", "lstm", "gru", "transformer", "set"]
UNITS = get_args(UnitKind)


class TemporalUnit(nn.Module):
    """Mixes the frames of a clip, for each token or for the mean over tokens.

    Args:
        kind: ``"conv"``, a convolution over three frames; ``"tcn"``, two such convolutions with dilations 1 and 2 and
            residuals (arXiv 1803.01271, not causal); ``"lstm"``, ``"gru"``, forward in time; ``"transformer"``,
            one pre-norm encoder layer over the frames, with a sinusoidal position embedding; ``"set"``, the same
            without the embedding: blind to the order of frames, for comparison.
        width: channels r of the bottleneck.
        pooled: the unit sees the mean over tokens, and all tokens get its result; otherwise each token is a sequence of
            its own, and all share the unit's parameters.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: UnitKind, width: int, *, pooled: bool = False) -> None:
        super().__init__()
        check_known("unit", kind, UNITS)
        self.kind = kind
        self.pooled = pooled
        self.mix: nn.Module
        if kind == "conv":
            self.mix = nn.Conv1d(width, width, 3, padding=1)
        elif kind == "tcn":
            self.mix = nn.Sequential(*(DilatedConvolution(width, dilation) for dilation in (1, 2)))
        elif kind in ("transformer", "set"):
            heads = next(h for h in (4, 2, 1) if width % h == 0)
            self.mix = nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
        else:
            self.mix = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](width, width, batch_first=True)
        self.out = nn.Linear(width, width)

    def reset_to_zero(self) -> None:
        """Sets the last projection to zero: the output is exactly 0 until the unit is trained."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Args: z (B, T, N, r). Returns (B, T, N, r), or (B, T, 1, r) if pooled."""
        batch, _, tokens, _ = z.shape
        if self.pooled:
            z = reduce(z, "b t n r -> b t 1 r", "mean")
        z = rearrange(z, "b t n r -> (b n) t r")
        if self.kind == "conv":
            z = nn.functional.gelu(rearrange(self.mix(rearrange(z, "m t r -> m r t")), "m r t -> m t r"))
        elif self.kind == "tcn":
            z = rearrange(self.mix(rearrange(z, "m t r -> m r t")), "m r t -> m t r")
        elif self.kind == "transformer":
            z = self.mix(z + sinusoidal_embedding(z.shape[1], z.shape[2], z))
        elif self.kind == "set":
            z = self.mix(z)
        else:
            z, _ = self.mix(z)
        return rearrange(self.out(z), "(b n) t r -> b t n r", b=batch, n=1 if self.pooled else tokens)

    def extra_repr(self) -> str:
        return f"{self.kind}, {'pooled' if self.pooled else 'per token'}"


class DilatedConvolution(nn.Module):
    """``z + gelu(conv(z))`` along the frames of (B, r, T): a convolution over three frames, `dilation` apart."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, z: Tensor) -> Tensor:
        return z + nn.functional.gelu(self.conv(z))


def sinusoidal_embedding(frames: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal position embedding (arXiv 1706.03762): (frames, width), with the device and dtype of `like`."""
    time = torch.arange(frames, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / width))
    return torch.cat([torch.sin(time * rate), torch.cos(time * rate)], -1)[:, :width].to(like.dtype)
