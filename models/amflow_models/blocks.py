"""A frozen transformer block with its adapter, and where a model has its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from amflow_kernels import am_flow, am_flow_attention, am_flow_pair
from amflow_kernels.integrations.recording import UNREAD, AttentionReader
from amflow_models.adapters import FORMS, Adapter, pool
from amflow_models.alignment import AligningEncoder
from amflow_models.errors import check_known
from amflow_models.gates import GATES, Gate
from amflow_models.temporal import UNITS, TemporalUnit


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
        self.adapter = Adapter(
            width_out if options.form == "serial" else width,
            options.bottleneck,
            width_out=width_out,
            scaled=options.form == "scaled_parallel",
            activation=options.activation,
        )
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

    def make_temporal(self) -> None:
        """Gives the adapter a gate and a temporal unit, and the block an aligning encoder if the options say so."""
        options, like = self.options, self.adapter.down.weight
        self.adapter.gate = Gate(options.gate).to(like.device, like.dtype)
        self.adapter.unit = TemporalUnit(options.unit, options.bottleneck, pooled=options.pooled).to(like)
        if options.align:
            for part in ("norm1", "attn"):
                if not isinstance(getattr(self.block, part, None), nn.Module):
                    raise TypeError(f"{self.name}: to align frames its `norm1` and `attn` are needed, it has no {part}")
            self.align = AligningEncoder(widths(self.block)[0]).to(like)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.temporal and len(x) % self.options.num_frames:
            raise ValueError(f"num_frames: expected a divisor of the {len(x)} images, got {self.options.num_frames}")
        flow = None
        if self.adapter.gate is not None and self.adapter.gate.needs_flow:
            result, flow = self._with_flow(x, args, kwargs)
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

    def _with_flow(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Any, Tensor]:
        """What the block gives, and its flow (B, T - 1, N) in the order of its tokens."""
        assert self.adapter.gate is not None
        seen: list[Tensor] = []
        wanted: Any = {"head_reduction": "mean", "center": self.adapter.gate.centred, "impl": self.options.impl}

        def on_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            q, k, v = (rearrange(p, "(b t) ... -> b t ...", t=self.options.num_frames) for p in (q, k, v))
            if self.align is not None:
                q_next, k_next = self._aligned(x, args, kwargs)
                seen.append(am_flow_pair(q[:, :-1], k[:, :-1], q_next, k_next, **wanted))
                return None
            if q.dim() > 5:  # windows: ours would not have the bits of the block's own attention
                seen.append(am_flow(q, k, **wanted))
                return None
            out, flow = am_flow_attention(q, k, v, **wanted)
            seen.append(flow)
            return out.flatten(0, 1)

        with AttentionReader(self.name, on_attention):
            result = self.block(x, *args, **kwargs)
        if not seen:
            raise RuntimeError(f"{self.name}: no attention seen: {UNREAD}")
        flow = seen[0]
        if flow.dim() == 4:  # (B, T - 1, windows, N): in Hiera's order of tokens windows are innermost
            flow = rearrange(flow, "b t w n -> b t (n w)")
        return result, flow

    def _aligned(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """q and k (B, T - 1, heads, ..., N, D) of frames 1 to T - 1, each on the token grid of the frame before."""
        assert self.align is not None
        frames = self.options.num_frames
        x = rearrange(x, "(b t) n c -> b t n c", t=frames)
        aligned = self.align(x[:, :-1], x[:, 1:])
        q, k = read_qk(self.block, self.name, aligned.flatten(0, 1), *args, **kwargs)
        return q.unflatten(0, (-1, frames - 1)), k.unflatten(0, (-1, frames - 1))


def read_qk(block: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """q and k that a block makes of tokens x (batch, N, C); no attention is computed."""
    qk: list[Tensor] = []

    def on_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qk.extend((q, k))
        return v if v.shape == q.shape else torch.empty_like(q)  # nobody looks at the output

    with AttentionReader(name, on_attention):
        block.attn(block.norm1(x), *args, **kwargs)
    if not qk:
        raise RuntimeError(f"{name}: no attention seen: {UNREAD}")
    return qk[0], qk[1]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The list of a model's transformer blocks and its name: the outermost one called as such lists are.

    Raises:
        TypeError: there is none.
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
    return min(lists, key=lambda found: found[0].count("."))


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
