"""The Triton kernels. Triton itself is imported by the first call that needs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from amflow_kernels.impl.base import FUSED_DTYPES, Implementation
from amflow_kernels.impl.triton.saved import saved_sizes
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(Implementation):
    """Triton kernels for CUDA tensors, or in Triton's interpreter for CPU tensors."""

    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    dtypes = FUSED_DTYPES

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        return _interpreter_fault() if interpreted() else None

    def presence(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "no: Triton is not installed"
        return f"by Triton {importlib.metadata.version('triton')}{', interpreted' if interpreted() else ''}"

    def not_chosen(self, problem: MapPairs) -> str | None:
        return "it has not yet run on an AMD GPU" if torch.version.hip is not None else None

    def uses_lse(self, problem: MapPairs) -> bool:
        """The tiled forward has a pass for row statistics, which log-sum-exps spare."""
        from amflow_kernels.impl.triton import configs

        if isinstance(problem, Problem) and problem.head_reduction == "mean_map":
            return True  # no strips for it
        device = configs.Device.of(problem.q.device)
        return configs.strip(problem.Nk, problem.D, problem.q.dtype, device) is None

    def saved_size(self, problem: Problem) -> int:
        return sum(saved_sizes(problem))

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        from amflow_kernels.impl.triton import launch

        return launch.am_flow(problem)

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        from amflow_kernels.impl.triton import launch

        return launch.am_flow_backward(problem, dflow, saved, needs)

    def matmul(self, problem: MatmulProblem) -> Tensor:
        from amflow_kernels.impl.triton import launch

        return launch.am_flow_matmul(problem)

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        from amflow_kernels.impl.triton import launch

        return launch.am_flow_matmul_backward(problem, dy, needs)

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        why_not = self.unavailable()
        if why_not is not None:
            return [f"triton kernels: not available: {why_not}"]
        if problem is not None:
            return [_describe_launch(problem)]
        import triton

        return [f"triton kernels: Triton {triton.__version__}" + (", interpreted" if interpreted() else "")]


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter can't run the kernels, if it can't.

    Triton 3.6 converts arrays with one dimension and one element to int, which NumPy does not do from 2.4 on.
    """
    import numpy
    import triton

    versions = [tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy)]
    if versions[0] == (3, 6) and versions[1] >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__}: "
            "install numpy<2.4 or a newer Triton"
        )
    return None


def _describe_launch(problem: MapPairs) -> str:
    """How the forward and the backward of a problem without a head reduction are launched."""
    from amflow_kernels.impl.triton import configs

    Nq, Nk, D, dtype = problem.Nq, problem.Nk, problem.D, problem.q.dtype
    device = configs.Device.of(problem.q.device)
    strip = configs.strip(Nk, D, dtype, device)
    if strip is not None:
        forward = f"one pass, strips of {strip.rows} rows and {strip.KEY_TILES} x {strip.BLOCK_N} + {strip.REST} keys"
    else:
        tiles = (configs.config(name, dtype, device) for name in ("rows", "weights", "fwd"))
        forward = "three passes, tiles of " + ", ".join(f"{tile.BLOCK_M} x {tile.BLOCK_N}" for tile in tiles)
    kernels = (("bwd_strip_q", Nk), ("bwd_strip_k", Nq))
    by_strips = all(configs.gradient_strip(kernel, n, D, dtype) is not None for kernel, n in kernels)
    backward = "two passes by strips" if by_strips else "three passes by tiles"
    return f"forward in {forward}; backward in {backward}; configurations for sm_{device.sm}"
