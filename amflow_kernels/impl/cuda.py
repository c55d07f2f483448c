"""The CUDA kernels (csrc/cuda), which are forwards: allocates the results, then calls the library once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amflow_kernels import _build, _ext
from amflow_kernels.impl.base import FUSED_DTYPES, Implementation
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

MAX_TOKENS = 640
MAX_HEAD_DIM = 128

# Compute capabilities, as 90, on which impl=None takes these kernels where they can run: those for which a result of
# the GPU suite in benchmarks/results shows them correct, and faster than Triton's.
CHOSEN_ON: frozenset[int] = frozenset()

_NO_MATMUL = "the CUDA kernels have no products with the motion operator; 'triton' has"


class Cuda(Implementation):
    """CUDA C++ for sm_80 and later."""

    devices = ("cuda",)
    dtypes = FUSED_DTYPES
    backward_by = "triton"

    def unsupported(self, problem: MapPairs) -> str | None:
        if isinstance(problem, MatmulProblem):
            return _NO_MATMUL
        reason = super().unsupported(problem)
        if reason is not None:
            return reason
        tokens = max(problem.Nq, problem.Nk)
        if tokens > MAX_TOKENS:
            return f"expected at most {MAX_TOKENS} tokens in a frame, got {tokens}"
        if problem.D > MAX_HEAD_DIM:
            return f"expected a head dimension of at most {MAX_HEAD_DIM}, got {problem.D}"
        return None

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        return _ext.load(_build.CUDA)

    def presence(self) -> str:
        return _ext.presence(_build.CUDA)

    def not_chosen(self, problem: MapPairs) -> str | None:
        major, minor = torch.cuda.get_device_capability(problem.q.device)
        if 10 * major + minor in CHOSEN_ON:
            return None
        return f"only where it is asked for: no measurement shows it faster on sm_{major}{minor}"

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        q = problem.q
        flow = torch.empty(problem.flow_shape, dtype=torch.float32, device=q.device)
        with _on(q):
            _ops().forward(
                flow, *problem.frames, problem.logit_scale, problem.shift, problem.temperature, problem.reduction,
                problem.center, *_device(q),
            )  # fmt: skip
        return flow, None

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        raise NotImplementedError("the CUDA kernels have no backward; `backward_by` names one")

    def matmul(self, problem: MatmulProblem) -> Tensor:
        raise NotImplementedError(_NO_MATMUL)  # `unsupported` says so

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        raise NotImplementedError(_NO_MATMUL)

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        if problem is not None:  # without a head reduction, at temperature 1
            sizes = problem.Nq, problem.Nk, problem.D, problem.q.element_size()
            return [f"forward by strips: {_ops().describe(*sizes, False, 1.0, _device(problem.q)[1])}"]
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
    properties: Any = torch.cuda.get_device_properties(q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, stream
