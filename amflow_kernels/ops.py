"""The ops ``amflow::am_flow`` and ``amflow::am_flow_backward``: schemas, fakes, autograd, choice of implementation.

Both ops are opaque to torch.compile. Which implementation runs is decided inside them, never in traced code, so
that a process whose very first call is compiled works as any other. One schema serves both public forms: with q_b
and k_b the pairs are ((q, k)[p], (q_b, k_b)[p]), without them ((q, k)[t], (q, k)[t + lag]).
"""

# No `from __future__ import annotations`: the schemas are inferred from the real types.
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, library

from amflow_kernels.impl import cuda, native, reference, triton
from amflow_kernels.impl.gpu import saved_sizes

HEAD_REDUCTIONS = ("none", "mean", "mean_map")
MAX_HEAD_DIM = 256
MIN_TEMPERATURE = 1 / 64


@dataclass(frozen=True)
class Impl:
    """One implementation: its module, where it can run at all, and what keeps it from running in this process."""

    module: ModuleType
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None  # None: any
    row_statistics: bool = False  # its forward can be given them (as log-sum-exps), and leaves them for its backward

    def unsupported(self, q: Tensor, k: Tensor | None) -> str | None:
        """Why it can't take such input anywhere, or None. Cheap and without side effects: safe in traced code."""
        if self.devices is not None and q.device.type not in self.devices:
            return f"expected tensors on {' or '.join(self.devices)}, got {q.device.type}"
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"expected one of {', '.join(str(d) for d in self.dtypes)}, got {q.dtype}"
        return self._asked("unsupported_shape", q, q if k is None else k)

    def not_chosen(self, q: Tensor) -> str | None:
        """Why it runs for q only where it is asked for, or None."""
        return self._asked("not_chosen", q)

    def unavailable(self) -> str | None:
        """Why it can't run in this process, or None; builds or loads what it needs."""
        return self._asked("unavailable")

    def _asked(self, question: str, *arguments: Any) -> str | None:
        """What the module answers, where it has such a function."""
        answer: str | None = getattr(self.module, question)(*arguments) if hasattr(self.module, question) else None
        return answer


_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = {
    "reference": Impl(reference, None, None),
    "cpu": Impl(native, ("cpu",), _FUSED_DTYPES),
    "triton": Impl(triton, ("cuda", "cpu") if triton.interpreted() else ("cuda",), _FUSED_DTYPES, row_statistics=True),
    "cuda": Impl(cuda, ("cuda",), _FUSED_DTYPES, row_statistics=True),
}
_PREFERENCE = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
}  # by device, when impl is None; the reference is the last resort


@dataclass(frozen=True)
class Choice:
    """The implementation that runs for some input, and why."""

    name: str
    reason: str
    fallback: bool  # a fused kernel was expected here and could not be had


def check_impl(impl: str | None, q: Tensor | None, k: Tensor | None = None) -> None:
    """Raises ValueError unless `impl` is None, or the name of an implementation that can take tensors like q and k."""
    if impl is None:
        return
    if impl not in IMPLS:
        raise ValueError(f"impl: expected None or one of {tuple(IMPLS)}, got {impl!r}")
    reason = q is not None and IMPLS[impl].unsupported(q, k)
    if reason:
        raise ValueError(f"impl={impl!r}: {reason}")


def choose(q: Tensor, k: Tensor | None, impl: str | None) -> Choice:
    """The implementation for tensors like q and k. Raises RuntimeError if the one asked for can't run here."""
    if impl is not None:
        why_not = IMPLS[impl].unavailable()
        if why_not:
            raise RuntimeError(f"amflow_kernels: impl={impl!r} can't run: {why_not}")
        return Choice(impl, "asked for", fallback=False)
    reasons: list[str] = []
    device_type = q.device.type
    for name in _PREFERENCE.get(device_type, ()):
        candidate = IMPLS[name]
        why_not = candidate.unsupported(q, k) or candidate.not_chosen(q) or candidate.unavailable()
        if why_not is None:
            reason = "; ".join([f"fused kernel for {device_type} and {q.dtype}", *reasons])
            return Choice(name, reason, fallback=False)
        reasons.append(f"{name}: {why_not}")
    if q.dtype == torch.float64:
        return Choice("reference", "float64 is computed by the reference", fallback=False)
    reasons = reasons or [f"no fused kernel for {device_type}"]
    return Choice("reference", "; ".join(reasons), fallback=True)


def uses_lse(q: Tensor, k: Tensor, impl: str | None) -> bool:
    """Whether the forward of q and k would be faster for the rows' log-sum-exps. Traced code can't tell: no."""
    if torch.compiler.is_compiling():
        return False
    chosen = IMPLS[choose(q, k, impl).name]
    return chosen.row_statistics and bool(chosen.module.uses_lse(q, k))


_warned: set[str] = set()


def implementation(q: Tensor, k: Tensor, impl: str | None) -> Impl:
    """The implementation that runs for tensors like q and k. Warns where it is the reference for want of another."""
    choice = choose(q, k, impl)
    if choice.fallback and choice.reason not in _warned:
        _warned.add(choice.reason)
        warnings.warn(
            "amflow_kernels: no fused kernel here, the eager reference runs and forms the attention maps "
            f"({choice.reason}). impl='reference' asks for it without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return IMPLS[choice.name]


def _new_saved(q: Tensor, pair: bool, lag: int, head_reduction: str, impl: str | None) -> Tensor:
    """Room for what the forward leaves for the backward, of a size that traced code knows: none is chosen there."""
    takes = impl in ("triton", "cuda") or (impl is None and q.device.type == "cuda" and q.dtype in _FUSED_DTYPES)
    size = sum(saved_sizes(q, pair, lag, head_reduction)) if takes else 0
    return q.new_zeros(size, dtype=torch.float32)


@library.custom_op("amflow::am_flow", mutates_args=())
def am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    lse: Tensor | None,
    lse_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """The flow, and what the implementation saves for its backward (possibly nothing).

    lse, lse_b: row log-sum-exps of the maps of q and of q_b; only some kernels have use for them.
    """
    if q.shape[0] == 0 or q.shape[1] == 0:
        return _fake_am_flow(q, k, q_b, k_b, lse, lse_b, scale, lag, temperature, head_reduction, center, impl)
    chosen = implementation(q, k, impl)
    saved = _new_saved(q, q_b is not None, lag, head_reduction, impl)
    extra = (lse, lse_b, saved) if chosen.row_statistics else ()
    flow = chosen.module.am_flow(q, k, q_b, k_b, scale, lag, temperature, head_reduction, center, *extra)
    return flow, saved


@am_flow.register_fake
def _fake_am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    lse: Tensor | None,
    lse_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    pairs = q.shape[1] - lag  # lag is 0 in pair form
    groups = q.shape[2:-2] if head_reduction == "none" else q.shape[3:-2]
    flow = q.new_empty((q.shape[0], pairs, *groups, k.shape[-2]), dtype=reference.compute_dtype(q.dtype))
    return flow, _new_saved(q, q_b is not None, lag, head_reduction, impl)


@library.custom_op("amflow::am_flow_backward", mutates_args=())
def am_flow_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
    impl: str | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_b, k_b, contiguous and in their dtype; an empty tensor where `needs` is False."""
    if q.shape[0] == 0 or q.shape[1] == 0:
        return _fake_backward(dflow, q, k, q_b, k_b, scale, lag, temperature, head_reduction, needs, impl, saved)
    chosen = implementation(q, k, impl)
    extra = (saved,) if chosen.row_statistics else ()
    return chosen.module.am_flow_backward(dflow, q, k, q_b, k_b, scale, lag, temperature, head_reduction, needs, *extra)


@am_flow_backward.register_fake
def _fake_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
    impl: str | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def grad(x: Tensor | None, needed: bool) -> Tensor:
        return q.new_empty(x.shape) if needed and x is not None else q.new_empty(0)

    return grad(q, needs[0]), grad(k, needs[1]), grad(q_b, needs[2]), grad(k_b, needs[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, q_b, k_b, _, _, ctx.scale, ctx.lag, ctx.temperature, ctx.head_reduction, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, q_b, k_b, output[1])


def _backward(ctx: Any, dflow: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    *frames, saved = ctx.saved_tensors
    grads = am_flow_backward(
        dflow, *frames, ctx.scale, ctx.lag, ctx.temperature, ctx.head_reduction, needs, ctx.impl, saved
    )
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 8)


def no_second_order(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("amflow_kernels: AM flow has first-order gradients only; a second-order gradient was requested")


am_flow.register_autograd(_backward, setup_context=_setup_context)
am_flow_backward.register_autograd(no_second_order)


@dataclass(frozen=True)
class Explanation:
    """What runs and why; `print` it. `impl` and `reason` are None unless tensors were given."""

    impl: str | None
    reason: str | None
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def explain(q: Tensor | None = None, k: Tensor | None = None, *, impl: str | None = None) -> Explanation:
    """Which implementation runs for q and k, and why; without tensors, what is available on this machine.

    Builds the native library if it was not built yet. Raises what `am_flow` would raise if `impl` can't run.
    """
    check_impl(impl, q, k)
    lines = []
    choice = None
    if q is not None:
        choice = choose(q, k, impl)
        lines.append(f"am_flow runs {choice.name!r}: {choice.reason}")
        lines.append(f"q {_describe(q)}" + (f", k {_describe(k)}" if k is not None else ""))
        if hasattr(IMPLS[choice.name].module, "describe_launch"):
            lines.append(IMPLS[choice.name].module.describe_launch(q, q if k is None else k))
    lines.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    lines += native.describe()
    lines += triton.describe()
    lines += cuda.describe()
    return Explanation(choice.name if choice else None, choice.reason if choice else None, tuple(lines))


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
