"""The public functions: a problem out of the arguments, then one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amflow_kernels import ops
from amflow_kernels.calls import problem_of
from amflow_kernels.dispatch import Impl, explain
from amflow_kernels.problem import HeadReduction, MatmulProblem, Problem, clips_of
from amflow_kernels.shards import on_shards

__all__ = ["am_flow", "am_flow_matmul", "am_flow_matmul_pair", "am_flow_pair", "explain"]


@on_shards()
def am_flow(
    q: Tensor,
    k: Tensor,
    *,
    num_frames: int | None = None,
    scale: float | None = None,
    lag: int = 1,
    temperature: float = 1.0,
    head_reduction: HeadReduction = "none",
    center: bool = False,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """AM flow of a clip: how much each key token's attention changes from frame t to frame t + lag.

    With a dimension of frames, or with frames folded into the batch:

        flow = am_flow(q, k)                    # q, k (B, T, heads, N, D) -> (B, T - 1, heads, N)
        flow = am_flow(q, k, num_frames=T)      # q, k (B * T, heads, N, D), as an image model calls its attention

    With ``A[t] = softmax_keys(scale * q[t] @ k[t].T)``:

        flow[t] = softmax_keys(|A[t] - A[t + lag]| / temperature).T @ 1        t = 0 .. T - lag - 1

    Every flow sums to Nq over its Nk tokens; equal frames give exactly Nq / Nk everywhere. The maps are never formed,
    all arithmetic is float32 or better, and autocast has no effect.

    Source: Agrawal, Ali, Dantcheva, Bremond, "AM Flow: Adapters for Temporal Processing in Action Recognition",
    arXiv 2411.02065 (there: lag = 1, temperature = 1).

    Args:
        q: queries, (B, T, *G, Nq, D): T frames, G = (heads,) or (heads, windows), D from 1 to 256. float32,
            bfloat16, float16, or float64 (which plain PyTorch computes). Any strides with a contiguous last
            dimension: views of a fused qkv are read in place. Heads come before tokens, and T is the second dimension
            (with `num_frames` a part of the first); see below.
        k: keys, (B, T, *G, Nk, D), dtype and device of q.
        num_frames: T, for q and k of B clips whose frames lie side by side in the batch, (B * T, *G, N, D), as
            `scaled_dot_product_attention` takes them in an image model. They are read in place. The result is the same
            as that of ``q.unflatten(0, (B, T))`` and of k alike.
        scale: factor on the logits; None means D ** -0.5.
        lag: distance in frames of the two maps that are compared, at least 1.
        temperature: divides the change before the second softmax, at least 1/64.
        head_reduction: ``"none"`` (a flow per head), ``"mean"`` (mean of the heads' flows) or ``"mean_map"``
            (flow of the head-averaged maps).
        center: return ``flow - Nq / Nk``, computed without the cancellation: the flow of real clips is
            Nq / Nk plus a signal of 1e-4 to 1e-2, and only the centred form keeps full relative precision.
        out_dtype: dtype of the result, to which it is rounded at the end. bfloat16 and float16 need `center`: next to 1
            they would round the signal away. float16 is coarser below 6e-5, and 0 below 3e-8.
        lse: the rows' log-sum-exps, ``logsumexp(scale * q @ k.mT, -1)``: natural logarithm, float32, (B, T, *G, Nq),
            or (B * T, *G, Nq) with `num_frames`, as flash attention of the same q, k and scale returns it, from
            products of the same precision. It is not checked and takes no gradient. The tiled Triton kernels save a
            pass with it. Implementations that would gain nothing compute their own, and so do all where gradients of q
            or k are needed: the gradients of peaked maps need row sums to the last digit.
        impl: None picks by device; ``"reference"``, ``"chunked"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` runs that
            implementation or raises. Where no kernel can run, None takes ``"chunked"``, plain PyTorch by blocks of
            query rows in 64 MB besides inputs and results, and warns. ``"reference"`` forms the maps. ``"cuda"``: at
            most 640 tokens and a head dimension of at most 128; ``"triton"`` makes its gradients.

    Returns:
        float32 (float64 for float64 inputs) or `out_dtype`, contiguous: (B, T - lag, *G, Nk), or
        (B, T - lag, *G[1:], Nk) with a head reduction. Differentiable once with respect to q and k, also through
        `torch.vmap`; forward mode and gradients by transforms of `torch.func` raise.

    **Layouts that look right and are not.** Shapes alone can't tell these from (B, T, heads, N, D), and the result
    would be of something else:

        (B, T, N, heads, D)     flash-attention packages, and timm before it transposes: q.transpose(2, 3)
        (B, heads, T, N, D)     models of video: q.transpose(1, 2)
        (T, B, heads, N, D)     frames first: q.transpose(0, 1)

    `explain(q, k)` prints how the dimensions are read, and fewer tokens than heads make a warning.

    **Tensor parallelism.** q and k may be DTensors whose batch or heads (or both, by different dimensions of the mesh)
    are sharded, evenly and in the same way, or that are replicated; the result is a DTensor sharded like them. Nothing
    is communicated. Reductions over sharded heads raise.

    A map row whose logits contain NaN or +inf, or are all -inf, makes NaN of the flows that use it; any other
    -inf logit is a weight of 0. A NaN map row also makes NaN of the gradients of its query and of all keys, in its own
    frame and in the frames it is paired with, and of no others.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what came and what is expected.
        RuntimeError: the implementation asked for by ``impl`` can't run here; the message says why.
    """
    if num_frames is not None:
        q, k = clips_of("q", q, num_frames), clips_of("k", k, num_frames)
        lse = clips_of("lse", lse, num_frames, dims=(3, 4))
    return _flow(
        impl,
        {"q": q, "k": k, "lse": lse},
        {
            "scale": scale, "lag": lag, "temperature": temperature, "head_reduction": head_reduction,
            "center": center, "out_dtype": out_dtype,
        },
    )  # fmt: skip


@on_shards()
def am_flow_pair(
    q_a: Tensor,
    k_a: Tensor,
    q_b: Tensor,
    k_b: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    head_reduction: HeadReduction = "none",
    center: bool = False,
    out_dtype: torch.dtype | None = None,
    lse_a: Tensor | None = None,
    lse_b: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """AM flow of explicit frame pairs: frames aligned to each other, or streamed one by one.

    ``flow[p] = softmax_keys(|A_a[p] - A_b[p]| / temperature).T @ 1`` with the attention maps A_a of (q_a, k_a) and A_b
    of (q_b, k_b). Options, precision, NaN rule, DTensors, errors and source are those of `am_flow`. There is no
    `num_frames`: dimension 1 counts pairs, which no image model has.

    Args:
        q_a, q_b: queries of the two frames of each pair, (B, P, *G, Nq, D).
        k_a, k_b: keys of the two frames of each pair, (B, P, *G, Nk, D).
        lse_a, lse_b: the rows' log-sum-exps of the first and the second maps, (B, P, *G, Nq), as for `am_flow`.

    Returns:
        float32 (float64 for float64 inputs) or `out_dtype`, contiguous: (B, P, *G, Nk), or (B, P, *G[1:], Nk) with a
        head reduction. Differentiable once with respect to all four inputs.
    """
    _require_second_frames(q_b, k_b)
    return _flow(
        impl, {"q": q_a, "k": k_a, "q_b": q_b, "k_b": k_b, "lse": lse_a, "lse_b": lse_b},
        {
            "scale": scale, "temperature": temperature, "head_reduction": head_reduction, "center": center,
            "out_dtype": out_dtype,
        },
    )  # fmt: skip


@on_shards()
def am_flow_matmul(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    *,
    num_frames: int | None = None,
    transpose: bool = False,
    softmax: bool = False,
    scale: float | None = None,
    lag: int = 1,
    temperature: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """The motion operator of a clip times token features: M x, M^T x, P x or P^T x, with M and P never formed.

    With ``A[t] = softmax_keys(scale * q[t] @ k[t].T)``:

        M[t] = |A[t] - A[t + lag]|                        t = 0 .. T - lag - 1
        P[t] = softmax_keys(M[t] / temperature)

    With x of ones, M x says how much each query's attention changes, M^T x how much the attention to each key changes,
    and P^T x is `am_flow`. A few products with random x give the leading components of M (randomised SVD). For equal
    frames M x is 0 and P x is the mean of x over the keys. All arithmetic is float32 or better, autocast has no effect,
    and memory grows with N, not with N * N.

    M and P are defined in the paper that `am_flow` cites; the operator is ours. docs/maths.md derives the gradient.

    Args:
        q, k, num_frames, scale, lag, impl: as for `am_flow`; DTensors, too.
        x: features of the keys, (B, T - lag, *G, Nk, C), or transposed of the queries, (B, T - lag, *G, Nq, C), also
            with `num_frames`, since they belong to pairs; C from 1 to 256. float32 or the dtype of q. Any strides with
            a contiguous last dimension.
        transpose: multiply by the transpose of the operator.
        softmax: the operator is P instead of M.
        temperature: divides the change before the second softmax, at least 1/64; only with `softmax`.

    Returns:
        float32 (float64 for float64 q), contiguous: (B, T - lag, *G, Nq, C), or transposed (B, T - lag, *G, Nk, C).
        Differentiable once with respect to q, k and x.

    A map row whose logits contain NaN or +inf, or are all -inf, makes NaN of the results that use it: its own row, or
    transposed all rows of its pair. Any other -inf logit is a weight of 0.

    Raises:
        TypeError, ValueError, RuntimeError: as `am_flow`.
    """
    if num_frames is not None:
        q, k = clips_of("q", q, num_frames), clips_of("k", k, num_frames)
    return _product(
        impl, {"q": q, "k": k, "x": x},
        {"scale": scale, "lag": lag, "temperature": temperature, "transpose": transpose, "softmax": softmax},
    )  # fmt: skip


@on_shards()
def am_flow_matmul_pair(
    q_a: Tensor,
    k_a: Tensor,
    q_b: Tensor,
    k_b: Tensor,
    x: Tensor,
    *,
    transpose: bool = False,
    softmax: bool = False,
    scale: float | None = None,
    temperature: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """The motion operator of explicit frame pairs times token features, as `am_flow_matmul` describes it.

    ``M[p] = |A_a[p] - A_b[p]|`` with the attention maps A_a of (q_a, k_a) and A_b of (q_b, k_b).

    Args:
        q_a, q_b: queries of the two frames of each pair, (B, P, *G, Nq, D).
        k_a, k_b: keys of the two frames of each pair, (B, P, *G, Nk, D).
        x: features, (B, P, *G, Nk, C), or transposed (B, P, *G, Nq, C).

    Returns:
        float32 (float64 for float64 q), contiguous: (B, P, *G, Nq, C), or transposed (B, P, *G, Nk, C).
        Differentiable once with respect to all five inputs.
    """
    _require_second_frames(q_b, k_b)
    return _product(
        impl, {"q": q_a, "k": k_a, "q_b": q_b, "k_b": k_b, "x": x},
        {"scale": scale, "temperature": temperature, "transpose": transpose, "softmax": softmax},
    )  # fmt: skip


def _require_second_frames(q_b: Tensor, k_b: Tensor) -> None:
    """Raises if a second frame is None, which a `Problem` would take for a clip."""
    for name, value in (("q_b", q_b), ("k_b", k_b)):
        if value is None:
            raise TypeError(f"{name}: expected a torch.Tensor, got NoneType")


def _flow(impl: str | None, tensors: dict[str, Any], options: dict[str, Any]) -> Tensor:
    problem, chosen = problem_of(Problem, impl, tensors, options)
    flow = ops.flow(problem, impl, chosen)
    return flow if problem.out_dtype is None else flow.to(problem.out_dtype)


def _product(impl: str | None, tensors: dict[str, Any], options: dict[str, Any]) -> Tensor:
    problem, chosen = problem_of(MatmulProblem, impl, tensors, options)
    return ops.product(problem, impl, chosen)
