"""The adapter: a small bottleneck beside or behind a frozen block (Fig. S1 and eq. 1 of the paper's supplement)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from amflow_models.gates import Gate
from amflow_models.temporal import TemporalUnit

Form = Literal["serial", "parallel", "scaled_parallel"]
FORMS = get_args(Form)
INITIAL_SCALE = 1.0  # of s in the scaled form; with 0, neither s nor W_up would get a gradient


class Adapter(nn.Module):
    """``Adapter(x) = x + s f(x W_down) W_up``, with W_up = 0 at the start: a fresh adapter changes nothing.

    `branch` computes only the second term: a parallel adapter is added to the output of its block, which has x in it.

    With a temporal unit U, the bottleneck z = f(x W_down) becomes ``z + U(weight * (z - mean of z over time))``: U sees
    only changes (with ``centred=False`` the mean is not subtracted). The weight comes from a `Gate`, by default from AM
    flow.

    Args:
        width: channels C of x.
        bottleneck: channels r of the bottleneck.
        width_out: channels of the output, where the block changes them; None means `width`.
        scaled: learn the scalar s; otherwise it is 1.
        activation: f.
        centred: whether the mean over time is subtracted before U.
        gate, unit: gate and temporal unit of a temporal processing adapter; without `unit` the adapter sees single
            frames.
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
        # Stochastic depth: the probability that a clip leaves out the second term in training. A tensor, since compiled
        # blocks with different numbers would not share a graph.
        self.drop_path: Tensor | None
        self.register_buffer("drop_path", None, persistent=False)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, num_frames: int | None = None, flow: Tensor | None = None) -> Tensor:
        """``x + branch(x)``; arguments as for `branch`."""
        return x + self.branch(x, num_frames, flow)

    def branch(
        self, x: Tensor, num_frames: int | None = None, flow: Tensor | None = None, tokens_out: int | None = None
    ) -> Tensor:
        """``s f(x W_down) W_up``.

        Args:
            x: tokens (B * T, N, C), the frames of a clip side by side.
            num_frames: T; needed with a temporal unit.
            flow: AM flow (B, T - 1, N) of the block, centred or not as the gate expects; None if it needs none.
            tokens_out: number of output tokens, where the block pools tokens as Hiera does; None means N.

        Returns:
            (B * T, tokens_out, C_out), in the dtype of x.

        Raises:
            ValueError: num_frames is missing.
        """
        z = self.activation(self.down(x))
        if self.unit is not None:
            z = z + self._temporal(x, z, num_frames, flow)
        if tokens_out is not None and tokens_out != z.shape[1]:
            z = pool(z, tokens_out).amax(1)
        update = self.up(z)
        if self.scale is not None:
            update = self.scale * update
        if self.drop_path is None or not self.training:
            return update
        keep = 1 - self.drop_path
        clips = in_clips(update, num_frames or 1)
        drawn = torch.bernoulli(keep.expand(len(clips))) / keep
        return (clips * drawn.to(clips.dtype).view(-1, 1, 1, 1)).flatten(0, 1)

    def _temporal(self, x: Tensor, z: Tensor, num_frames: int | None, flow: Tensor | None) -> Tensor:
        assert self.unit is not None
        if num_frames is None:
            raise ValueError("num_frames: expected an int with a temporal unit, got None")
        z = in_clips(z, num_frames)
        moving = z - z.mean(1, keepdim=True) if self.centred else z
        if self.gate is not None:
            weight = self.gate(in_clips(x, num_frames), flow)
            moving = (weight[..., None] if weight.dim() > 1 else weight) * moving
        mixed = self.unit(moving.to(z.dtype))  # weights are float32
        return rearrange(mixed.expand_as(z), "b t n r -> (b t) n r")


def in_clips(x: Tensor, num_frames: int) -> Tensor:
    """Unfolds (B * T, ...) into (B, T, ...); B may be 0."""
    return x.unflatten(0, (x.shape[0] // num_frames, num_frames))


def pool(x: Tensor, tokens: int) -> Tensor:
    """Groups tokens for pooling: (B, N, ...) to (B, N / tokens, tokens, ...), pooled over dimension 1.

    In Hiera's order of tokens, those that are pooled together lie `tokens` apart.
    """
    return x.unflatten(1, (-1, tokens))
