"""Reading q, k and v of the one attention call that a layer makes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from amflow_kernels.integrations.wrapping import Around

# Called with q, k, v of the attention call, (images, heads, [windows,] N, D), and why the call can't be replaced ("" if
# it can). Returns the attention's output to replace the call, or None to leave it.
OnAttention = Callable[[Tensor, Tensor, Tensor, str], "Tensor | None"]


def hidden_from_checkpoints() -> Any:
    """Keeps what is saved for the backward out of activation checkpointing.

    A checkpoint would expect the recomputation to save it again, but recomputation does not record.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def reading_attention(name: str, on_attention: OnAttention, no_call: str) -> Around:
    """A wrapper of the layer `name` with which `on_attention` sees its attention call.

    Args:
        name, on_attention: as in `AttentionReader`.
        no_call: message of the RuntimeError that is raised where the layer runs without such a call.
    """

    def read(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reader = AttentionReader(name, on_attention)
        with reader:
            out = forward(*args, **kwargs)
        if reader.calls == 0:
            raise RuntimeError(no_call)
        return out

    return read


class AttentionReader(TorchFunctionMode):
    """While active, sees every torch call and passes q, k, v of the one attention call to `on_attention`.

    An attention call is one of ``scaled_dot_product_attention`` or of ``multi_head_attention_forward``, which is all of
    an `nn.MultiheadAttention`. While any mode is active, PyTorch's fused inference kernels of `nn.MultiheadAttention`
    and `nn.TransformerEncoderLayer`, in which nothing can be read, do not run.

    Args:
        name: name of the layer or block, for messages.
        on_attention: called with q, k, v of the attention call; its result, unless None, replaces the call's output.

    Attributes:
        calls: number of attention calls.

    Raises:
        RuntimeError: softmax(D ** -0.5 q k^T) is not the layer's attention map, or there is more than one call.
    """

    def __init__(self, name: str, on_attention: OnAttention) -> None:
        super().__init__()
        self.name = name
        self.on_attention = on_attention
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out: Any = None
        if func is scaled_dot_product_attention:
            out = self._scaled_dot_product(*args, **kwargs)
        elif func is multi_head_attention_forward:
            out = self._multi_head(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    def _scaled_dot_product(
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
        """The output that replaces the call; parameters are those of `scaled_dot_product_attention`."""
        self._check(masked=attn_mask is not None or is_causal)
        usual = query.shape[-1] ** -0.5  # 1 / sqrt(D) may differ in the last digit
        if scale is not None and abs(scale - usual) > 1e-6 * usual:
            raise RuntimeError(f"{self.name}: scales its logits by {scale}, not by D ** -0.5 = {usual}")
        if enable_gqa or query.shape[:-2] != key.shape[:-2]:
            raise RuntimeError(
                f"{self.name}: shares keys between heads (grouped queries), q {tuple(query.shape)}, "
                f"k {tuple(key.shape)}"
            )
        return self.on_attention(query, key, value, "drops attention at random" if dropout_p else "")

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None] | None:
        """What replaces the call; parameters are those of `multi_head_attention_forward`, tokens (N, images, C).

        Without weights to return this computes the same as PyTorch's function, by the same calls, so that q and k are
        computed once and a checkpoint's recomputation saves the same tensors. With weights that function runs too.
        """
        self._check(masked=attn_mask is not None or key_padding_mask is not None or is_causal)
        if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
            raise RuntimeError(
                f"{self.name}: adds keys that belong to no token (bias_k, bias_v, add_zero_attn, static_k or static_v)"
            )
        if query.dim() != 3:
            raise RuntimeError(f"{self.name}: expected a batch of images, got queries {tuple(query.shape)}")
        weights: tuple[Tensor | None, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight:
            weights = (in_proj_weight,)
        dropout_p = dropout_p if training else 0.0
        if need_weights:
            with hidden_from_checkpoints():
                q, k, v = _project(query, key, value, num_heads, weights, in_proj_bias)
            self.on_attention(q, k, v, "returns its attention weights")
            return None
        q, k, v = _project(query, key, value, num_heads, weights, in_proj_bias)
        out = self.on_attention(q, k, v, "drops attention at random" if dropout_p else "")
        if out is None:
            out = scaled_dot_product_attention(q, k, v, None, dropout_p)
        out = out.permute(2, 0, 1, 3).contiguous().view(-1, embed_dim_to_check)
        return linear(out, out_proj_weight, out_proj_bias).view(*query.shape[:2], -1), None

    def _check(self, *, masked: bool) -> None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(f"{self.name}: calls the attention more than once; which q and k to take is unclear")
        if masked:
            raise RuntimeError(
                f"{self.name}: adds a mask or bias to its logits, so softmax(q k^T) is not its attention map"
            )


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """q, k, v (images, heads, N, D) of tokens (N, images, C), with one weight for all three or a weight for each."""
    functional: Any = torch.nn.functional
    if len(weights) == 1:
        parts = functional._in_projection_packed(query, key, value, weights[0], bias)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = functional._in_projection(query, key, value, *weights, *biases)
    images = query.shape[1]
    heads = (x.view(x.shape[0], images * num_heads, -1).transpose(0, 1) for x in parts)
    return tuple(x.view(images, num_heads, x.shape[1], -1) for x in heads)


class PlainForward(TorchFunctionMode):
    """While active, `nn.TransformerEncoderLayer` calls its `self_attn`, which its fused inference kernel does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def without_fused_layer(name: str, layer: nn.TransformerEncoderLayer) -> Around:
    """A wrapper of the layer `name` with which it calls its `self_attn`."""

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.is_nested for x in args):
            raise RuntimeError(
                f"{name}: is given nested tensors (a padding mask), so its tokens are not those of images"
            )
        if not torch.compiler.is_compiling():
            with PlainForward():
                return forward(*args, **kwargs)
        # The layer does not see modes while it is traced. Of this attribute it asks only whether it may run fused.
        fused = layer.activation_relu_or_gelu
        layer.activation_relu_or_gelu = 0
        out = forward(*args, **kwargs)
        layer.activation_relu_or_gelu = fused
        return out

    return run
