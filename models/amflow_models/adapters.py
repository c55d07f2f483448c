"""The adapter: a small bottleneck beside or behind a frozen block (Fig. S1 and eq. 1 of the paper's supplement)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from amflow_models.gates import Gate
from amflow_models.temporal import TemporalUnit

FORMS = ("serial", "parallel", "scaled_parallel")
INITIAL_SCALE = 1.0  # s of the scaled form; with 0, neither it nor W_up would ever learn


class Adapter(nn.Module):
    """``Adapter(x) = x + s f(x W_down) W_up``, with W_up = 0 at the start: a fresh adapter changes nothing.

    `branch` is the second term alone: beside a block the block's own residual is the x.

    With a temporal unit U, the bottleneck z = f(x W_down) becomes ``z + U(weight * (z - mean of z over time))``: what
    stays the same in all frames does not enter U (with ``centred=False`` it does). The weight is a `Gate`'s, by default
    from AM flow.

    Args:
        width: channels C of x.
        bottleneck: channels r.
        width_out: channels of the result, where the block changes them; None means `width`.
        scaled: learn the scalar s; else it is 1.
        activation: f.
        centred: whether the mean over time is subtracted before U.
        gate, unit: of a temporal processing adapter; without `unit` the adapter sees single frames.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int = 64,
        *,
        width_out: int | None = None,
        scaled: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        centred: bool = True,
        gate: Gate | None = None,
        unit: TemporalUnit | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = activation()
        self.centred = centred
        self.gate = gate
        self.unit = unit
        self.up = nn.Linear(bottleneck, width if width_out is None else width_out)
        self.scale = nn.Parameter(torch.full((1,), INITIAL_SCALE)) if scaled else None
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, num_frames: int | None = None, flow: Tensor | None = None) -> Tensor:
        """x + `branch`."""
        return x + self.branch(x, num_frames, flow)

    def branch(
        self, x: Tensor, num_frames: int | None = None, flow: Tensor | None = None, tokens_out: int | None = None
    ) -> Tensor:
        """``s f(x W_down) W_up``.

        Args:
            x: tokens (B * T, N, C), the frames of a clip side by side.
            num_frames: T; only with a temporal unit.
            flow: AM flow (B, T - 1, N) of the block, as the gate wants it, if it does.
            tokens_out: tokens of the result, where a block pools them; they are pooled as Hiera pools its own.

        Returns:
            (B * T, tokens_out, C_out)
        """
        z = self.activation(self.down(x))
        if self.unit is not None:
            z = z + self._temporal(x, z, num_frames, flow)
        if tokens_out is not None and tokens_out != z.shape[1]:
            z = pool(z, tokens_out).amax(1)
        update = self.up(z)
        return update if self.scale is None else self.scale * update

    def _temporal(self, x: Tensor, z: Tensor, num_frames: int | None, flow: Tensor | None) -> Tensor:
        assert self.unit is not None
        if num_frames is None:
            raise ValueError("num_frames: expected an int with a temporal unit, got None")
        z = in_clips(z, num_frames)
        moving = z - z.mean(1, keepdim=True) if self.centred else z
        if self.gate is not None:
            weight = self.gate(in_clips(x, num_frames), flow)
            moving = (weight[..., None] if weight.dim() > 1 else weight) * moving
        mixed = self.unit(moving.to(z.dtype))  # a weight is float32
        return rearrange(mixed.expand_as(z), "b t n r -> (b t) n r")


def in_clips(x: Tensor, num_frames: int) -> Tensor:
    """(B * T, ...) as (B, T, ...); B may be 0."""
    return x.unflatten(0, (len(x) // num_frames, num_frames))


def pool(x: Tensor, tokens: int) -> Tensor:
    """Tokens (B, N, ...) in groups: (B, N / tokens, tokens, ...). In Hiera's order, those pooled are far apart."""
    return x.unflatten(1, (-1, tokens))
