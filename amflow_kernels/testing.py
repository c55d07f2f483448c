"""Inputs, the float64 oracle and the error budgets of this project, for its tests and benchmarks and for yours.

The oracle is the reference implementation in float64 on the very same (already rounded) inputs, gradients by autograd
through its forward. The budgets are promises: `flow_budget`, `centred_budget`, `matmul_budget` and `grad_budget` say
how far any implementation may be from the oracle, and `assert_flow`, `assert_centred`, `assert_matmul` and
`assert_grads` hold it to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from amflow_kernels.api import am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair
from amflow_kernels.impl import reference
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

LAYOUTS = ("contiguous", "fused_qkv", "offset", "tokens_first", "shared_keys")
EPS = 2.0**-23  # of float32
TIE = 4e-6  # maps closer than this, relatively, have a difference whose sign no float32 computation can know

_HEADS = 2  # dimension of the heads in (B, T, heads, ...)
_REFERENCE = reference.Reference()

AnyProblem = TypeVar("AnyProblem", Problem, MatmulProblem)


def make_qk(
    B: int,
    T: int,
    groups: Sequence[int],
    Nq: int,
    Nk: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    frame_step: float = 0.2,
    logit_std: float = 1.0,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """q (B, T, *groups, Nq, D) and k (B, T, *groups, Nk, D) of a synthetic clip, rounded to `dtype`.

    Every frame is one random base frame plus its own noise. Any two frames differ by `frame_step` standard
    deviations of the base frame, and the logits have a standard deviation of `logit_std` at the default scale.

    Layouts (memory that belongs to neither q nor k is NaN, so reading it shows):
        contiguous: two tensors of their own.
        fused_qkv: views of one (B*T, N, 3, heads, D) projection as timm makes it, or of the (B*T, N, windows, 3,
            heads, D) one of Hiera; needs Nq == Nk.
        offset: rows of D elements at a pitch of D + 3, the first at an odd storage offset.
        tokens_first: stored as (N, *reversed(groups), T, B, D).
        shared_keys: all heads share the keys of the first, with stride 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def clip(N: int) -> Tensor:
        base = torch.randn(B, 1, *groups, N, D, generator=generator)
        noise = torch.randn(B, T, *groups, N, D, generator=generator)
        frames = base + frame_step * 0.5**0.5 * noise
        return (logit_std**0.5 * frames).to(device=device, dtype=dtype)

    q, k = clip(Nq), clip(Nk)
    if layout == "contiguous":
        return q, k
    if layout == "fused_qkv":
        return _fused_qkv(q, k)
    if layout == "offset":
        return _offset(q), _offset(k)
    if layout == "tokens_first":
        return _tokens_first(q), _tokens_first(k)
    if layout == "shared_keys":
        return q, k[:, :, :1].expand_as(k)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def _fused_qkv(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape != k.shape:
        raise ValueError(f"layout='fused_qkv': expected Nq == Nk, got {q.shape[-2]} and {k.shape[-2]}")
    B, T, heads, *windows, N, D = q.shape
    qkv = q.new_full((B * T, N, *windows, 3, heads, D), float("nan"))
    order = (2, 0, 3, 1, 4) if not windows else (3, 0, 4, 2, 1, 5)
    views = qkv.permute(order).unflatten(1, (B, T))  # (3, B, T, heads, *windows, N, D)
    views[0], views[1] = q, k
    return views[0], views[1]


def _offset(x: Tensor) -> Tensor:
    *lead, D = x.shape
    rows = x.numel() // D
    view = x.new_full((1 + rows * (D + 3),), float("nan"))[1:].view(*lead, D + 3)[..., :D]
    return view.copy_(x)


def _tokens_first(x: Tensor) -> Tensor:
    order = (*reversed(range(x.dim() - 1)), x.dim() - 1)  # its own inverse
    return x.permute(order).contiguous().permute(order)


def make_dflow(
    shape: Sequence[int],
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """A gradient dL/dflow of the given shape (..., Nk), of standard deviation Nk: that keeps the gradients of q and k
    out of the subnormal numbers of float16.

    Layouts: contiguous; expanded (the same for every batch item, pair and group, stride 0); transposed (tokens
    outermost).
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    if layout == "contiguous":
        x = torch.randn(*shape, generator=generator)
    elif layout == "expanded":
        x = torch.randn(shape[-1], generator=generator)
    elif layout == "transposed":
        x = torch.randn(*reversed(shape), generator=generator).permute(*reversed(range(len(shape))))
    else:
        raise ValueError(f"layout: expected contiguous, expanded or transposed, got {layout!r}")
    return (shape[-1] * x).to(device=device, dtype=dtype).expand(*shape)


def make_features(
    q: Tensor,
    k: Tensor,
    C: int,
    *,
    lag: int,
    transpose: bool = False,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """Features x of standard deviation 1 for the motion operator: (B, P, *G, Nk, C), or (B, P, *G, Nq, C) transposed.

    lag is 0 for the pair form. Layouts: contiguous; offset; tokens_first (both as for `make_qk`); shared (the same
    features for all heads, stride 0).
    """
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    shape = (q.shape[0], q.shape[1] - lag, *q.shape[2:-2], (q if transpose else k).shape[-2], C)
    x = torch.randn(shape, generator=generator).to(device=q.device, dtype=dtype)
    if layout == "contiguous":
        return x
    if layout == "offset":
        return _offset(x)
    if layout == "tokens_first":
        return _tokens_first(x)
    if layout == "shared":
        return x[:, :, :1].expand_as(x)
    raise ValueError(f"layout: expected contiguous, offset, tokens_first or shared, got {layout!r}")


def run(problem: MapPairs, impl: str | None = None) -> Tensor:
    """The public function that a problem is a call of."""
    matmul = isinstance(problem, MatmulProblem)
    tensors = ("q", "k", "q_b", "k_b", "x")
    names = [field.name for field in fields(problem) if field.init and field.name not in tensors]
    options: dict[str, Any] = {name: getattr(problem, name) for name in names}
    function: Callable[..., Tensor] = am_flow_matmul if matmul else am_flow
    if problem.pair:
        function = am_flow_matmul_pair if matmul else am_flow_pair
        del options["lag"]
    if not matmul:
        lse, lse_b = options.pop("lse"), options.pop("lse_b")
        options |= {"lse_a": lse, "lse_b": lse_b} if problem.pair else {"lse": lse}
    return function(*inputs_of(problem), impl=impl, **options)


def inputs_of(problem: MapPairs) -> tuple[Tensor, ...]:
    """The differentiable tensors of a problem: q, k, in pair form q_b, k_b, and features x."""
    features = (problem.x,) if isinstance(problem, MatmulProblem) else ()
    return tuple(x for x in (*problem.frames, *features) if x is not None)


def with_inputs(problem: AnyProblem, inputs: Sequence[Tensor]) -> AnyProblem:
    """The same problem of other tensors, in the order of `inputs_of`."""
    names = [
        "q",
        "k",
        *(["q_b", "k_b"] if problem.pair else []),
        *(["x"] if isinstance(problem, MatmulProblem) else []),
    ]
    changes: dict[str, Any] = dict(zip(names, inputs, strict=True))
    return replace(problem, **changes)


def oracle_flow(problem: Problem) -> Tensor:
    """The exact flow, centred if the problem says so: the reference in float64."""
    with torch.no_grad():
        return _REFERENCE.forward(_double(problem))[0]


def oracle_grads(problem: Problem, dflow: Tensor) -> tuple[Tensor, ...]:
    """The exact gradients of q, k (and q_b, k_b) for dflow = dL/dflow: autograd through the reference in float64."""
    problem = _double(replace(problem, center=True))
    inputs = [x.requires_grad_() for x in inputs_of(problem)]
    return torch.autograd.grad(_REFERENCE.forward(problem)[0], inputs, dflow.double())


def grad_tie(problem: Problem, dflow: Tensor) -> tuple[Tensor, ...]:
    """How far ties can move the gradients of q, k (and q_b, k_b), elementwise: an upper bound, as large as they are.

    The gradient holds the sign of A[t] - A[t + lag] (of the head-averaged maps for "mean_map"). Where the two agree to
    `TIE` no float32 computation can know it, and a wrong sign moves that entry's share of the gradient by up to
    twice its size. This is that share, built from |dlogits|, |q| and |k| so that no two entries cancel.
    """
    return _absolute_grads(problem, dflow, ties_only=True)


def grad_magnitude(problem: Problem, dflow: Tensor) -> tuple[Tensor, ...]:
    """The gradients as if nothing in them cancelled, the measure of error where nearly all of it does.

    The exact gradient is zero for two keys (both move by the same amount, so the flow is constant) and for a dflow that
    is constant over the keys, such as that of ``flow.sum()`` (the flow sums to Nq whatever the input), and nearly zero
    where rows of a map, or of P, are one key's.
    """
    return _absolute_grads(problem, dflow, ties_only=False)


def _absolute_grads(problem: Problem, dflow: Tensor, *, ties_only: bool) -> tuple[Tensor, ...]:
    problem = _double(problem)
    A_a, A_b = reference.pair_maps(problem)
    g = dflow.double()
    M_a, M_b = A_a, A_b
    if problem.head_reduction != "none":
        g = g.unsqueeze(_HEADS) / problem.heads
    if problem.head_reduction == "mean_map":
        M_a, M_b = A_a.mean(_HEADS, keepdim=True), A_b.mean(_HEADS, keepdim=True)
    M = (M_a - M_b).abs()
    P = torch.softmax(M / problem.temperature, dim=-1)
    g = g.unsqueeze(-2)
    if ties_only:
        dM = 2 * (torch.maximum(M_a, M_b) * TIE >= M) * P * (g - (P * g).sum(-1, keepdim=True)).abs()
    else:
        dM = P * (g.abs() + (P * g.abs()).sum(-1, keepdim=True))
    dM = (dM / problem.temperature).expand_as(A_a)
    return _absolute_maps_backward(problem, dM, ties_only=ties_only)


def _absolute_maps_backward(problem: MapPairs, dM: Tensor, *, ties_only: bool) -> tuple[Tensor, ...]:
    """Upper bounds of dq, dk (dq_b, dk_b) for gradients dM >= 0 of |A[t] - A[t + lag]|."""
    scale = problem.logit_scale

    def map_backward(q: Tensor, k: Tensor, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
        rho = (A * dA).sum(-1, keepdim=True)
        if ties_only:  # |dA_j - sum_l A_l dA_l| <= (1 - A_j) |dA_j| + sum of A_l |dA_l| over l != j
            rho = rho - 2 * A * dA
        dlogits = abs(scale) * A * (dA + rho)
        return dlogits @ k.abs(), dlogits.mT @ q.abs()

    q, k, q_b, k_b = problem.frames
    A = reference.attention_maps(q, k, scale)
    if q_b is not None and k_b is not None:
        A_b = reference.attention_maps(q_b, k_b, scale)
        return *map_backward(q, k, A, dM), *map_backward(q_b, k_b, A_b, dM)
    dA = torch.zeros_like(A)
    dA[:, : -problem.lag] += dM
    dA[:, problem.lag :] += dM
    return map_backward(q, k, A, dA)


def oracle_matmul(problem: MatmulProblem) -> Tensor:
    """The exact motion operator times x: the reference in float64."""
    with torch.no_grad():
        return _REFERENCE.matmul(_double(problem))


def oracle_matmul_grads(problem: MatmulProblem, dy: Tensor) -> tuple[Tensor, ...]:
    """The exact gradients of q, k (and q_b, k_b) for dy = dL/dy: autograd through the reference in float64.

    The gradient of x is the transposed product with dy, for which `oracle_matmul` and `matmul_budget` serve.
    """
    problem = _double(problem)
    inputs = [f.requires_grad_() for f in problem.frames if f is not None]
    return torch.autograd.grad(_REFERENCE.matmul(problem), inputs, dy.double())


def matmul_tie(problem: MatmulProblem, dy: Tensor) -> tuple[Tensor, ...]:
    """`grad_tie` for the motion operator: how far ties can move the gradients of q, k (and q_b, k_b), elementwise."""
    return _absolute_matmul_grads(problem, dy, ties_only=True)


def matmul_magnitude(problem: MatmulProblem, dy: Tensor) -> tuple[Tensor, ...]:
    """`grad_magnitude` for the motion operator: its gradients as if nothing in them cancelled."""
    return _absolute_matmul_grads(problem, dy, ties_only=False)


def _absolute_matmul_grads(problem: MatmulProblem, dy: Tensor, *, ties_only: bool) -> tuple[Tensor, ...]:
    problem, dy = _double(problem), dy.double()
    A_a, A_b = reference.pair_maps(problem)
    u, v = (problem.x, dy) if problem.transpose else (dy, problem.x)
    dM = u @ v.mT if ties_only else u.abs() @ v.abs().mT
    M = (A_a - A_b).abs()
    if problem.softmax:
        P = torch.softmax(M / problem.temperature, dim=-1)
        rowsum = (P * dM).sum(-1, keepdim=True)
        dM = P * ((dM - rowsum) if ties_only else (dM + rowsum)) / problem.temperature
    if ties_only:
        dM = 2 * (torch.maximum(A_a, A_b) * TIE >= M) * dM.abs()
    return _absolute_maps_backward(problem, dM, ties_only=ties_only)


def matmul_budget(problem: MatmulProblem) -> Tensor:
    """Largest error that every element of the motion operator times x may have, whatever the dtypes of the input.

    An element of the result is a sum over n entries of the operator times x. To first order, in units of `EPS`:

    - a logit is off by L = |scale| |q|.|k|, its terms as if none cancelled, or, if few do, by a random walk as below,
      sqrt(D) / 2 of the logit; its exponential is off by 1 + L, relatively;
    - an entry of A, divided by the row's sum, by dA = A ((1 + L) + rowsum(A (1 + L))); below float32's normal numbers,
      which not every exponential and not every GPU can hold, it may be 0;
    - an entry of M by dM = dA[t] + dA[t + lag], however small M is: an absolute error, even where frames hardly differ;
    - P = w (1 + e) by P (dM + rowsum(P dM)) / temperature, and by the four roundings of w, w x and the last sum;
    - a chain of n additions by a random walk of n steps, which is more than sqrt(n) / 2 of the sum of |M x| or |w e x|,
      four standard deviations, once in 10^4 times. P = w (1 + e) is split so that the terms w x add no such error.
    """
    problem = _double(problem)
    scale, n = problem.logit_scale, problem.x.shape[-2]

    def map_error(q: Tensor, k: Tensor) -> Tensor:
        A = reference.attention_maps(q, k, scale)
        chain = q.shape[-1] ** 0.5 / 2 * (q @ k.mT).abs()
        relative = 1 + abs(scale) * torch.maximum(q.abs() @ k.abs().mT, chain)
        return A * (relative + (A * relative).sum(-1, keepdim=True)) + torch.finfo(torch.float32).smallest_normal / EPS

    q, k, q_b, k_b = problem.frames
    dA = map_error(q, k)
    dA_a, dA_b = dA[:, : problem.P], dA[:, problem.shift :]
    dM = dA_a + (dA_b if q_b is None or k_b is None else map_error(q_b, k_b))
    A_a, A_b = reference.pair_maps(problem)
    M = (A_a - A_b).abs()
    if problem.softmax:
        e = torch.expm1(M / problem.temperature)
        w = 1 / (1 + e).sum(-1, keepdim=True)
        P = w * (1 + e)
        error = P * (2 + (dM + (P * dM).sum(-1, keepdim=True)) / problem.temperature) + n**0.5 / 2 * w * e
    else:
        error = dM + n**0.5 / 2 * M
    return EPS * ((error.mT if problem.transpose else error) @ problem.x.abs())


def flow_budget(largest: float, temperature: float = 1.0, logit_error: float = 0.0) -> float:
    """Largest error a flow may have anywhere, whatever the input dtype, up to 4096 tokens; `largest` is its maximum.

    flow_j is the sum of P_ij over the queries. To first order, an error dM of the maps' change moves P_ij by about
    P_ij dM / temperature, and flow_j by flow_j dM / temperature. 5e-7 is granted for dM.

    That holds for logits of standard deviation up to 6 whose rounding errors average out over the queries. They do
    not where all queries are alike, or where one query makes most of a value (unrelated frames, low temperature).
    There, and for larger logits, a `logit_error` of d counts: A is off by A (1 - A) d, at most d / 4, and M by twice
    that.
    Shorter sums for the logits would cost more than 2 % of the time (csrc/cpu/product.h).
    """
    return (5e-7 + logit_error / 2) * max(1.0, largest) * max(1.0, 1 / temperature)


def logit_error(problem: MapPairs) -> float:
    """How far float32 may be off in a logit: `EPS` times the largest one whose terms all have the same sign."""
    pairs = ((problem.q, problem.k), (problem.q_b, problem.k_b))
    sums = [q.double().abs() @ k.double().abs().mT for q, k in pairs if q is not None and k is not None]
    return EPS * abs(problem.logit_scale) * max(s.max().item() for s in sums)


def centred_budget(frame_step: float) -> float:
    """Relative L2 error a centred flow may have if frames differ by `frame_step` standard deviations."""
    if frame_step >= 0.2:
        return 1e-5
    if frame_step >= 1e-3:
        return 1e-3
    raise ValueError(f"frame_step: no budget is promised below 1e-3, got {frame_step}")


def grad_budget(exact: Tensor, tie: Tensor, dtype: torch.dtype, magnitude: Tensor | None = None) -> float:
    """L2 error a gradient may have: `exact` from `oracle_grads`, `tie` from `grad_tie`, `dtype` of the input.

    `magnitude`, from `grad_magnitude` (the gradient as if none of its terms cancelled), takes over where the terms
    cancel to less than a fortieth, as with peaked maps at low temperatures. A term goes through some 16 roundings, each
    by at most `EPS` / 2: as a random walk 2 `EPS`, of which twice as much is granted.
    """
    norm = exact.norm().item()
    cancelled = 0.0 if magnitude is None else 4 * EPS * magnitude.norm().item()
    if dtype == torch.float32:
        return max(2e-5 * norm, cancelled) + tie.norm().item()
    rounding = (exact.to(dtype).double() - exact).norm().item()
    return 2 * rounding + max(1e-3 * norm, cancelled) + tie.norm().item()


def assert_flow(
    flow: Tensor, exact_centred: Tensor, Nq: int, *, temperature: float = 1.0, logit_error: float = 0.0
) -> None:
    """Raises AssertionError unless `flow` is within `flow_budget` of the exact one, given as its centred form."""
    base = Nq / exact_centred.shape[-1]
    _assert_like(flow, exact_centred)
    error = (flow.double() - base - exact_centred).abs().max().item()
    budget = flow_budget(base + exact_centred.max().item(), temperature, logit_error) if flow.numel() else 0
    assert error <= budget, f"flow is off by {error:.3g}, the budget is {budget:.3g}"


def assert_centred(
    centred: Tensor,
    exact_centred: Tensor,
    Nq: int,
    *,
    frame_step: float,
    temperature: float = 1.0,
    logit_error: float = 0.0,
) -> None:
    """Raises AssertionError unless `centred` is within `flow_budget` and `centred_budget` of the exact one.

    With two keys or one the exact result is zero, and only the first budget means anything.
    """
    Nk = exact_centred.shape[-1]
    _assert_like(centred, exact_centred)
    error = centred.double() - exact_centred
    largest = error.abs().max().item()
    budget = flow_budget(Nq / Nk + exact_centred.max().item(), temperature, logit_error)
    assert largest <= budget, f"centred flow is off by {largest:.3g}, the budget is {budget:.3g}"
    if Nk > 2:
        error_norm, norm = error.norm().item(), exact_centred.norm().item()
        share = centred_budget(frame_step) + logit_error / 2 * max(1.0, 1 / temperature)
        assert error_norm <= share * norm, (
            f"centred flow has an L2 error of {error_norm:.3g} on {norm:.3g}, the budget is {share:.3g} of it"
        )


def assert_matmul(y: Tensor, exact: Tensor, budget: Tensor) -> None:
    """Raises AssertionError unless every element of y is within `budget`, from `matmul_budget`, of the exact one.

    y may be the gradient of x, in whatever dtype x has: what rounding to that takes is granted too.
    """
    assert y.shape == exact.shape, f"the product is {tuple(y.shape)}, not {tuple(exact.shape)}"
    assert y.is_contiguous(), f"the product has strides {y.stride()}"
    info = torch.finfo(y.dtype)
    if y.dtype not in (torch.float32, torch.float64):
        budget = budget + info.eps / 2 * (exact.abs() + budget)
    budget = budget + info.smallest_normal * info.eps
    share = ((y.double() - exact).abs() / budget).nan_to_num(math.inf).where(y.double() != exact, 0).max().item()
    assert share <= 1, f"the product is off by {share:.3g} times the budget"


def assert_grads(
    grads: Sequence[Tensor | None],
    exact: Sequence[Tensor],
    tie: Sequence[Tensor],
    magnitude: Sequence[Tensor] | None = None,
) -> None:
    """Raises AssertionError unless every gradient is within `grad_budget`; those that are None are left out."""
    assert len(grads) == len(exact) == len(tie)
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        assert grad.shape == exact[i].shape, f"gradient {i} is {tuple(grad.shape)}, not {tuple(exact[i].shape)}"
        error = (grad.double() - exact[i]).norm().item()
        budget = grad_budget(exact[i], tie[i], grad.dtype, None if magnitude is None else magnitude[i])
        assert error <= budget, (
            f"gradient {i} has an L2 error of {error:.3g} on {exact[i].norm().item():.3g} "
            f"(ties: {tie[i].norm().item():.3g}), the budget is {budget:.3g}"
        )


@contextmanager
def poison_allocations() -> Iterator[None]:
    """Every tensor that PyTorch allocates without initialising it is NaN in here: what a kernel leaves out shows."""
    switch: Any = torch.utils.deterministic
    filled = switch.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _assert_like(flow: Tensor, exact: Tensor) -> None:
    assert flow.dtype in (torch.float32, torch.float64), f"flow is {flow.dtype}"
    assert flow.shape == exact.shape, f"flow is {tuple(flow.shape)}, not {tuple(exact.shape)}"
    assert flow.is_contiguous(), f"flow has strides {flow.stride()}"


def _double(problem: AnyProblem) -> AnyProblem:
    """The same problem in float64 and detached."""
    return with_inputs(problem, [x.detach().double() for x in inputs_of(problem)])
