"""The ops ``amflow::am_flow_matmul`` and ``amflow::am_flow_matmul_backward``; opaque, as those of `ops` are.

One schema serves both public forms: with q_b and k_b the pairs are ((q, k)[p], (q_b, k_b)[p]), without them
((q, k)[t], (q, k)[t + lag]).
"""

# No `from __future__ import annotations`: the schemas are inferred from the real types.
from collections.abc import Sequence
from typing import Any

from torch import Tensor, library

from amflow_kernels.impl import reference
from amflow_kernels.ops import implementation, no_second_order

MAX_FEATURES = 256


@library.custom_op("amflow::am_flow_matmul", mutates_args=())
def am_flow_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    impl: str | None,
) -> Tensor:
    """op x of every pair, with op = M or P, or its transpose: (B, P, *G, Nq, C), or (B, P, *G, Nk, C) transposed."""
    if x.shape[0] == 0 or x.shape[1] == 0:
        return _fake_matmul(q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax, impl)
    module = implementation(q, k, impl).module
    return module.am_flow_matmul(q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax)


@am_flow_matmul.register_fake
def _fake_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    impl: str | None,
) -> Tensor:
    tokens = (k if transpose else q).shape[-2]
    return q.new_empty((*x.shape[:-2], tokens, x.shape[-1]), dtype=reference.compute_dtype(q.dtype))


@library.custom_op("amflow::am_flow_matmul_backward", mutates_args=())
def am_flow_matmul_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    needs: Sequence[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_b, k_b, x, contiguous and in their dtype; an empty tensor where `needs` is False."""
    if x.shape[0] == 0 or x.shape[1] == 0:
        return _fake_backward(dy, q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax, needs, impl)
    module = implementation(q, k, impl).module
    return module.am_flow_matmul_backward(dy, q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax, needs)


@am_flow_matmul_backward.register_fake
def _fake_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    needs: Sequence[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b, dx = (
        like.new_empty(like.shape) if needed and like is not None else q.new_empty(0)
        for like, needed in zip((q, k, q_b, k_b, x), needs, strict=True)
    )
    return dq, dk, dq_b, dk_b, dx


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, q_b, k_b, x, ctx.scale, ctx.lag, ctx.temperature, ctx.transpose, ctx.softmax, ctx.impl = inputs
    ctx.save_for_backward(q, k, q_b, k_b, x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    options = (ctx.scale, ctx.lag, ctx.temperature, ctx.transpose, ctx.softmax)
    grads = am_flow_matmul_backward(dy, *ctx.saved_tensors, *options, needs, ctx.impl)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 6)


am_flow_matmul.register_autograd(_backward, setup_context=_setup_context)
am_flow_matmul_backward.register_autograd(no_second_order)
