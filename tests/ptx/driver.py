"""impl="triton" on CPU tensors: the real host code, and every launch executed as compiled, by the machine for PTX.

    with driver.gpu(80) as gpu:
        flow = am_flow(q, k, impl="triton")
    gpu.launches[0].report.counts

Needs a process in which Triton compiles: without TRITON_INTERPRET=1. worker.py has one for pytest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from amflow_kernels import dispatch
from amflow_kernels.impl.triton import Triton
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu import stub_driver
from benchmarks.gpu.stub_driver import Execution
from tests.ptx import launches
from tests.ptx.memory import Memory, tensors_in


class Gpu(Triton):
    """The Triton kernels on CPU tensors, with the properties of a GPU.

    Attributes:
        seed: picks everything that a GPU leaves open, such as the order of blocks.
        launches: everything that was executed.
    """

    devices = ("cpu",)

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launches: list[launches.Launch] = []
        self.memory = Memory()

    def execute(self, execution: Execution) -> None:
        """What the stub of libcuda does with a launch."""
        regions = self.memory.regions(tensors_in(execution.arguments))
        sizes, parameters = execution.sizes, execution.parameters
        self.launches.append(
            launches.execute(execution.ptx, None, sizes, parameters, regions, seed=self.seed, fp_fusion=True)
        )

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        with self.memory:
            flow, saved = super().forward(problem)
        self.memory.check_written(flow, "the flow")
        return flow, saved

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        with self.memory:
            grads = super().backward(problem, dflow, saved, needs)
        return self._checked(grads)

    def matmul(self, problem: MatmulProblem) -> Tensor:
        with self.memory:
            y = super().matmul(problem)
        return self._checked((y,))[0]

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        with self.memory:
            grads = super().matmul_backward(problem, dy, needs)
        return self._checked(grads)

    def _checked(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for n, x in enumerate(results):
            self.memory.check_written(x, f"result {n}")
        return results


@contextmanager
def gpu(architecture: int = 80, processors: int = 1, seed: int = 0) -> Iterator[Gpu]:
    """impl="triton" runs on CPU tensors as on a GPU of that architecture and number of multiprocessors.

    Raises machine.Fault where a kernel does something that no kernel may, machine.UnknownInstruction, and what
    `stub_driver.machine` raises.
    """
    executed = Gpu(seed)
    with (
        stub_driver.machine(architecture, processors, execute=executed.execute),
        mock.patch.dict(dispatch.IMPLEMENTATIONS, {"triton": executed}),
    ):
        yield executed
