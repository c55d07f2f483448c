"""AM flow of vision models of the transformers library: the attention implementation "am_flow".

Importing this module registers it:

    import amflow_kernels.integrations.transformers as am
    model = Dinov2Model.from_pretrained(..., attn_implementation="am_flow")
    with am.record_am_flow(model, num_frames=T) as flows:
        model(pixel_values)             # (B * T, 3, height, width)
    flows[11].grid                      # (B, T - 1, heads, height, width)

It is the library's own "sdpa", which says that flows may be recorded where a model calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from amflow_kernels.integrations.block_finder import find_blocks, look_through, select_blocks
from amflow_kernels.integrations.grids import TRANSFORMERS_PREFIX, grid_of
from amflow_kernels.integrations.layers import Layer, check_recordable
from amflow_kernels.integrations.recording import BlockFlow, FlowRecorder, RecordOptions, recording_flows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlockFlow", "record_am_flow"]


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: Iterable[int] | None = None,
    **options: Unpack[RecordOptions],
) -> Iterator[dict[int, BlockFlow]]:
    """Records the AM flow of every block of a vision model while it runs inside the ``with`` block.

    Like `amflow_kernels.integrations.timm.record_am_flow`, with attention and flow in one call. What is said there of
    wrappers, checkpointing, copies, threads and overlapping recorders holds here.

    Args:
        model: a ViT, DINOv2 (with or without registers), DINOv3 (ViT) or CLIP vision model of transformers, with or
            without a head, whose attention implementation is "am_flow".
        num_frames: T; the batch of images is B clips of T frames.
        blocks: indices of the blocks to record, from 0; None means all.
        options: options of `am_flow`: lag, temperature, head_reduction, center, impl. They are checked at once.

    Yields:
        A dict {block index: `BlockFlow`} that the forward fills. A second forward replaces its values.

    Raises:
        TypeError: the model is of another kind, or an option is unknown or of a wrong type.
        ValueError: a block index or an option is out of range, or the images are not whole clips.
        RuntimeError: the model has another attention implementation; a layer uses a mask or dropout, or a scale other
            than D ** -0.5; another thread records the model; or (at the end of the ``with`` block) a block did not run
            in its thread.
    """
    recorder = FlowRecorder(num_frames, replace_attention=True, **options)
    check_recordable(model)
    vision: Any = look_through(model)
    _check_model(vision)
    layers = _attention_layers(vision)
    selected = {index: layers[index] for index in select_blocks(blocks, len(layers))}
    grid: Any = grid_of(vision)
    with recording_flows(vision, selected, recorder, dict.fromkeys(selected, grid)):
        yield recorder.flows


def _check_model(model: Any) -> None:
    """Raises TypeError or RuntimeError unless the model can be recorded."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if config is None or kind not in TRANSFORMERS_PREFIX:
        inner = "; record its `.vision_model`" if hasattr(model, "vision_model") else ""
        raise TypeError(
            f"model: expected a transformers vision model of type {', '.join(TRANSFORMERS_PREFIX)}, got {kind!r}{inner}"
        )
    if config._attn_implementation != "am_flow":
        raise RuntimeError(
            f"model: its attention is {config._attn_implementation!r}; load it with attn_implementation='am_flow' or "
            "call model.set_attn_implementation('am_flow')"
        )


def _attention_layers(model: nn.Module) -> list[Layer]:
    """The attention layer of each block."""
    path, blocks = find_blocks(model)
    return [
        Layer(f"{path}.{index}.{name}", layer)
        for index, block in enumerate(blocks)
        for name, layer in block.named_modules()
        if _calls_attention(layer)
    ]


def _calls_attention(layer: nn.Module) -> bool:
    """Whether a layer calls the attention implementation: all such layers have `is_causal` and a scale."""
    return hasattr(layer, "is_causal") and (hasattr(layer, "scaling") or hasattr(layer, "scale"))


AttentionInterface.register("am_flow", sdpa_attention_forward)
AttentionMaskInterface.register("am_flow", sdpa_mask)
