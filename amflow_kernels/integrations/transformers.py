"""AM flow of vision models of the transformers library: the attention implementation "am_flow".

Importing this module registers it::

    import amflow_kernels.integrations.transformers as am
    model = Dinov2Model.from_pretrained(..., attn_implementation="am_flow")
    with am.record_am_flow(model, num_frames=T) as flows:
        model(pixel_values)             # (B * T, 3, height, width)
    flows[11].grid                      # (B, T - 1, heads, height, width)

Outside `record_am_flow` it is the library's own "sdpa".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from amflow_kernels.integrations.recording import BlockFlow, FlowRecorder, replaced_forwards

__all__ = ["BlockFlow", "record_am_flow"]

# Vision models by their configuration's `model_type`: how many tokens come before the image's.
_PREFIX: dict[str, Callable[[Any], int]] = {
    "vit": lambda config: 1,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + int(config.num_register_tokens),
    "dinov3_vit": lambda config: 1 + int(config.num_register_tokens),
    "clip_vision_model": lambda config: 1,
}
_RECORD = "_am_flow_record"  # attribute of an attention layer whose flow is wanted


@contextmanager
def record_am_flow(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: Iterable[int] | None = None,
    lag: int = 1,
    temperature: float = 1.0,
    head_reduction: str = "none",
    center: bool = False,
    impl: str | None = None,
) -> Iterator[dict[int, BlockFlow]]:
    """Records the AM flow of every block of a vision model while it runs inside the ``with`` block.

    As `amflow_kernels.integrations.timm.record_am_flow`, with attention and flow in one call.

    Args:
        model: a ViT, DINOv2 (with or without registers), DINOv3 (ViT) or CLIP vision model of transformers, with or
            without a head, whose attention implementation is "am_flow".
        num_frames: T; the batch of images is B clips of T frames.
        blocks: indices of the blocks to record, from 0; None means all.
        lag, temperature, head_reduction, center, impl: as in `am_flow`.

    Yields:
        A dict, filled by the forward, of {block index: `BlockFlow`}. A second forward replaces them.

    Raises:
        TypeError: the model is of another kind.
        ValueError: there is no block of such an index, or the images are not whole clips.
        RuntimeError: the model has another attention implementation, or (at the end of the ``with`` block) a block did
            not run.
    """
    recorder = FlowRecorder(num_frames, lag, temperature, head_reduction, center, impl, replace_attention=True)
    vision: Any = model.module if isinstance(model, DistributedDataParallel) else model
    config = getattr(vision, "config", None)
    kind = getattr(config, "model_type", None)
    if config is None or kind not in _PREFIX:
        raise TypeError(f"model: expected a transformers vision model of type {', '.join(_PREFIX)}, got {kind!r}")
    if config._attn_implementation != "am_flow":
        raise RuntimeError(
            f"model: its attention is {config._attn_implementation!r}; load it with attn_implementation='am_flow' or "
            "call model.set_attn_implementation('am_flow')"
        )
    layers = [(name, layer) for name, layer in vision.named_modules() if _calls_attention(layer)]
    selected = range(len(layers)) if blocks is None else sorted(set(blocks))
    for index in selected:
        if index not in range(len(layers)):
            raise ValueError(f"blocks: expected indices from 0 to {len(layers) - 1}, got {index!r}")
    size = [0, 0]  # of the grid of tokens

    def seeing(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def seeing_forward(*args: Any, **kwargs: Any) -> Any:
            pixels = kwargs.get("pixel_values", args[0] if args else None)
            if isinstance(pixels, Tensor):
                patch = config.patch_size
                height, width = (patch, patch) if isinstance(patch, int) else patch
                size[:] = (pixels.shape[-2] // height, pixels.shape[-1] // width)
            return forward(*args, **kwargs)

        return seeing_forward

    def recording(index: int, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        prefix = _PREFIX[kind](config)

        def on_grid(flow: Tensor, k: Tensor) -> BlockFlow:
            return BlockFlow(flow[..., prefix:].unflatten(-1, tuple(size)), flow[..., :prefix], 1)

        def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if k.shape[-2] != prefix + size[0] * size[1]:
                raise RuntimeError(
                    f"{name}: expected {prefix} tokens and a grid of {size[0]} x {size[1]}, got k {tuple(k.shape)}"
                )
            out = recorder.record(index, q, k, v, on_grid)
            assert out is not None
            return out

        return record

    try:
        for index in selected:
            setattr(layers[index][1], _RECORD, recording(index, layers[index][0]))
        with replaced_forwards([(vision, seeing(vision.forward))]):
            yield recorder.flows
    finally:
        for index in selected:
            layers[index][1].__dict__.pop(_RECORD, None)
    recorder.check_complete({index: layers[index][0] for index in selected})


def _calls_attention(layer: nn.Module) -> bool:
    """Whether it is a layer that calls the attention implementation: all such say what is causal and how they scale."""
    return hasattr(layer, "is_causal") and (hasattr(layer, "scaling") or hasattr(layer, "scale"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as the library calls it; q, k, v (batch, heads, N, D) -> (batch, N, heads, D)."""
    record = getattr(module, _RECORD, None)
    if record is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    name = type(module).__name__
    if attention_mask is not None or dropout or options.get("is_causal", module.is_causal):
        raise RuntimeError(f"{name}: attention with a mask or dropout; AM flow is of plain attention maps")
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        raise RuntimeError(f"{name}: scales its logits by {scaling}, not by D ** -0.5 = {query.shape[-1] ** -0.5}")
    return record(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("am_flow", _attention)
AttentionMaskInterface.register("am_flow", sdpa_mask)
