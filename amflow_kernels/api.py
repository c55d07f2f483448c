"""The public functions: a problem out of the arguments, then one op call."""

from __future__ import annotations

from torch import Tensor

from amflow_kernels import ops
from amflow_kernels.dispatch import check_impl, explain
from amflow_kernels.problem import MatmulProblem, Problem

__all__ = ["am_flow", "am_flow_matmul", "am_flow_matmul_pair", "am_flow_pair", "explain"]


def am_flow(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lag: int = 1,
    temperature: float = 1.0,
    head_reduction: str = "none",
    center: bool = False,
    lse: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """AM flow of a clip: how much each key token's attention changes from frame t to frame t + lag.

    With ``A[t] = softmax_keys(scale * q[t] @ k[t].T)``::

        flow[t] = softmax_keys(|A[t] - A[t + lag]| / temperature).T @ 1        t = 0 .. T - lag - 1

    Every flow sums to Nq over its Nk tokens; equal frames give exactly Nq / Nk everywhere. The maps are never formed,
    all arithmetic is float32 or better, and autocast has no effect.

    Source: Agrawal, Ali, Dantcheva, Bremond, "AM Flow: Adapters for Temporal Processing in Action Recognition",
    arXiv 2411.02065 (there: lag = 1, temperature = 1).

    Args:
        q: queries, (B, T, *G, Nq, D): T frames, G = (heads,) or (heads, windows), D from 1 to 256. float32,
            bfloat16, float16, or float64 (which plain PyTorch computes). Any strides with a contiguous last
            dimension: views of a fused qkv are read in place. A ViT that folds frames into the batch passes
            ``q.unflatten(0, (B, T))``.
        k: keys, (B, T, *G, Nk, D), dtype and device of q.
        scale: factor on the logits; None means D ** -0.5.
        lag: distance in frames of the two maps that are compared, at least 1.
        temperature: divides the change before the second softmax, at least 1/64.
        head_reduction: ``"none"`` (a flow per head), ``"mean"`` (mean of the heads' flows) or ``"mean_map"``
            (flow of the head-averaged maps).
        center: return ``flow - Nq / Nk``, computed without the cancellation: the flow of real clips is
            Nq / Nk plus a signal of 1e-4 to 1e-2, and only the centred form keeps full relative precision.
        lse: the rows' log-sum-exps, ``logsumexp(scale * q @ k.mT, -1)``: natural logarithm, float32, (B, T, *G, Nq),
            as flash attention of the same q, k and scale returns it, from products of the same precision. It is not
            checked and takes no gradient. The tiled Triton kernels save a pass with it. Implementations that would
            gain nothing compute their own, and so do all where gradients of q or k are needed: the gradients of peaked
            maps need row sums to the last digit.
        impl: None picks by device; ``"reference"``, ``"chunked"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` runs that
            implementation or raises. Where no kernel can run, None takes ``"chunked"``, plain PyTorch by blocks of
            query rows in 64 MB besides inputs and results, and warns. ``"reference"`` forms the maps. ``"cuda"``: at
            most 640 tokens and a head dimension of at most 128; ``"triton"`` makes its gradients.

    Returns:
        float32 (float64 for float64 inputs), contiguous: (B, T - lag, *G, Nk), or (B, T - lag, *G[1:], Nk) with a
        head reduction. Differentiable once with respect to q and k, also through `torch.vmap`; forward mode and
        gradients by transforms of `torch.func` raise.

    A map row whose logits contain NaN or +inf, or are all -inf, makes NaN of the flows that use it; any other
    -inf logit is a weight of 0. A NaN map row also makes NaN of the gradients of its query and of all keys, in its own
    frame and in the frames it is paired with, and of no others.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what came and what is expected.
        RuntimeError: the implementation asked for by ``impl`` can't run here; the message says why.
    """
    problem = Problem(
        q, k, scale=scale, lag=lag, temperature=temperature, head_reduction=head_reduction, center=center, lse=lse
    )
    return _flow(problem, impl)


def am_flow_pair(
    q_a: Tensor,
    k_a: Tensor,
    q_b: Tensor,
    k_b: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    head_reduction: str = "none",
    center: bool = False,
    lse_a: Tensor | None = None,
    lse_b: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """AM flow of explicit frame pairs: frames aligned to each other, or streamed one by one.

    ``flow[p] = softmax_keys(|A_a[p] - A_b[p]| / temperature).T @ 1`` with the attention maps A_a of (q_a, k_a) and A_b
    of (q_b, k_b). Options, precision, NaN rule, errors and source are those of `am_flow`.

    Args:
        q_a, q_b: queries of the two frames of each pair, (B, P, *G, Nq, D).
        k_a, k_b: keys of the two frames of each pair, (B, P, *G, Nk, D).
        lse_a, lse_b: the rows' log-sum-exps of the first and the second maps, (B, P, *G, Nq), as for `am_flow`.

    Returns:
        float32 (float64 for float64 inputs), contiguous: (B, P, *G, Nk), or (B, P, *G[1:], Nk) with a head
        reduction. Differentiable once with respect to all four inputs.
    """
    _require_second_frames(q_b, k_b)
    problem = Problem(
        q_a, k_a, q_b=q_b, k_b=k_b, scale=scale, temperature=temperature, head_reduction=head_reduction,
        center=center, lse=lse_a, lse_b=lse_b,
    )  # fmt: skip
    return _flow(problem, impl)


def am_flow_matmul(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    *,
    transpose: bool = False,
    softmax: bool = False,
    scale: float | None = None,
    lag: int = 1,
    temperature: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """The motion operator of a clip times token features: M x, M^T x, P x or P^T x, with M and P never formed.

    With ``A[t] = softmax_keys(scale * q[t] @ k[t].T)``::

        M[t] = |A[t] - A[t + lag]|                        t = 0 .. T - lag - 1
        P[t] = softmax_keys(M[t] / temperature)

    With x of ones, M x says how much each query's attention changes, M^T x how much the attention to each key changes,
    and P^T x is `am_flow`. A few products with random x give the leading components of M (randomised SVD). For equal
    frames M x is 0 and P x is the mean of x over the keys. All arithmetic is float32 or better, autocast has no effect,
    and memory grows with N, not with N * N.

    M and P are defined in the paper that `am_flow` cites; the operator is ours. docs/maths.md derives the gradient.

    Args:
        q, k, scale, lag, impl: as for `am_flow`.
        x: features of the keys, (B, T - lag, *G, Nk, C), or transposed of the queries, (B, T - lag, *G, Nq, C); C from
            1 to 256. float32 or the dtype of q. Any strides with a contiguous last dimension.
        transpose: multiply by the transpose of the operator.
        softmax: the operator is P instead of M.
        temperature: divides the change before the second softmax, at least 1/64; only with `softmax`.

    Returns:
        float32 (float64 for float64 q), contiguous: (B, T - lag, *G, Nq, C), or transposed (B, T - lag, *G, Nk, C).
        Differentiable once with respect to q, k and x.

    A map row whose logits contain NaN or +inf, or are all -inf, makes NaN of the results that use it: its own row, or
    transposed all rows of its pair. Any other -inf logit is a weight of 0.

    Raises:
        As `am_flow`.
    """
    problem = MatmulProblem(
        q, k, x=x, scale=scale, lag=lag, temperature=temperature, transpose=transpose, softmax=softmax
    )
    return _product(problem, impl)


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
    impl: str | None = None,
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
    problem = MatmulProblem(
        q_a, k_a, q_b=q_b, k_b=k_b, x=x, scale=scale, temperature=temperature, transpose=transpose, softmax=softmax
    )
    return _product(problem, impl)


def _require_second_frames(q_b: Tensor, k_b: Tensor) -> None:
    """Raises if a second frame is None, which a `Problem` would take for a clip."""
    for name, value in (("q_b", q_b), ("k_b", k_b)):
        if value is None:
            raise TypeError(f"{name}: expected a torch.Tensor, got NoneType")


def _flow(problem: Problem, impl: str | None) -> Tensor:
    check_impl(impl, problem)
    flow, _ = ops.am_flow(
        *problem.frames, problem.lse, problem.lse_b, problem.logit_scale, problem.shift, float(problem.temperature),
        problem.head_reduction, problem.center, impl,
    )  # fmt: skip
    return flow


def _product(problem: MatmulProblem, impl: str | None) -> Tensor:
    check_impl(impl, problem)
    return ops.am_flow_matmul(
        *problem.frames, problem.x, problem.logit_scale, problem.shift, float(problem.temperature),
        problem.transpose, problem.softmax, impl,
    )  # fmt: skip
