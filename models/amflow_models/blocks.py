"""A frozen transformer block with its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from amflow_kernels import am_flow, am_flow_attention, am_flow_pair
from amflow_kernels.dispatch import Impl
from amflow_kernels.integrations.reading import AttentionReader
from amflow_models.adapters import FORMS, Adapter, Form, in_clips, pool
from amflow_models.alignment import AligningEncoder
from amflow_models.gates import FLOW_GATES, GATES, Gate, GateKind
from amflow_models.suggestions import check_known
from amflow_models.temporal import UNITS, TemporalUnit, UnitKind

NOT_READ = (
    "AM flow is read where a block calls scaled_dot_product_attention or nn.MultiheadAttention, and this one did not "
    "(fused attention switched off, or an eager implementation)"
)


@dataclass(frozen=True)
class AdapterOptions:
    """The options of all adapters of a model.

    Attributes:
        num_frames: T, frames of a clip, at least 2.
        form: one of `FORMS`. A serial adapter reads the block's output, a parallel one its input.
        bottleneck: channels r of the bottleneck, at least 1.
        activation: f, the nonlinearity in the bottleneck.
        unit: one of `UNITS`, the temporal unit of temporal processing adapters.
        pooled: whether the unit sees the mean over tokens instead of each token.
        centred: whether the mean over time is subtracted before the unit.
        gate: one of `GATES`, the source of the weights of tokens in the unit.
        align: an `AligningEncoder` in every block with AM flow, for moving cameras.
        impl: as in `am_flow`.

    Raises:
        ValueError: an option is unknown, out of range, or does not fit another one.
    """

    num_frames: int
    form: Form = "scaled_parallel"
    bottleneck: int = 64
    activation: type[nn.Module] = nn.ReLU
    unit: UnitKind = "conv"
    pooled: bool = False
    centred: bool = True
    gate: GateKind = "am_flow"
    align: bool = False
    impl: Impl | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "bottleneck"):
            value = getattr(self, name)
            least = 2 if name == "num_frames" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        check_known("form", self.form, FORMS)
        check_known("unit", self.unit, UNITS)
        check_known("gate", self.gate, GATES)
        if self.align and self.gate not in FLOW_GATES:
            raise ValueError(f"align: the gate {self.gate!r} takes no AM flow that could be of aligned frames")


class AdaptedBlock(nn.Module):
    """An unchanged block of a vision transformer with an adapter.

    Parallel forms compute ``block(x) + branch(x)``, the serial form ``y + branch(y)`` with ``y = block(x)``.

    AM flow is computed from q and k of the block's own attention call. `am_flow_attention` replaces that call, so q and
    k are computed once (twice where an `nn.MultiheadAttention` returns its weights, which then keeps its own call).
    Where attention runs in windows (Hiera) the call stays, and each window has its own flow.

    Args:
        block: maps tokens (B * T, N, C) to (B * T, N', C'), or lists of them; other arguments are passed through.
        options: the adapter's options.
        temporal: whether the adapter is a temporal processing adapter.
        name: the block's name, for messages.
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
        """Attributes that this module lacks, such as `attn`, are those of the wrapped block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":
                raise
            return getattr(self.block, name)

    def make_temporal(self, *, at_identity: bool = False) -> None:
        """Adds a gate and a temporal unit to the adapter, and an aligning encoder if the options ask for one.

        Args:
            at_identity: the unit's output is 0 until it is trained, so that a trained adapter computes the same as
                before.
        """
        options, like = self.options, self.adapter.down.weight
        unit = TemporalUnit(options.unit, options.bottleneck, pooled=options.pooled).to(like)
        if at_identity:
            unit.reset_to_zero()
        self.adapter.gate, self.adapter.unit = Gate(options.gate).to(like), unit
        if options.align:
            self.align = AligningEncoder(widths(self.block)[0]).to(like)

    def forward(self, x: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, list):  # DINOv3's blocks take a list of tensors, one for each size of crop
            crops = [[part[i] if isinstance(part, list) else part for part in args] for i in range(len(x))]
            return [self.forward(crop, *rest, **kwargs) for crop, rest in zip(x, crops, strict=True)]
        if self.temporal and x.shape[0] % self.options.num_frames:
            raise ValueError(
                f"num_frames: expected a divisor of the {x.shape[0]} images, got {self.options.num_frames}"
            )
        block: Any = self.block
        if self.training and torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            # A transformers layer that checkpoints itself would recompute its attention outside of our reader, so the
            # whole adapted block is checkpointed instead.
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
            if flow is not None and flow.shape[-1] != y.shape[1]:  # the block pools tokens: keep the largest flow
                flow = pool(flow.flatten(0, 1), y.shape[1]).amax(1).unflatten(0, flow.shape[:2])
            y = y + self.adapter.branch(y, self.options.num_frames, flow)
        else:
            y = y + self.adapter.branch(x, self.options.num_frames, flow, tokens_out=y.shape[1])
        return (y, *rest) if isinstance(result, tuple) else y

    def _with_flow(self, gate: Gate, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """The block's output, and its flow (B, T - 1, N) in the order of its tokens."""
        frames = self.options.num_frames
        flows: list[Tensor] = []
        flow_options: Any = {"head_reduction": "mean", "center": gate.centred, "impl": self.options.impl}
        aligned = None
        if self.align is not None:
            tokens = in_clips(x, frames)
            aligned_tokens = self.align(tokens[:, :-1], tokens[:, 1:]).flatten(0, 1)
            aligned = read_qk(self.block, self.name, aligned_tokens, *args, **kwargs)

        def on_attention(q: Tensor, k: Tensor, v: Tensor, keep: str) -> Tensor | None:
            if q.shape[0] != x.shape[0]:
                raise RuntimeError(f"{self.name}: expected q and k of {x.shape[0]} images, got q {tuple(q.shape)}")
            q, k, v = (in_clips(part, frames) for part in (q, k, v))
            if aligned is not None:
                q_next, k_next = (in_clips(part, frames - 1) for part in aligned)
                flows.append(am_flow_pair(q[:, :-1], k[:, :-1], q_next, k_next, **flow_options))
                return None
            if q.dim() > 5 or keep:  # in windows the block's own call gives the same bits
                flows.append(am_flow(q, k, **flow_options))
                return None
            out, flow = am_flow_attention(q, k, v, **flow_options)
            flows.append(flow)
            return out.flatten(0, 1)

        with AttentionReader(self.name, on_attention):
            result = self.block(x, *args, **kwargs)
        if not flows:
            raise RuntimeError(f"{self.name}: {NOT_READ}")
        flow = flows[0]
        if flow.dim() == 4:  # (B, T - 1, windows, N); in Hiera's order of tokens windows are innermost
            flow = rearrange(flow, "b t w n -> b t (n w)")
        return result, flow


class _AttentionReachedError(Exception):
    """Ends a block's forward as soon as q and k are known."""


def read_qk(block: Callable[..., Any], name: str, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Computes q and k of a block for tokens x.

    The block runs up to its attention call and no further.

    Args:
        block: the block, called as ``block(x, *args, **kwargs)``.
        name: its name, for messages.
        x: tokens, (batch, N, C).

    Returns:
        q and k as they enter ``scaled_dot_product_attention``, (batch, heads, [windows,] N, D).

    Raises:
        RuntimeError: the block does not call it, or its attention map is not softmax(D ** -0.5 q k^T).
    """
    qk: list[Tensor] = []

    def on_attention(q: Tensor, k: Tensor, v: Tensor, keep: str) -> None:
        qk.extend((q, k))
        raise _AttentionReachedError

    try:
        with AttentionReader(name, on_attention):
            block(x, *args, **kwargs)
    except _AttentionReachedError:
        return qk[0], qk[1]
    raise RuntimeError(f"{name}: {NOT_READ}")


def widths(block: nn.Module) -> tuple[int, int]:
    """Channels of a block's input and output tokens: those of its first normalisation and of its last linear layer."""
    norms = [m for m in block.modules() if hasattr(m, "normalized_shape")]
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    if not norms or not linears:
        raise TypeError(
            f"model: expected blocks of a transformer, with a LayerNorm and linear layers, got {type(block).__name__}"
        )
    shape: Any = norms[0].normalized_shape
    return int(shape[-1]), linears[-1].out_features
