"""Handles of the native CPU kernels (csrc/cpu); shapes and meaning as in the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amflow_kernels import _build, _ext

_REDUCTIONS = {"none": 0, "mean": 1, "mean_map": 2}


def unavailable() -> str | None:
    """Why the kernels can't run in this process, or None. Builds and loads the library if needed."""
    if _isa() is None:
        return f"the CPU capability is {_capability()}, the kernels need AVX2 or AVX-512"
    return _ext.load(_build.CPU)


def am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
) -> Tensor:
    groups = q.shape[2:-2] if head_reduction == "none" else q.shape[3:-2]
    flow = torch.empty((q.shape[0], q.shape[1] - lag, *groups, k.shape[-2]), dtype=torch.float32)
    torch.ops.amflow_native.am_flow(
        flow, q, k, q_b, k_b, scale, lag, temperature, _REDUCTIONS[head_reduction], center, _isa()
    )
    return flow


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b = (
        q.new_empty(x.shape) if needed and x is not None else q.new_empty(0)
        for x, needed in zip((q, k, q_b, k_b), needs, strict=True)
    )
    torch.ops.amflow_native.am_flow_backward(
        dq, dk, dq_b, dk_b, dflow.contiguous(), q, k, q_b, k_b,
        scale, lag, temperature, _REDUCTIONS[head_reduction], _isa(),
    )  # fmt: skip
    return dq, dk, dq_b, dk_b


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
) -> Tensor:
    rows = k.shape[-2] if transpose else q.shape[-2]
    y = torch.empty((*x.shape[:-2], rows, x.shape[-1]), dtype=torch.float32)
    torch.ops.amflow_native.am_flow_matmul(y, q, k, q_b, k_b, x, scale, lag, temperature, transpose, softmax, _isa())
    return y


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b, dx = (
        like.new_empty(like.shape) if needed and like is not None else q.new_empty(0)
        for like, needed in zip((q, k, q_b, k_b, x), needs, strict=True)
    )
    torch.ops.amflow_native.am_flow_matmul_backward(
        dq, dk, dq_b, dk_b, dx, dy.contiguous(), q, k, q_b, k_b, x,
        scale, lag, temperature, transpose, softmax, _isa(),
    )  # fmt: skip
    return dq, dk, dq_b, dk_b, dx


def describe() -> list[str]:
    """What `explain` says of the CPU kernels."""
    lines = [f"cpu capability {_capability()} (torch)"]
    why_not = unavailable()
    if why_not is not None:
        return [*lines, f"cpu kernels: not available: {why_not}"]
    lines.append(f"cpu kernels: {torch.ops.amflow_native.isa(_isa())}, from {_ext.binary(_build.CPU)}")
    return lines


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _isa() -> int | None:
    """Vector bits to use: what torch itself chose, which ATEN_CPU_CAPABILITY can lower."""
    return {"AVX2": 256, "AVX512": 512}.get(_capability())
