"""AM flow of timm vision transformers, taken during their own forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from timm.models.xcit import XCA
from torch import Tensor, nn

from amflow_kernels.integrations.block_finder import block_lists, look_through, select_blocks, unwrap
from amflow_kernels.integrations.grids import grid_of
from amflow_kernels.integrations.layers import Layer, check_recordable
from amflow_kernels.integrations.recording import (
    BlockFlow,
    FlowRecorder,
    RecordOptions,
    no_call,
    recording_flows,
    recording_qk,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlockFlow", "record_am_flow", "record_qk"]


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: Iterable[int] | None = None,
    replace_attention: bool = False,
    **options: Unpack[RecordOptions],
) -> Iterator[dict[int, BlockFlow]]:
    """Records the AM flow of every block of a timm vision transformer while the model runs inside the ``with`` block.

    As `amflow_kernels.record_am_flow`, by index of the block, and always with a grid. What is said there of wrappers,
    checkpointing, copies, threads and overlapping recorders holds here:

        with record_am_flow(vit, num_frames=T) as flows:
            out = vit(frames)           # (B * T, 3, height, width), the frames of a clip side by side
        flows[11].grid                  # (B, T - 1, heads, height, width), differentiable in the model's parameters

    Args:
        model: a timm model, wrapped or not, with a ``.blocks`` sequence whose attention is a single
            ``scaled_dot_product_attention`` per block without mask or bias: ViT, DeiT, DINOv2, EVA, DINOv3, ..., or
            Hiera.
        blocks: indices of the blocks to record, from 0; None means all.
        num_frames, replace_attention, options: as there.

    Yields:
        A dict {block index: `BlockFlow`} that the forward fills. A second forward replaces its values.

    Raises:
        TypeError: the model has no blocks with a timm attention layer, or an option is unknown or of a wrong type.
        ValueError: a block index or an option is out of range, or the images are not whole clips.
        RuntimeError: a selected layer is not fused, adds a mask or bias to its logits, uses a scale other than
            D ** -0.5, calls the attention more than once, does not see all tokens of one image, or (at the end of the
            ``with`` block) did not run in its thread.

    However the ``with`` block ends, the model is left as it was.
    """
    recorder = FlowRecorder(num_frames, replace_attention=replace_attention, **options)
    check_recordable(model)
    timm_model = look_through(model)
    selected = _selected_layers(timm_model, blocks)
    place = grid_of(timm_model)
    if place is None:
        raise TypeError(
            "model: expected a timm ViT or Hiera, whose tokens' places are known (by `patch_embed` and "
            f"`num_prefix_tokens`, or by `reroll`), got {type(timm_model).__name__}"
        )
    with recording_flows(timm_model, selected, recorder, dict.fromkeys(selected, place)):
        yield recorder.flows


@contextmanager
def record_qk(model: nn.Module, *, blocks: Iterable[int] | None = None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Records q and k of the attention layers of a timm ViT while the model runs inside the ``with`` block.

    As `amflow_kernels.record_qk`, by index of the block:

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
        TypeError, ValueError, RuntimeError: as `record_am_flow`.

    However the ``with`` block ends, the model is left as it was.
    """
    check_recordable(model)
    timm_model = look_through(model)
    with recording_qk(timm_model, _selected_layers(timm_model, blocks)) as qk:
        yield qk


def _selected_layers(model: nn.Module, blocks: Iterable[int] | None) -> dict[int, Layer]:
    """The attention layer of each selected block, by index."""
    block_list = block_lists(model).get("blocks")
    if block_list is None:
        raise TypeError(
            "model: expected a timm vision transformer, with a list `.blocks` (a ModuleList or Sequential) of "
            f"transformer blocks; got {type(model).__name__}, which has none"
        )
    layers = [_attention_layer(model, index, unwrap(block)) for index, block in enumerate(block_list)]
    selected = {index: layers[index] for index in select_blocks(blocks, len(layers))}
    for layer in selected.values():
        if not layer.module.fused_attn:
            raise RuntimeError(no_call(layer))
    return selected


def _attention_layer(model: nn.Module, index: int, block: Any) -> Layer:
    """A block's attention layer: `block.attn`, or the block itself where it computes its own.

    It is recognised by the attribute `fused_attn`: every timm layer that can call scaled_dot_product_attention has it.
    """
    name = f"blocks.{index}"
    attn: Any = getattr(block, "attn", None)
    if isinstance(attn, nn.Module):
        name, attn = f"{name}.attn", unwrap(attn)
    if isinstance(attn, XCA):
        found = "XCA, whose attention is between channels: it has no attention map of tokens"
    elif hasattr(attn, "fused_attn"):
        return Layer(name, attn)
    elif hasattr(block, "fused_attn"):
        return Layer(f"blocks.{index}", block)
    elif isinstance(attn, nn.Module):
        found = f"{type(attn).__name__}, which is not known to call it (timm's layers that can have `fused_attn`)"
    else:
        found = f"{type(block).__name__}, which has no attention layer `attn`"
    raise TypeError(
        "model: expected a timm vision transformer whose blocks call scaled_dot_product_attention; "
        f"{name} of this {type(model).__name__} is {found}"
    )
