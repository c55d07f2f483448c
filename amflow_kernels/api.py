"""The public functions: every check of the input, then one op call."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from amflow_kernels import matmul_ops, ops
from amflow_kernels.matmul_ops import MAX_FEATURES
from amflow_kernels.ops import HEAD_REDUCTIONS, MAX_HEAD_DIM, MIN_TEMPERATURE, check_impl, explain

__all__ = ["am_flow", "am_flow_matmul", "am_flow_matmul_pair", "am_flow_pair", "explain"]

_LARGEST = sys.float_info.max
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    Every flow sums to Nq over its Nk tokens; frames that do not differ give exactly Nq / Nk everywhere. The maps
    are never formed, all arithmetic is float32 or better, and autocast has no effect.

    Source: Agrawal, Ali, Dantcheva, Bremond, "AM Flow: Adapters for Temporal Processing in Action Recognition",
    arXiv 2411.02065 (there: lag = 1, temperature = 1).

    Args:
        q: queries, (B, T, *G, Nq, D): T frames, G = (heads,) or (heads, windows), D from 1 to 256. float32,
            bfloat16, float16, or float64 (which the reference computes). Any strides with a contiguous last
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
            checked and takes no gradient. The tiled Triton kernels save a pass with it; implementations that would
            gain nothing, or lose precision, make their own.
        impl: None picks by device; ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` runs just that, or
            raises. ``"cuda"``: at most 640 tokens and a head dimension of at most 128.

    Returns:
        float32 (float64 for float64 inputs), contiguous: (B, T - lag, *G, Nk), or (B, T - lag, *G[1:], Nk) with a
        head reduction. Differentiable once with respect to q and k.

    A map row whose logits contain NaN or +inf, or are all -inf, makes NaN of the flows that use it; any other
    -inf logit is a weight of 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what came and what is expected.
        RuntimeError: the implementation asked for by ``impl`` can't run here; the message says why.
    """
    check_clip(q, k, lag)
    _check_lse(lse, q, "lse", "q")
    return _call(q, k, None, None, lse, None, scale, lag, temperature, head_reduction, center, impl)


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
        lse_a, lse_b: the rows' log-sum-exps of either, (B, P, *G, Nq), as `am_flow` describes them.

    Returns:
        float32 (float64 for float64 inputs), contiguous: (B, P, *G, Nk), or (B, P, *G[1:], Nk) with a head
        reduction. Differentiable once with respect to all four inputs.
    """
    _check_pairs(q_a, k_a, q_b, k_b)
    _check_lse(lse_a, q_a, "lse_a", "q_a")
    _check_lse(lse_b, q_b, "lse_b", "q_b")
    return _call(q_a, k_a, q_b, k_b, lse_a, lse_b, scale, 0, temperature, head_reduction, center, impl)


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

    M x of ones is how much each query's attention changes, M^T x of ones how much that to each key does, and P^T x of
    ones is `am_flow`. A few products with random x give the leading components of M (randomised SVD). Frames that do
    not differ give M x = 0 and the mean of x over the keys for P x. All arithmetic is float32 or better, autocast has
    no effect, and memory grows with N, not with N * N.

    M and P are those of the paper that `am_flow` names; the operator is not in it. docs/maths.md derives the gradient.

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
    check_clip(q, k, lag)
    return _call_matmul(q, k, None, None, x, scale, lag, temperature, transpose, softmax, impl)


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
    _check_pairs(q_a, k_a, q_b, k_b)
    return _call_matmul(q_a, k_a, q_b, k_b, x, scale, 0, temperature, transpose, softmax, impl)


def _call(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    lse: Tensor | None,
    lse_b: Tensor | None,
    scale: float | None,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    impl: str | None,
) -> Tensor:
    scale, temperature = check_options(q, scale, temperature, head_reduction, center, impl)
    check_impl(impl, q, k)
    flow, _ = ops.am_flow(q, k, q_b, k_b, lse, lse_b, scale, lag, temperature, head_reduction, center, impl)
    return flow


def check_options(
    q: Tensor, scale: float | None, temperature: float, head_reduction: str, center: bool, impl: str | None
) -> tuple[float, float]:
    """Scale and temperature as numbers; raises unless all options are as documented."""
    scale = q.shape[-1] ** -0.5 if scale is None else _check_number("scale", scale)
    temperature = _check_temperature(temperature)
    if head_reduction not in HEAD_REDUCTIONS:
        raise ValueError(f"head_reduction: expected one of {HEAD_REDUCTIONS}, got {head_reduction!r}")
    _check_bool("center", center)
    check_impl(impl, q)
    return scale, temperature


def _call_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float | None,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    impl: str | None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else _check_number("scale", scale)
    temperature = _check_temperature(temperature)
    _check_bool("transpose", transpose)
    _check_bool("softmax", softmax)
    if temperature != 1 and not softmax:
        raise ValueError(f"temperature: expected 1 without softmax=True (M has none), got {temperature}")
    _check_features(x, q, k, lag, transpose)
    if impl == "cuda":
        raise ValueError("impl='cuda': the CUDA kernels have no products with the motion operator; 'triton' has")
    check_impl(impl, q)
    return matmul_ops.am_flow_matmul(q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax, impl)


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _check_temperature(value: float) -> float:
    temperature = _check_number("temperature", value)
    if temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature: expected at least 1/64 (below it the second softmax overflows), got {temperature}"
        )
    return temperature


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -_LARGEST <= value <= _LARGEST:  # math.isfinite does not trace when the number is symbolic
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def check_frames(q: Tensor, k: Tensor, q_name: str, k_name: str) -> None:
    for name, value in ((q_name, q), (k_name, k)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.dim() not in (5, 6):
            raise ValueError(
                f"{name}: expected (B, T, heads, N, D) or (B, T, heads, windows, N, D), "
                f"got {value.dim()} dimensions: {tuple(value.shape)}"
            )
        if any(size == 0 for size in value.shape[2:-2]):
            raise ValueError(f"{name}: expected at least one head and window, got shape {tuple(value.shape)}")
        if value.shape[-2] == 0:
            raise ValueError(f"{name}: expected at least one token (dimension -2), got shape {tuple(value.shape)}")
        if not 1 <= value.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: expected a head dimension (the last) from 1 to {MAX_HEAD_DIM}, got {value.shape[-1]}"
            )
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, got strides {tuple(value.stride())}; "
                "call .contiguous() on it"
            )
    check_same(k_name, k, q_name, q)
    if q.dim() != k.dim():
        raise ValueError(f"{k_name}: expected {q.dim()} dimensions as {q_name}, got {k.dim()}: {tuple(k.shape)}")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{k_name}: expected the shape of {q_name} but for the tokens (dimension -2), "
            f"{tuple(q.shape)}, got {tuple(k.shape)}"
        )


def check_clip(q: Tensor, k: Tensor, lag: int) -> None:
    check_frames(q, k, "q", "k")
    if not isinstance(lag, int) or isinstance(lag, bool):
        raise TypeError(f"lag: expected an int, got {type(lag).__name__}")
    if lag < 1:
        raise ValueError(f"lag: expected at least 1, got {lag}")
    if q.shape[1] <= lag:
        raise ValueError(f"q: expected more frames (dimension 1) than lag = {lag}, got T = {q.shape[1]}")


def _check_pairs(q_a: Tensor, k_a: Tensor, q_b: Tensor, k_b: Tensor) -> None:
    check_frames(q_a, k_a, "q_a", "k_a")
    check_frames(q_b, k_b, "q_b", "k_b")
    for name, value, other_name, other in (("q_b", q_b, "q_a", q_a), ("k_b", k_b, "k_a", k_a)):
        check_same(name, value, other_name, other)
        if value.shape != other.shape:
            raise ValueError(
                f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}"
            )


def _check_features(x: Tensor, q: Tensor, k: Tensor, lag: int, transpose: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"x: expected float32 or the dtype of q, {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"x: expected the device of q, {q.device}, got {x.device}")
    side, tokens = ("queries", q.shape[-2]) if transpose else ("keys", k.shape[-2])
    rows = (q.shape[0], q.shape[1] - lag, *q.shape[2:-2], tokens)
    if x.dim() != q.dim() or x.shape[:-1] != rows:
        raise ValueError(
            f"x: expected features of the {side} of every pair, ({', '.join(map(str, rows))}, C), got {tuple(x.shape)}"
        )
    if not 1 <= x.shape[-1] <= MAX_FEATURES:
        raise ValueError(f"x: expected from 1 to {MAX_FEATURES} features (the last dimension), got {x.shape[-1]}")
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        raise ValueError(
            f"x: expected a contiguous last dimension, got strides {tuple(x.stride())}; call .contiguous() on it"
        )


def _check_lse(lse: Tensor | None, q: Tensor, name: str, q_name: str) -> None:
    if lse is None:
        return
    if not isinstance(lse, Tensor):
        raise TypeError(f"{name}: expected None or a torch.Tensor, got {type(lse).__name__}")
    if lse.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {lse.dtype}")
    if lse.device != q.device:
        raise ValueError(f"{name}: expected the device of {q_name}, {q.device}, got {lse.device}")
    if lse.shape != q.shape[:-1]:
        raise ValueError(
            f"{name}: expected one number for each row of {q_name}, without padding, {tuple(q.shape[:-1])}, "
            f"got {tuple(lse.shape)}"
        )
