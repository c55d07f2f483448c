"""Attention and its AM flow in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from amflow_kernels.api import am_flow
from amflow_kernels.dispatch import Impl, check_impl, uses_lse
from amflow_kernels.problem import FlowOptions, Problem, check_dense, check_same, clips_of
from amflow_kernels.shards import on_shards

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["am_flow_attention"]

Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # of q, k, v, scale: out, log-sum-exps


@on_shards(like_q=(0,))
def am_flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    num_frames: int | None = None,
    impl: Impl | None = None,
    **options: Unpack[FlowOptions],
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` of every frame, and the AM flow of the same attention maps.

    A drop-in for the attention call of an image model that sees the frames of a clip side by side in its batch:

        out, flow = am_flow_attention(q, k, v, num_frames=T)    # q, k, v, out (B * T, heads, N, D)

    Args:
        q, k: queries (B, T, *G, Nq, D) and keys (B, T, *G, Nk, D) of T frames, as `am_flow` takes them; its docstring
            shows layouts that look right and are not. DTensors, too.
        v: values, (B, T, *G, Nk, Dv), dtype and device of q.
        attn_mask, dropout_p, is_causal, enable_gqa: where `scaled_dot_product_attention` has them, so that calls can be
            exchanged. AM flow is defined for the plain softmax(q k^T): anything but the defaults raises.
        num_frames: T, for q, k and v whose frames are folded into the batch, (B * T, *G, N, D).
        scale, impl: as in `am_flow`; `scale` is the attention's, too.
        options: `lag`, `temperature`, `head_reduction`, `center` and `out_dtype`, as in `am_flow`.

    Returns:
        out: (B, T, *G, Nq, Dv), or (B * T, *G, Nq, Dv) with `num_frames`, in the dtype of v, from PyTorch's own
            attention kernels, run on frames folded into the batch and windows into the heads: memory layout and bits
            are those of such a call.
        flow: as `am_flow` returns it. Both are differentiable in q and k, `out` in v, too.

    Under autocast q, k and v are cast as `scaled_dot_product_attention` casts them, and both results are of the cast
    ones; `am_flow` itself casts nothing. Where flash attention or cuDNN's runs on a GPU and the flow has use for its
    log-sum-exps, the flow takes them (not in compiled code, nor where gradients of q or k are needed).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what came and what is expected.
    """
    _check_plain(attn_mask, dropout_p, is_causal, enable_gqa)
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = autocast(q, k, v)
    q, k, v = (clips_of(name, x, num_frames) for name, x in (("q", q), ("k", k), ("v", v)))
    problem = Problem(q, k, scale=scale, **options)
    check_impl(impl, problem)
    _check_values(problem, v)
    out, lse = attention(problem, v, impl)
    flow = am_flow(q, k, scale=scale, lse=lse, impl=impl, **options)
    return out if num_frames is None else out.flatten(0, 1), flow


def _check_plain(attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
    """Raises unless these arguments of an attention call have their defaults."""
    for name, value, plain in (
        ("attn_mask", attn_mask, None),
        ("dropout_p", dropout_p, 0.0),
        ("is_causal", is_causal, False),
        ("enable_gqa", enable_gqa, False),
    ):
        if value is not plain and not (isinstance(value, (int, float)) and value == plain):
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{name}: expected {plain} (AM flow is of plain attention maps), got {got}")


def _check_values(problem: Problem, v: Tensor) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"v: expected a torch.Tensor, got {type(v).__name__}")
    check_dense("v", v)
    check_same("v", v, "q", problem.q)
    k = problem.k
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] == 0:
        raise ValueError(
            f"v: expected the shape of k but for the last dimension, {(*k.shape[:-1], 'Dv')}, got {tuple(v.shape)}"
        )


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k, v as `scaled_dot_product_attention` casts them."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(q), cast(k), cast(v)


def attention(problem: Problem, v: Tensor, impl: str | None) -> tuple[Tensor, Tensor | None]:
    """The attention's output, and its rows' log-sum-exps if the flow would be faster with them."""
    q, k, scale = problem.q, problem.k, problem.logit_scale
    frames, groups = q.shape[:2], q.shape[2:-2]
    # Fused attention kernels take four dimensions, no more.
    q4, k4, v4 = (x.flatten(0, 1).flatten(1, -3) for x in (q, k, v))
    with_lse = _kernel_with_lse(q4, k4, v4, scale) if uses_lse(problem, impl) else None
    lse = None
    if with_lse is not None:
        out, lse = with_lse(q4, k4, v4, scale)
        lse = torch.unflatten(torch.unflatten(lse, 1, groups), 0, frames)
    else:
        out = scaled_dot_product_attention(q4, k4, v4, scale=scale)
    # torch 2.11 can't trace the method `unflatten` where a TorchFunctionMode is active (a recorder, a default device).
    return torch.unflatten(torch.unflatten(out, 1, groups), 0, frames), lse


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's log-sum-exps are (B, H, Nq, 1): the statistics that its backward takes (ATen/native/cudnn/MHA.cpp)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, compute_log_sumexp=True, scale=scale
    )
    return out, lse.squeeze(-1)


# PyTorch's attention kernels that return natural log-sum-exps of the scaled logits, float32: its ring attention
# (torch.distributed.tensor.experimental) merges partial results of either by them.
_KERNELS_WITH_LSE = {SDPBackend.FLASH_ATTENTION: _flash, SDPBackend.CUDNN_ATTENTION: _cudnn}


def _kernel_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Attention | None:
    """The kernel that the attention call will run, if it runs on a GPU, on these very tensors, and has log-sum-exps.

    The CPU's log-sum-exps are off by 1e-6, which nearly still clips feel. Flash attention gets padded tensors where D
    is not a multiple of 8; cuDNN is not chosen then.
    """
    if q.device.type != "cuda" or q.shape[-1] != v.shape[-1] or q.shape[-1] % 8:
        return None
    return _KERNELS_WITH_LSE.get(SDPBackend(torch._fused_sdp_choice(q, k, v, scale=scale)))
