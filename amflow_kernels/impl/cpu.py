"""The native CPU kernels (csrc/cpu): allocates the results, then calls the library once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from amflow_kernels import _build, _ext
from amflow_kernels.impl.base import FUSED_DTYPES, Implementation, clear_unpaired, empty_gradients
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem


class Cpu(Implementation):
    """C++ for AVX2, AVX-512 and NEON."""

    devices = ("cpu",)
    dtypes = FUSED_DTYPES

    def unavailable(self) -> str | None:
        if _vector_bits() is None:
            return f"the CPU capability is {_capability()}, the kernels need AVX2, AVX-512 or a 64-bit ARM CPU"
        return _ext.load(_build.CPU)

    def presence(self) -> str:
        loaded = _ext.binary(_build.CPU) is not None
        isa = f", {torch.ops.amflow_native.isa(_vector_bits())}" if loaded and _vector_bits() else ""
        return f"{_ext.presence(_build.CPU)}{isa}"

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        flow = torch.empty(problem.flow_shape, dtype=torch.float32)
        torch.ops.amflow_native.am_flow(flow, *_maps(problem), problem.reduction, problem.center, _vector_bits())
        return flow, None

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        grads = empty_gradients(problem.frames, needs)
        torch.ops.amflow_native.am_flow_backward(
            *grads, dflow.contiguous(), *_maps(problem), problem.reduction, _vector_bits()
        )
        clear_unpaired(problem, grads)
        return grads

    def matmul(self, problem: MatmulProblem) -> Tensor:
        y = torch.empty(problem.product_shape, dtype=torch.float32)
        frames, options = problem.frames, _options(problem)
        torch.ops.amflow_native.am_flow_matmul(
            y, *frames, problem.x, *options, problem.transpose, problem.softmax, _vector_bits()
        )
        return y

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        grads = empty_gradients((*problem.frames, problem.x), needs)
        frames, options = problem.frames, _options(problem)
        torch.ops.amflow_native.am_flow_matmul_backward(
            *grads, dy.contiguous(), *frames, problem.x, *options, problem.transpose, problem.softmax, _vector_bits()
        )
        clear_unpaired(problem, grads)
        return grads

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        if problem is not None:
            return []
        lines = [f"cpu capability {_capability()} (torch)"]
        why_not = self.unavailable()
        if why_not is not None:
            return [*lines, f"cpu kernels: not available: {why_not}"]
        name = torch.ops.amflow_native.isa(_vector_bits())
        return [*lines, f"cpu kernels: {name}, from {_ext.binary(_build.CPU)}"]


def _options(problem: MapPairs) -> tuple[float, int, float]:
    return problem.logit_scale, problem.shift, problem.temperature


def _maps(problem: MapPairs) -> tuple[Tensor | float | None, ...]:
    return (*problem.frames, *_options(problem))


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@cache
def _vector_bits() -> int | None:
    """Width of the vectors to use: what torch itself chose, which ATEN_CPU_CAPABILITY can lower.

    Every 64-bit ARM CPU has NEON, whatever torch calls its capability there.
    """
    return 128 if _build.MACHINE == "aarch64" else {"AVX2": 256, "AVX512": 512}.get(_capability())
