"""The q and k that a timm vision transformer really uses, taken during its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["record_qk"]


@contextmanager
def record_qk(model: nn.Module, *, blocks: Iterable[int] | None = None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Records q and k of the attention layers of a timm ViT while the model runs inside the ``with`` block.

    They are the tensors handed to ``scaled_dot_product_attention``: after q/k norm and rotary embedding, before the
    scale. The fused attention stays on, and the model's output does not change by a bit::

        with record_qk(vit) as qk:
            vit(frames)                                  # (B * T, 3, height, width)
        for q, k in qk.values():                         # each (B * T, heads, N, D)
            flow = am_flow(q.unflatten(0, (B, T)), k.unflatten(0, (B, T)))  # (B, T - 1, heads, N)

    Args:
        model: an eager timm model with a ``.blocks`` sequence whose attention is a single
            ``scaled_dot_product_attention`` per block without mask or bias: ViT, DeiT, DINOv2, EVA, DINOv3, ...
        blocks: indices of the blocks to record, from 0; None means all.

    Yields:
        A dict, filled by the forward, of {block index: (q, k)}, each (batch, heads, N, D) in the dtype the layer
        uses. They are not copied and stay attached to the autograd graph. A second forward replaces them.

    Raises:
        TypeError: the model has no blocks with a timm attention layer.
        ValueError: there is no block of such an index.
        RuntimeError: a selected layer is not fused, adds a mask or bias to its logits, uses a scale other than
            D ** -0.5, calls the attention more than once, or (at the end of the ``with`` block) did not run.

    However the ``with`` block ends, the model is left as it was.
    """
    layers = _attention_layers(model)
    selected = range(len(layers)) if blocks is None else sorted(set(blocks))
    for index in selected:
        if index not in range(len(layers)):
            raise ValueError(f"blocks: expected indices from 0 to {len(layers) - 1}, got {index!r}")
    for index in selected:
        name, layer = layers[index]
        if not layer.fused_attn:
            raise RuntimeError(
                f"{name}: q and k are read where they enter scaled_dot_product_attention, which this layer does not "
                "call; set its `fused_attn` to True"
            )

    qk: dict[int, tuple[Tensor, Tensor]] = {}
    forwards: list[tuple[nn.Module, Any]] = []
    try:
        for index in selected:
            name, layer = layers[index]
            forwards.append((layer, layer.__dict__.get("forward")))
            layer.forward = _recording(layer.forward, name, index, qk)
        yield qk
    finally:
        for layer, own in reversed(forwards):
            del layer.forward
            if own is not None:  # an instance attribute that somebody else had put there
                layer.forward = own
    missing = [layers[index][0] for index in selected if index not in qk]
    if missing:
        raise RuntimeError(
            f"no q and k seen in {', '.join(missing)}: the model did not run inside the `with` block, or it ran "
            "without calling scaled_dot_product_attention there"
        )


def _attention_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of each block's attention: `block.attn`, or the block itself where it computes its own.

    Every timm layer that can call scaled_dot_product_attention has the flag `fused_attn`; that is how one is known.
    """
    layers: list[tuple[str, Any]] = []
    blocks = getattr(model, "blocks", None)
    for index, block in enumerate(blocks if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else ()):
        attn = getattr(block, "attn", None)
        if isinstance(attn, nn.Module) and hasattr(attn, "fused_attn"):
            layers.append((f"blocks.{index}.attn", attn))
        elif hasattr(block, "fused_attn"):
            layers.append((f"blocks.{index}", block))
        else:
            raise TypeError(
                "model: expected a timm vision transformer with an attention layer in every block; "
                f"blocks.{index} of this {type(model).__name__} is {type(block).__name__} without one"
            )
    if not layers:
        raise TypeError(
            "model: expected a timm vision transformer, that is `.blocks` (a ModuleList or Sequential) of blocks "
            f"with an attention layer `.attn`; got {type(model).__name__}"
        )
    return layers


def _recording(
    forward: Callable[..., Any], name: str, index: int, qk: dict[int, tuple[Tensor, Tensor]]
) -> Callable[..., Any]:
    @wraps(forward)
    def recording_forward(*args: Any, **kwargs: Any) -> Any:
        reader = _AttentionReader(name)
        with reader:
            out = forward(*args, **kwargs)
        if reader.qk is not None:
            qk[index] = reader.qk
        return out

    return recording_forward


class _AttentionReader(TorchFunctionMode):
    """Sees every torch call made while it is active and takes q and k off the one attention call."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.qk: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self._read(*args, **kwargs)
        return func(*args, **kwargs)

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if self.qk is not None:
            raise RuntimeError(f"{self.name}: calls the attention more than once; which q and k to take is unclear")
        if attn_mask is not None or is_causal:
            raise RuntimeError(
                f"{self.name}: adds a mask or bias to its logits, so softmax(q k^T) is not its attention map"
            )
        if scale is not None and scale != query.shape[-1] ** -0.5:
            raise RuntimeError(
                f"{self.name}: scales its logits by {scale}, not by D ** -0.5 = {query.shape[-1] ** -0.5}"
            )
        if enable_gqa:
            raise RuntimeError(f"{self.name}: shares keys between heads (grouped queries)")
        self.qk = query, key
