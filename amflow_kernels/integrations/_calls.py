"""Takes q, k and v off the attention call that a layer makes in its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# Given q, k, v of the call; the attention's output if it has computed that, too, else None.
OnAttention = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules another forward while the ``with`` block runs, whatever ends it.

    It is an attribute of the instance: compiled code, which does not notice new hooks, is compiled anew.
    """
    before = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            del module.forward
            if own is not None:  # an instance attribute that somebody else had put there
                module.forward = own


def reading(name: str, forward: Callable[..., Any], on_attention: OnAttention) -> Callable[..., Any]:
    """The forward of the layer `name`, with `on_attention` called where it calls the attention."""

    @wraps(forward)
    def reading_forward(*args: Any, **kwargs: Any) -> Any:
        with _AttentionReader(name, on_attention):
            return forward(*args, **kwargs)

    return reading_forward


class _AttentionReader(TorchFunctionMode):
    """Sees every torch call made while it is active, among them the one attention call."""

    def __init__(self, name: str, on_attention: OnAttention) -> None:
        super().__init__()
        self.name = name
        self.on_attention = on_attention
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._read(*args, **kwargs) if func is scaled_dot_product_attention else None
        return func(*args, **kwargs) if out is None else out

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
    ) -> Tensor | None:
        self.calls += 1
        if self.calls > 1:
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
        return self.on_attention(query, key, value)
