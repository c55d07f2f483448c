"""Which implementation runs, and why."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amflow_kernels.impl.base import Implementation
from amflow_kernels.impl.chunked import Chunked
from amflow_kernels.impl.cpu import Cpu
from amflow_kernels.impl.cuda import Cuda
from amflow_kernels.impl.reference import Reference
from amflow_kernels.impl.triton import Triton
from amflow_kernels.plain import needs_gradients
from amflow_kernels.problem import MapPairs, Problem, clips_of

Impl = Literal["reference", "chunked", "cpu", "triton", "cuda"]  # the names in IMPLEMENTATIONS

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Reference(),
    "chunked": Chunked(),
    "cpu": Cpu(),
    "triton": Triton(),
    "cuda": Cuda(),
}
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device, for impl=None
_LAST_RESORT = "chunked"


@dataclass(frozen=True)
class Choice:
    """The implementation that runs for a problem, and why."""

    name: str
    reason: str
    fallback: bool  # a fused kernel was expected here and could not be had


def check_impl(impl: str | None, problem: MapPairs | None) -> None:
    """Raises TypeError or ValueError unless `impl` is None, or names an implementation that can take the problem."""
    if impl is None:
        return
    if not isinstance(impl, str):
        raise TypeError(f"impl: expected None or a str, got {type(impl).__name__}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {tuple(IMPLEMENTATIONS)}, got {impl!r}")
    reason = IMPLEMENTATIONS[impl].unsupported(problem) if problem is not None else None
    if reason:
        raise ValueError(f"impl={impl!r}: {reason}")


def check_backward(problem: MapPairs, impl: str) -> None:
    """Raises RuntimeError unless the backward that belongs to the forward of `impl` can run."""
    reason = _no_backward(IMPLEMENTATIONS[impl], problem)
    if reason:
        raise RuntimeError(f"amflow_kernels: impl={impl!r} can't run with inputs that need gradients: {reason}")


def _no_backward(chosen: Implementation, problem: MapPairs) -> str | None:
    """Why the implementation that makes the gradients of `chosen` can't make them, or None."""
    if chosen.backward_by is None:
        return None
    maker = IMPLEMENTATIONS[chosen.backward_by]
    why_not = maker.unsupported(problem) or maker.unavailable()
    return f"{chosen.backward_by!r} makes them: {why_not}" if why_not else None


def choose(problem: MapPairs, impl: str | None) -> Choice:
    """The implementation for a problem. Raises RuntimeError if the one asked for can't run here."""
    name, reasons = _choose(problem, impl)
    device, dtype = problem.q.device.type, problem.q.dtype
    if impl is not None:
        return Choice(name, "asked for", fallback=False)
    if name != _LAST_RESORT:
        return Choice(name, "; ".join([f"fused kernel for {device} and {dtype}", *reasons]), fallback=False)
    if dtype == torch.float64:
        return Choice(name, "float64 is computed in plain PyTorch", fallback=False)
    return Choice(name, "; ".join(reasons or [f"no fused kernel for {device}"]), fallback=True)


def _choose(problem: MapPairs, impl: str | None) -> tuple[str, list[str]]:
    """The name of the implementation for a problem, and why others, which are preferred to it, can't run."""
    if impl is not None:
        why_not = IMPLEMENTATIONS[impl].unavailable()
        if why_not:
            raise RuntimeError(f"amflow_kernels: impl={impl!r} can't run: {why_not}")
        return impl, []
    reasons: list[str] = []
    for name in _PREFERENCE.get(problem.q.device.type, ()):
        candidate = IMPLEMENTATIONS[name]
        why_not = candidate.unsupported(problem) or candidate.not_chosen(problem) or candidate.unavailable()
        why_not = why_not or _no_backward(candidate, problem)
        if why_not is None:
            return name, reasons
        reasons.append(f"{name}: {why_not}")
    return _LAST_RESORT, reasons


_warned: set[str] = set()


def implementation(problem: MapPairs, impl: str | None) -> Implementation:
    """The implementation that runs for a problem.

    Warns if no fused kernel can run where one was expected, and if the layout of q and k looks like another one.
    """
    name, _ = _choose(problem, impl)
    if name == _LAST_RESORT and (choice := choose(problem, impl)).fallback:
        _warn_once(
            f"no fused kernel runs here ({choice.reason}); plain PyTorch computes AM flow by blocks of query rows, "
            f"slower than a kernel. impl={name!r} asks for it without this warning.",
            RuntimeWarning,
        )
    doubt = _doubt_of_layout(problem)
    if doubt:
        _warn_once(doubt, UserWarning)
    return IMPLEMENTATIONS[name]


def lasting_choice(problem: MapPairs, impl: str | None) -> Implementation | None:
    """The implementation that runs for all problems of this kind; None where one may warn, or has no pairs of maps."""
    if problem.B == 0 or problem.P == 0 or _doubt_of_layout(problem):
        return None
    choice = choose(problem, impl)
    return None if choice.fallback else IMPLEMENTATIONS[choice.name]


def _warn_once(message: str, category: type[Warning]) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"amflow_kernels: {message}", category, stacklevel=3)


def _doubt_of_layout(problem: MapPairs) -> str | None:
    """Why q and k may be in another layout than they are read in, or None."""
    heads, tokens = problem.heads, problem.Nq
    if tokens >= heads or problem.Nk >= heads:
        return None
    return (
        f"q and k are read as {heads} heads of {tokens} tokens, dimensions 2 and -2. Models have more tokens "
        "than heads: if these are (B, T, N, heads, D), pass q.transpose(2, 3) and k.transpose(2, 3)"
    )


def backward(
    problem: Problem, impl: str | None, dflow: Tensor, saved: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients for the forward of `implementation`, and what the op has saved of it."""
    chosen = implementation(problem, impl)
    saved = saved[: chosen.saved_size(problem)]  # the op has room for what any implementation may save
    maker = chosen if chosen.backward_by is None else IMPLEMENTATIONS[chosen.backward_by]
    return maker.backward(problem, dflow, saved, needs)


def saved_size(problem: Problem, impl: str | None) -> int:
    """Elements of what a forward saves. Traced code must know it: it does not depend on what is available here."""
    if impl is not None:
        return IMPLEMENTATIONS[impl].saved_size(problem)
    size = 0
    for name in _PREFERENCE.get(problem.q.device.type, ()):
        candidate = IMPLEMENTATIONS[name]
        if candidate.unsupported(problem) is None:
            size = max(size, candidate.saved_size(problem))
    return size


def uses_lse(problem: MapPairs, impl: str | None) -> bool:
    """Whether the forward would be faster with the rows' log-sum-exps. Traced code can't tell: no.

    Nor does a flow whose gradients are needed take them.
    """
    if torch.compiler.is_compiling():
        return False
    if needs_gradients(*problem.frames):
        return False
    return IMPLEMENTATIONS[_choose(problem, impl)[0]].uses_lse(problem)


@dataclass(frozen=True)
class Explanation:
    """What runs and why; `print` it. `impl` and `reason` are None unless tensors were given."""

    impl: str | None
    reason: str | None
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def explain(
    q: Tensor | None = None, k: Tensor | None = None, *, num_frames: int | None = None, impl: Impl | None = None
) -> Explanation:
    """Which implementation runs for q and k, and why; without tensors, what is available on this machine.

    It also prints how the dimensions are read, "B=2, T=4, heads=12, N=257, D=64": other layouts of such a shape can't
    be detected. Builds the native library if it was not built yet. Raises what `am_flow` would raise for such q, k and
    `num_frames`, or if `impl` can't run.
    """
    check_impl(impl, None)
    lines: list[str] = []
    choice = None
    if q is not None:
        problem = MapPairs(clips_of("q", q, num_frames), clips_of("k", q if k is None else k, num_frames))
        check_impl(impl, problem)
        choice = choose(problem, impl)
        lines.append(f"am_flow runs {choice.name!r}: {choice.reason}")
        lines.append(f"q {_describe(q)}" + (f", k {_describe(k)}" if k is not None else ""))
        lines.append(f"read as {_reading(problem)}")
        lines += filter(None, [_doubt_of_layout(problem)])
        chosen = IMPLEMENTATIONS[choice.name]
        lines += chosen.describe(problem)
        if chosen.backward_by is not None:
            can_run = _no_backward(chosen, problem) or f"{chosen.backward_by!r} makes them"
            lines.append(f"gradients: {can_run}")
    lines.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for each in IMPLEMENTATIONS.values():
        lines += each.describe()
    return Explanation(choice.name if choice else None, choice.reason if choice else None, tuple(lines))


def _reading(problem: MapPairs) -> str:
    """The dimensions of q and k by name."""
    windows = [("windows", problem.q.shape[3])] if problem.q.dim() == 6 else []
    tokens = [("N", problem.Nq)] if problem.Nq == problem.Nk else [("Nq", problem.Nq), ("Nk", problem.Nk)]
    frames = ("pairs" if problem.pair else "T", problem.T)
    sizes = [("B", problem.B), frames, ("heads", problem.heads), *windows, *tokens, ("D", problem.D)]
    return ", ".join(f"{name}={size}" for name, size in sizes)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
