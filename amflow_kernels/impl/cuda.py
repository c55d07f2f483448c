"""Handles of the CUDA kernels (csrc/cuda); shapes and meaning as in the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amflow_kernels import _build, _ext
from amflow_kernels.impl.gpu import empty_gradients, less_mean

MAX_TOKENS = 640
MAX_HEAD_DIM = 128

# Compute capabilities, as 90, on which impl=None takes these kernels where they can run: those for which a result of
# the GPU suite in benchmarks/results shows them correct, and faster than Triton's.
CHOSEN_ON: frozenset[int] = frozenset()

_REDUCTIONS = {"none": 0, "mean": 1, "mean_map": 2}


def unavailable() -> str | None:
    """Why the kernels can't run in this process, or None. Builds and loads the library if needed."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return _ext.load(_build.CUDA)


def unsupported_shape(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels don't take q and k, or None."""
    tokens, D = max(q.shape[-2], k.shape[-2]), q.shape[-1]
    if tokens > MAX_TOKENS:
        return f"expected at most {MAX_TOKENS} tokens in a frame, got {tokens}"
    if D > MAX_HEAD_DIM:
        return f"expected a head dimension of at most {MAX_HEAD_DIM}, got {D}"
    return None


def not_chosen(q: Tensor) -> str | None:
    """Why impl=None does not take these kernels on q's GPU, or None."""
    major, minor = torch.cuda.get_device_capability(q.device)
    if 10 * major + minor in CHOSEN_ON:
        return None
    return f"only where it is asked for: no measurement shows it faster on sm_{major}{minor}"


def uses_lse(q: Tensor, k: Tensor) -> bool:
    """Whether the forward has a pass for row statistics, which log-sum-exps spare: a strip makes each map once."""
    return False


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
    lse: Tensor | None,
    lse_b: Tensor | None,
    saved: Tensor,
) -> Tensor:
    groups = q.shape[2:-2] if head_reduction == "none" else q.shape[3:-2]
    flow = torch.empty((q.shape[0], q.shape[1] - lag, *groups, k.shape[-2]), dtype=torch.float32, device=q.device)
    with _on(q):
        _ops().forward(
            flow, saved, q, k, q_b, k_b, scale, lag, temperature, _REDUCTIONS[head_reduction], center, *_device(q)
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
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b = empty_gradients((q, k, q_b, k_b), needs)
    g = less_mean(dflow)
    if head_reduction == "mean":
        heads = q.shape[2]
        g = (g / heads).unsqueeze(2).expand(*g.shape[:2], heads, *g.shape[2:])
    with _on(q):
        _ops().backward(
            dq, dk, dq_b, dk_b, g.contiguous(), saved, q, k, q_b, k_b,
            scale, lag, temperature, _REDUCTIONS[head_reduction], *_device(q),
        )  # fmt: skip
    return dq, dk, dq_b, dk_b


def describe_launch(q: Tensor, k: Tensor) -> str:
    """What `explain` says of the launches for q and k, without a head reduction."""
    shared = _device(q)[1]
    strips = _ops().describe(q.shape[-2], k.shape[-2], q.shape[-1], q.element_size(), False, 1.0, shared)
    return f"forward by strips: {strips}"


def describe() -> list[str]:
    """What `explain` says of the CUDA kernels."""
    if not torch.cuda.is_available():
        return ["cuda kernels: not available: PyTorch finds no GPU"]
    file = _ext.binary(_build.CUDA)
    return [f"cuda kernels: {f'from {file}' if file else 'not loaded'}; impl='cuda' asks for them"]


def _ops() -> Any:
    return torch.ops.amflow_cuda


def _on(q: Tensor) -> Any:
    """Launch on the tensors' GPU, whichever is current."""
    return torch.cuda.device(q.device)


def _device(q: Tensor) -> tuple[int, int, int]:
    """Multiprocessors, bytes of shared memory that a block can have, stream."""
    found = torch.cuda.get_device_properties(q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream
    return found.multi_processor_count, found.shared_memory_per_block_optin, stream
