"""A frozen transformer block with its adapter, and where a model has its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from amflow_kernels import am_flow, am_flow_attention, am_flow_pair
from amflow_kernels.integrations.recording import AttentionReader
from amflow_models.adapters import FORMS, Adapter, in_clips, pool
from amflow_models.alignment import AligningEncoder
from amflow_models.errors import check_known
from amflow_models.gates import GATES, Gate
from amflow_models.temporal import UNITS, TemporalUnit

UNREAD = (
    "AM flow is read where a block calls scaled_dot_product_attention, and this one did not (fused attention switched "
    "off, an eager implementation, nn.MultiheadAttention)"
)


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapters of a model are like.

    Attributes:
        num_frames: T, frames of a clip.
        form: one of `FORMS`. Serial reads what the block gives, parallel what the block is given.
        bottleneck: channels r.
        activation: f.
        unit: one of `UNITS`, the temporal unit of temporal processing adapters.
        pooled: whether it sees the mean over tokens, in place of each.
        centred: whether what stays the same in all frames is subtracted before it.
        gate: one of `GATES`, what weighs tokens for it.
        align: an `AligningEncoder` in every block with AM flow, for moving cameras.
        impl: as in `am_flow`.
    """

    num_frames: int
    form: str = "scaled_parallel"
    bottleneck: int = 64
    activation: type[nn.Module] = nn.ReLU
    unit: str = "conv"
    pooled: bool = False
    centred: bool = True
    gate: str = "am_flow"
    align: bool = False
    impl: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "bottleneck"):
            value = getattr(self, name)
            least = 2 if name == "num_frames" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        check_known("form", self.form, FORMS)
        check_known("unit", self.unit, UNITS)
        check_known("gate", self.gate, GATES)
        if self.align and self.gate not in ("am_flow", "raw"):
            raise ValueError(f"align: the gate {self.gate!r} takes no AM flow that could be of aligned frames")


class AdaptedBlock(nn.Module):
    """A block of a vision transformer, as it was, and an adapter.

    ``block(x) + branch(x)``; the serial form is ``y + branch(y)`` of ``y = block(x)``.

    AM flow is taken from q and k in the block's own attention call, which `am_flow_attention` takes the place of: they
    are computed once. In windows (Hiera) the call stays, and each window has its own flow.

    Args:
        block: maps tokens (B * T, N, C) to (B * T, N', C'), whatever else it takes.
        options: of the adapter.
        temporal: whether it is a temporal processing adapter.
        name: of the block, for messages.
    """

    def __init__(self, block: nn.Module, options: AdapterOptions, *, temporal: bool, name: str) -> None:
        super().__init__()
        self.block = block
        self.options = options
        self.name = name
        width, width_out = widths(block)
        like = next(p for p in block.parameters() if p.is_floating_point())
        self.adapter = Adapter(
            width_out if options.form == "serial" else width,
            options.bottleneck,
            width_out=width_out,
            scaled=options.form == "scaled_parallel",
            activation=options.activation,
            centred=options.centred,
        ).to(like.device, like.dtype)
        self.align: AligningEncoder | None = None
        if temporal:
            self.make_temporal()

    @property
    def temporal(self) -> bool:
        return self.adapter.unit is not None

    def __getattr__(self, name: str) -> Any:
        """What is asked of the block that was here (its `attn`, say) is the block's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":
                raise
            return getattr(self.block, name)

    def make_temporal(self, *, at_identity: bool = False) -> None:
        """Gives the adapter a gate and a temporal unit, and the block an aligning encoder if the options say so.

        Args:
            at_identity: the unit gives 0 at first, so that an adapter that is trained goes on as it was.
        """
        options, like = self.options, self.adapter.down.weight
        unit = TemporalUnit(options.unit, options.bottleneck, pooled=options.pooled).to(like)
        if at_identity:
            unit.reset_to_zero()
        self.adapter.gate, self.adapter.unit = Gate(options.gate).to(like), unit
        if options.align:
            self.align = AligningEncoder(widths(self.block)[0]).to(like)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.temporal and len(x) % self.options.num_frames:
            raise ValueError(f"num_frames: expected a divisor of the {len(x)} images, got {self.options.num_frames}")
        block: Any = self.block
        if self.training and torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            # A layer of transformers that checkpoints itself would run its attention again unseen: all of this is.
            return block._gradient_checkpointing_func(partial(self._without_checkpointing, **kwargs), x, *args)
        return self._forward(x, args, kwargs)

    def _without_checkpointing(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block: Any = self.block
        block.gradient_checkpointing = False
        try:
            return self._forward(x, args, kwargs)
        finally:
            block.gradient_checkpointing = True

    def _forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flow = None
        if self.adapter.gate is not None and self.adapter.gate.needs_flow:
            result, flow = self._with_flow(self.adapter.gate, x, args, kwargs)
        else:
            result = self.block(x, *args, **kwargs)
        y, *rest = result if isinstance(result, tuple) else (result,)
        if self.options.form == "serial":
            if flow is not None and flow.shape[-1] != y.shape[1]:  # the block pools: the most of those pooled
                flow = pool(flow.flatten(0, 1), y.shape[1]).amax(1).unflatten(0, flow.shape[:2])
            y = y + self.adapter.branch(y, self.options.num_frames, flow)
        else:
            y = y + self.adapter.branch(x, self.options.num_frames, flow, tokens_out=y.shape[1])
        return (y, *rest) if isinstance(result, tuple) else y

    def _with_flow(self, gate: Gate, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """What the block gives, and its flow (B, T - 1, N) in the order of its tokens."""
        frames = self.options.num_frames
        seen: list[Tensor] = []
        wanted: Any = {"head_reduction": "mean", "center": gate.centred, "impl": self.options.impl}
        aligned = None
        if self.align is not None:
            tokens = in_clips(x, frames)
            moved = self.align(tokens[:, :-1], tokens[:, 1:]).flatten(0, 1)
            aligned = read_qk(self.block, self.name, moved, *args, **kwargs)

        def on_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            if len(q) != len(x):
                raise RuntimeError(f"{self.name}: expected q and k of {len(x)} images, got q {tuple(q.shape)}")
            q, k, v = (in_clips(part, frames) for part in (q, k, v))
            if aligned is not None:
                q_next, k_next = (in_clips(part, frames - 1) for part in aligned)
                seen.append(am_flow_pair(q[:, :-1], k[:, :-1], q_next, k_next, **wanted))
                return None
            if q.dim() > 5 or reader.dropout_p:  # windows, whose bits would not be those of the block's own; dropout
                seen.append(am_flow(q, k, **wanted))
                return None
            out, flow = am_flow_attention(q, k, v, **wanted)
            seen.append(flow)
            return out.flatten(0, 1)

        reader = AttentionReader(self.name, on_attention)
        with reader:
            result = self.block(x, *args, **kwargs)
        if not seen:
            raise RuntimeError(f"{self.name}: {UNREAD}")
        flow = seen[0]
        if flow.dim() == 4:  # (B, T - 1, windows, N): in Hiera's order of tokens windows are innermost
            flow = rearrange(flow, "b t w n -> b t (n w)")
        return result, flow


class _EnoughSeenError(Exception):
    """Ends a block's forward once q and k are known."""


def read_qk(block: Callable[..., Any], name: str, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """q and k that a block makes of tokens x (batch, N, C): it runs up to its attention call, and no further."""
    qk: list[Tensor] = []

    def on_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
        qk.extend((q, k))
        raise _EnoughSeenError

    try:
        with AttentionReader(name, on_attention):
            block(x, *args, **kwargs)
    except _EnoughSeenError:
        return qk[0], qk[1]
    raise RuntimeError(f"{name}: {UNREAD}")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The list of a model's transformer blocks and its name: the outermost one called as such lists are.

    Raises:
        TypeError: there is none, or more than one.
    """
    usual = ("blocks", "layers", "layer", "resblocks")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in usual and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    ]
    if not lists:
        raise TypeError(
            f"model: expected a list of transformer blocks (a ModuleList or Sequential called {', '.join(usual)}), "
            f"found none in {type(model).__name__}"
        )
    path, blocks = min(lists, key=lambda found: found[0].count("."))
    others = [name for name, _ in lists if name != path and not name.startswith(f"{path}.")]
    if others:
        raise TypeError(
            f"model: expected one list of transformer blocks, found {path}, {', '.join(others)} in "
            f"{type(model).__name__}; pass the part that has the one meant"
        )
    return path, blocks


def widths(block: nn.Module) -> tuple[int, int]:
    """Channels of the tokens that a block takes and gives: those of its first normalisation and last linear layer."""
    into = [m for m in block.modules() if hasattr(m, "normalized_shape")]
    out_of = [m for m in block.modules() if isinstance(m, nn.Linear)]
    if not into or not out_of:
        raise TypeError(
            f"model: expected blocks of a transformer, with a LayerNorm and linear layers, got {type(block).__name__}"
        )
    shape: Any = into[0].normalized_shape
    return int(shape[-1]), out_of[-1].out_features
