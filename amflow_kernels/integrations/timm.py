"""AM flow of timm vision transformers, taken during their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from timm.models.xcit import XCA
from torch import Tensor, nn

from amflow_kernels.integrations.block_finder import block_lists, select_blocks, unwrap
from amflow_kernels.integrations.recording import (
    NOT_RUN,
    BlockFlow,
    FlowRecorder,
    OnAttention,
    reading_attention,
    wrapped_forwards,
)

__all__ = ["BlockFlow", "record_am_flow", "record_qk"]


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: Iterable[int] | None = None,
    replace_attention: bool = False,
    **options: Any,
) -> Iterator[dict[int, BlockFlow]]:
    """Records the AM flow of every block of a timm vision transformer while the model runs inside the ``with`` block.

    The flows are those of the q and k that enter ``scaled_dot_product_attention``: after q/k norm, rotary embedding and
    pooling. Attention stays fused, and not a bit of the model's output changes::

        with record_am_flow(vit, num_frames=T) as flows:
            out = vit(frames)           # (B * T, 3, height, width), the frames of a clip side by side
        flows[11].grid                  # (B, T - 1, heads, height, width), differentiable in the model's parameters

    It works in compiled models (they are compiled again for the first recording), with `fully_shard`, and in
    `DistributedDataParallel`, `AveragedModel` and other wrappers that hold the model as ``.module``. Under activation
    checkpointing q and k are kept, and the recomputation in the backward records nothing, wherever it runs; with the
    reentrant variant flows take no gradient, since its forward runs without one. Compile checkpointed blocks, and don't
    checkpoint compiled ones, whose backward would have to run inside the ``with`` block; for ``fullgraph=True`` set
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint``.

    Recorders of one thread may overlap and end in any order; each records every forward. Forwards in other threads run
    the bare model and are not recorded (compiled code can't tell threads apart: there, run one at a time). A copy that
    is made of the model, by `copy.deepcopy` or by saving and loading it, has its own weights and is not recorded.

    Args:
        model: a timm model, wrapped or not, with a ``.blocks`` sequence whose attention is a single
            ``scaled_dot_product_attention`` per block without mask or bias: ViT, DeiT, DINOv2, EVA, DINOv3, ..., or
            Hiera.
        num_frames: T; the batch of images is B clips of T frames.
        blocks: indices of the blocks to record, from 0; None means all.
        replace_attention: run `am_flow_attention` instead of the model's attention call, where it has no windows. On a
            GPU the flow can then reuse the attention's log-sum-exps.
        options: options of `am_flow`: lag, temperature, head_reduction, center, impl. They are checked at once.

    Yields:
        A dict {block index: `BlockFlow`} that the forward fills. A second forward replaces its values.

    Raises:
        TypeError: the model has no blocks with a timm attention layer, or an option is unknown or of a wrong type.
        ValueError: a block index or an option is out of range, or the images are not whole clips.
        RuntimeError: a selected layer is not fused, adds a mask or bias to its logits, uses a scale other than
            D ** -0.5, calls the attention more than once, does not see all tokens of one image, or (at the end of the
            ``with`` block) did not run in its thread; or another thread records the model.

    However the ``with`` block ends, the model is left as it was.
    """
    recorder = FlowRecorder(num_frames, replace_attention, **options)
    timm_model = unwrap(model)
    selected = _selected_layers(timm_model, blocks)
    grid = _Grid(timm_model)

    def on_attention(index: int, name: str) -> OnAttention:
        def on_grid(flow: Tensor, k: Tensor) -> BlockFlow:
            return grid.block_flow(index, flow, k.shape[2] if k.dim() == 5 else None)

        def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            grid.check(name, index, q, k)
            return recorder.record(index, q, k, v, on_grid)

        return record

    readers = [(layer, reading_attention(name, on_attention(i, name))) for i, name, layer in selected]
    with wrapped_forwards([*readers, (unwrap(timm_model.patch_embed), grid.observe)]):
        yield recorder.flows
    recorder.check_complete({index: name for index, name, _ in selected})


@contextmanager
def record_qk(model: nn.Module, *, blocks: Iterable[int] | None = None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Records q and k of the attention layers of a timm ViT while the model runs inside the ``with`` block.

    They are the tensors that enter ``scaled_dot_product_attention``: after q/k norm and rotary embedding, before the
    scale. Attention stays fused, and not a bit of the model's output changes. For wrappers, checkpointing, copies and
    threads see `record_am_flow`::

        with record_qk(vit) as qk:
            vit(frames)                                  # (B * T, 3, height, width)
        for q, k in qk.values():                         # each (B * T, heads, N, D)
            flow = am_flow(q.unflatten(0, (B, T)), k.unflatten(0, (B, T)))  # (B, T - 1, heads, N)

    Args:
        model, blocks: as in `record_am_flow`.

    Yields:
        A dict {block index: (q, k)} that the forward fills, each (batch, heads, N, D), or (batch, heads, windows, N, D)
        where attention runs in windows, in the dtype that the layer uses; some models fold windows into the batch. They
        are not copied and stay attached to the autograd graph. A second forward replaces the dict's values.

    Raises:
        As `record_am_flow`.

    However the ``with`` block ends, the model is left as it was.
    """
    selected = _selected_layers(unwrap(model), blocks)
    qk: dict[int, tuple[Tensor, Tensor]] = {}

    def on_attention(index: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def record(q: Tensor, k: Tensor, v: Tensor) -> None:
            qk[index] = q, k

        return record

    with wrapped_forwards([(layer, reading_attention(name, on_attention(i))) for i, name, layer in selected]):
        yield qk
    missing = [name for index, name, _ in selected if index not in qk]
    if missing:
        raise RuntimeError(f"no q and k seen in {', '.join(missing)}: {NOT_RUN}")


class _Grid:
    """The layout of a model's tokens on the image."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hiera = hasattr(model, "reroll")
        if not hasattr(model, "patch_embed") or not (self.hiera or hasattr(model, "num_prefix_tokens")):
            raise TypeError(
                "model: expected a timm ViT or Hiera, whose tokens' places are known (by `patch_embed` and "
                f"`num_prefix_tokens`, or by `reroll`), got {type(model).__name__}"
            )
        self.images = 0
        self.size: tuple[int, int] = (0, 0)  # rows and columns of a ViT's image tokens

    def observe(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the patch embedding, and notes the number and size of its images."""
        self.images = x.shape[0]
        if not self.hiera:
            embed = self.model.patch_embed
            dynamic = getattr(embed, "dynamic_feat_size", None)
            self.size = tuple(embed.grid_size if dynamic is None else dynamic(tuple(x.shape[-2:])))
        return forward(x, *args, **kwargs)

    def check(self, name: str, index: int, q: Tensor, k: Tensor) -> None:
        """Raises RuntimeError unless q and k hold all tokens of each image."""
        if self.hiera:
            expected = prod(self.model.reroll.schedule[self._layout(index)][1])
            found = k.shape[2] * k.shape[3] if k.dim() == 5 else k.shape[2]
        else:
            expected = self.model.num_prefix_tokens + self.size[0] * self.size[1]
            found = k.shape[2] if k.dim() == 4 else -1
        if q.shape[0] != self.images or found != expected:
            raise RuntimeError(
                f"{name}: expected keys of {self.images} images of {expected} tokens each, got q {tuple(q.shape)} and "
                f"k {tuple(k.shape)}: attention in windows folded into the batch, or dropped tokens, can't be read"
            )

    def block_flow(self, index: int, flow: Tensor, windows: int | None) -> BlockFlow:
        """Puts a block's flow, (..., Nk) or (..., windows, Nk) in the order of the block's tokens, on the grid."""
        if not self.hiera:
            prefix = self.model.num_prefix_tokens
            return BlockFlow(torch.unflatten(flow[..., prefix:], -1, self.size), flow[..., :prefix], 1)
        if windows is not None:
            flow = flow.transpose(-1, -2).flatten(-2)  # Hiera orders tokens by place in the window, then by window
        tokens = flow.reshape(-1, flow.shape[-1], 1)
        grid = self.model.reroll(tokens, self._layout(index)).squeeze(-1)
        return BlockFlow(torch.unflatten(grid, 0, flow.shape[:-1]), flow[..., :0], windows or 1)

    @staticmethod
    def _layout(index: int) -> int:
        """The block whose output has the token order of block `index`'s input: the block itself may pool tokens."""
        return max(index - 1, 0)


def _selected_layers(model: nn.Module, blocks: Iterable[int] | None) -> list[tuple[int, str, Any]]:
    """(index, name, attention layer) of each selected block."""
    block_list = block_lists(model).get("blocks")
    if block_list is None:
        raise TypeError(
            "model: expected a timm vision transformer, with a list `.blocks` (a ModuleList or Sequential) of "
            f"transformer blocks; got {type(model).__name__}, which has none"
        )
    layers = [_attention_layer(model, index, unwrap(block)) for index, block in enumerate(block_list)]
    selected = [(index, *layers[index]) for index in select_blocks(blocks, len(layers))]
    for _, name, layer in selected:
        if not layer.fused_attn:
            raise RuntimeError(
                f"{name}: q and k are read where they enter scaled_dot_product_attention, which this layer does not "
                "call; set its `fused_attn` to True"
            )
    return selected


def _attention_layer(model: nn.Module, index: int, block: Any) -> tuple[str, Any]:
    """(name, layer) of a block's attention: `block.attn`, or the block itself where it computes its own.

    It is recognised by the attribute `fused_attn`: every timm layer that can call scaled_dot_product_attention has it.
    """
    name, attn = f"blocks.{index}", getattr(block, "attn", None)
    if isinstance(attn, nn.Module):
        name, attn = f"{name}.attn", unwrap(attn)
    if isinstance(attn, XCA):
        found = "XCA, whose attention is between channels: it has no attention map of tokens"
    elif hasattr(attn, "fused_attn"):
        return name, attn
    elif hasattr(block, "fused_attn"):
        return f"blocks.{index}", block
    elif isinstance(attn, nn.Module):
        found = f"{type(attn).__name__}, which is not known to call it (timm's layers that can have `fused_attn`)"
    else:
        found = f"{type(block).__name__}, which has no attention layer `attn`"
    raise TypeError(
        "model: expected a timm vision transformer whose blocks call scaled_dot_product_attention; "
        f"{name} of this {type(model).__name__} is {found}"
    )
