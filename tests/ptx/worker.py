"""The executed Triton kernels for pytest, whose own process has Triton's interpreter: in a process of their own.

    with worker.gpu(80):
        flow = am_flow(q, k, impl="triton")

Problems and results are copied between the processes.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from amflow_kernels import dispatch
from amflow_kernels.impl.triton import Triton
from amflow_kernels.problem import MatmulProblem, Problem

ROOT = Path(__file__).resolve().parents[2]


class Remote(Triton):
    """The Triton kernels on CPU tensors, executed in another process.

    Attributes:
        options: those of `driver.gpu`.
        launches: everything that was executed.
    """

    devices = ("cpu",)

    def __init__(self, **options: int) -> None:
        self.options = options
        self.launches: list[Any] = []
        # Which bytes of a forward's saved tensor were written, by address; the weak reference keeps the address taken.
        self._saved: dict[int, tuple[StorageWeakRef, Tensor | None]] = {}

    def unavailable(self) -> str | None:
        return None

    def uses_lse(self, problem: Any) -> bool:
        return bool(self._call("uses_lse", problem))

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        flow, saved, shadow = self._call("forward", problem)
        storage = saved.untyped_storage()
        self._saved[storage._cdata] = (StorageWeakRef(storage), shadow)
        return flow, saved

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        _, shadow = self._saved.get(saved.untyped_storage()._cdata, (None, None))
        grads: tuple[Tensor, ...] = self._call("backward", problem, dflow, saved, shadow, list(needs))
        return grads

    def matmul(self, problem: MatmulProblem) -> Tensor:
        y: Tensor = self._call("matmul", problem)
        return y

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = self._call("matmul_backward", problem, dy, list(needs))
        return grads

    def _call(self, method: str, *arguments: Any) -> Any:
        tf32 = torch.backends.cuda.matmul.fp32_precision
        launches, result = _worker().call((self.options, tf32, method, arguments))
        self.launches += launches
        return result


@contextmanager
def gpu(architecture: int = 80, processors: int = 1, seed: int = 0) -> Iterator[Remote]:
    """As `driver.gpu`, in another process."""
    remote = Remote(architecture=architecture, processors=processors, seed=seed)
    with mock.patch.dict(dispatch.IMPLEMENTATIONS, {"triton": remote}):
        yield remote


class Worker:
    """A process in which Triton compiles."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        subprocess.Popen(
            [sys.executable, "-m", "tests.ptx.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**environment, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "models")))},
            cwd=ROOT,
        )  # it ends when this process closes the pipe
        theirs.close()

    def call(self, request: Any) -> Any:
        """What the process returns; raises what it raises."""
        self._pipe.send_bytes(_packed(request))
        answer, error, where = _unpacked(self._pipe.recv_bytes())
        if error is not None:
            raise error from RuntimeError(where)
        return answer


@cache
def _worker() -> Worker:
    return Worker()


def _packed(value: Any) -> bytes:
    """Tensors keep their strides, and the whole of their storages."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _answer(request: Any) -> Any:
    """The launches of a call, and its result."""
    from tests.ptx import driver

    options, tf32, method, arguments = request
    torch.backends.cuda.matmul.fp32_precision = tf32
    with driver.gpu(**options) as gpu:
        if method == "uses_lse":
            return [], gpu.uses_lse(*arguments)
        if method == "backward":
            problem, dflow, saved, shadow, needs = arguments
            if shadow is not None:
                gpu.memory.adopt(saved, shadow)
            return gpu.launches, gpu.backward(problem, dflow, saved, needs)
        if method == "forward":
            flow, saved = gpu.forward(*arguments)
            return gpu.launches, (flow, saved, gpu.memory.shadow(saved))
        return gpu.launches, getattr(gpu, method)(*arguments)


def main(pipe: Connection) -> None:
    """Answers calls until the other end is closed."""
    torch.set_grad_enabled(False)
    while True:
        try:
            request = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = _answer(request), None, ""
        except Exception as error:
            answer = None, error, traceback.format_exc()  # tracebacks can't be pickled
        pipe.send_bytes(_packed(answer))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
