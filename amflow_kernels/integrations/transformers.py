"""AM flow of vision models of the transformers library: the attention implementation "am_flow".

Importing this module registers it::

    import amflow_kernels.integrations.transformers as am
    model = Dinov2Model.from_pretrained(..., attn_implementation="am_flow")
    with am.record_am_flow(model, num_frames=T) as flows:
        model(pixel_values)             # (B * T, 3, height, width)
    flows[11].grid                      # (B, T - 1, heads, height, width)

It is the library's own "sdpa", which says that flows may be recorded where a model calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from amflow_kernels.integrations.block_finder import find_blocks, select_blocks, unwrap
from amflow_kernels.integrations.recording import (
    BlockFlow,
    FlowRecorder,
    OnAttention,
    reading_attention,
    wrapped_forwards,
)

__all__ = ["BlockFlow", "record_am_flow"]

# Number of tokens before the image tokens, by the `model_type` of the configuration.
_PREFIX: dict[str, Callable[[Any], int]] = {
    "vit": lambda config: 1,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + int(config.num_register_tokens),
    "dinov3_vit": lambda config: 1 + int(config.num_register_tokens),
    "clip_vision_model": lambda config: 1,
}


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: Iterable[int] | None = None,
    **options: Any,
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
    vision = unwrap(model)
    prefix = _prefix_tokens(vision)
    layers = _attention_layers(vision)
    selected = {index: layers[index] for index in select_blocks(blocks, len(layers))}
    grid = _Grid(prefix, vision.config.patch_size)

    def recording(index: int, name: str) -> OnAttention:
        def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            grid.check(name, k)
            return recorder.record(index, q, k, v, lambda flow, _: grid.block_flow(flow))

        return record

    readers = [(layer, reading_attention(name, recording(index, name))) for index, (name, layer) in selected.items()]
    with wrapped_forwards([*readers, (vision, grid.observe)]):
        yield recorder.flows
    recorder.check_complete({index: name for index, (name, _) in selected.items()})


class _Grid:
    """The layout of a model's tokens on the image."""

    def __init__(self, prefix: int, patch_size: Any) -> None:
        self.prefix = prefix
        self.patch_size: tuple[int, int] = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.size = (0, 0)  # rows and columns of image tokens

    def observe(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the model, and notes the size of its images."""
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        if isinstance(pixels, Tensor):
            height, width = self.patch_size
            self.size = (pixels.shape[-2] // height, pixels.shape[-1] // width)
        return forward(*args, **kwargs)

    def check(self, name: str, k: Tensor) -> None:
        """Raises RuntimeError unless k holds all tokens of each image."""
        if k.shape[-2] != self.prefix + self.size[0] * self.size[1]:
            raise RuntimeError(
                f"{name}: expected {self.prefix} tokens and a grid of {self.size[0]} x {self.size[1]}, "
                f"got k {tuple(k.shape)}"
            )

    def block_flow(self, flow: Tensor) -> BlockFlow:
        return BlockFlow(torch.unflatten(flow[..., self.prefix :], -1, self.size), flow[..., : self.prefix], 1)


def _prefix_tokens(model: Any) -> int:
    """Number of tokens before the image tokens. Raises TypeError or RuntimeError unless the model can be recorded."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if config is None or kind not in _PREFIX:
        raise TypeError(f"model: expected a transformers vision model of type {', '.join(_PREFIX)}, got {kind!r}")
    if config._attn_implementation != "am_flow":
        raise RuntimeError(
            f"model: its attention is {config._attn_implementation!r}; load it with attn_implementation='am_flow' or "
            "call model.set_attn_implementation('am_flow')"
        )
    return _PREFIX[kind](config)


def _attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of each block's attention."""
    path, blocks = find_blocks(model)
    return [
        (f"{path}.{index}.{name}", layer)
        for index, block in enumerate(blocks)
        for name, layer in block.named_modules()
        if _calls_attention(layer)
    ]


def _calls_attention(layer: nn.Module) -> bool:
    """Whether a layer calls the attention implementation: all such layers have `is_causal` and a scale."""
    return hasattr(layer, "is_causal") and (hasattr(layer, "scaling") or hasattr(layer, "scale"))


AttentionInterface.register("am_flow", sdpa_attention_forward)
AttentionMaskInterface.register("am_flow", sdpa_mask)
