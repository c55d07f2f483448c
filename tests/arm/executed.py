"""The CPU kernels as compiled for 64-bit ARM, executed under qemu: implementations for tests.

with registered("neon"):
    flow = am_flow(q, k, impl="neon")

main.cpp is the process that runs there. A request is a `struct Request`, then every tensor as a `struct TensorHeader`
and its whole memory, so that the kernels meet its strides and offset; the answer is the results' memory.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amflow_kernels import _build, _ext, dispatch
from amflow_kernels.impl.base import FUSED_DTYPES, Implementation, clear_unpaired, empty_gradients
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CPUS = {"neon": "cortex-a72", "neon_bf16": "max"}  # as qemu names them: one for each instruction set
FORWARD, BACKWARD, MATMUL, MATMUL_BACKWARD = range(4)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WARNING = "-Wno-psabi"  # GCC's note that the ABI of vectors in structs once changed


def missing() -> str | None:
    """Why the kernels can't be executed here, or None."""
    tools = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    debian = "Debian packages g++-aarch64-linux-gnu and qemu-user"
    return f"{' and '.join(tools)} not found ({debian})" if tools else None


@cache
def program() -> Path:
    """main.cpp with the kernels that the library has on ARM, compiled with its flags."""
    main, library = Path(__file__).with_name("main.cpp"), _build.cpu_library("aarch64")
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(_build.source_key(library).encode() + main.read_bytes() + version).hexdigest()[:20]
    file = _ext.cache_dir() / f"arm_{key}"
    if not file.exists():
        folder, sources = file.with_suffix(".build"), _build.source_dir()
        folder.mkdir(parents=True, exist_ok=True)
        flags = [flag for flag in _build._FLAGS if not flag.startswith("-DTORCH")]
        for name, (source, own) in library.objects.items():
            if name != "bindings.o":
                _run([COMPILER, *flags, _WARNING, *own, "-c", str(sources / source), "-o", str(folder / name)])
        objects = [str(path) for path in folder.glob("*.o")]
        built = folder / file.name
        _run([COMPILER, *flags, "-static", "-I", str(sources / "cpu"), str(main), *objects, "-o", str(built)])
        built.replace(file)
        shutil.rmtree(folder)
    return file


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@contextmanager
def registered(isa: str) -> Iterator[None]:
    """impl=`isa` executes the kernels of that instruction set, on a CPU for which they are chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.IMPLEMENTATIONS, isa, _executed(isa))
        yield


class Executed(Implementation):
    """One process under qemu, which lives as long as this one."""

    devices = ("cpu",)
    dtypes = FUSED_DTYPES

    def __init__(self, isa: str, options: Sequence[str] = ()) -> None:
        """options: more of the emulator's."""
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [EMULATOR, "-cpu", CPUS[isa], *options, str(program())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        chosen = self._process.stdout.readline().decode().strip()
        assert chosen == isa, f"{CPUS[isa]} runs the kernels for {chosen}, not {isa}"

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        flow = torch.empty(problem.flow_shape, dtype=torch.float32)
        self._call(FORWARD, problem, [], [flow])
        return flow, None

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        grads = empty_gradients(problem.frames, needs)
        self._call(BACKWARD, problem, [dflow.contiguous()], grads)
        clear_unpaired(problem, grads)
        return grads

    def matmul(self, problem: MatmulProblem) -> Tensor:
        y = torch.empty(problem.product_shape, dtype=torch.float32)
        self._call(MATMUL, problem, [problem.x], [y])
        return y

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        grads = empty_gradients((*problem.frames, problem.x), needs)
        self._call(MATMUL_BACKWARD, problem, [problem.x, dy.contiguous()], grads)
        clear_unpaired(problem, grads)
        return grads

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        return []

    def _call(self, operation: int, problem: MapPairs, more: list[Tensor], results: Sequence[Tensor]) -> None:
        """Fills the results."""
        sizes = [result.nbytes for result in results]
        tensors = [x for x in (*problem.frames, *more) if x is not None]
        with self._lock:
            pipe, answer = self._process.stdin, self._process.stdout
            assert pipe is not None
            assert answer is not None
            pipe.write(_request(operation, problem, sizes))
            for x in tensors:
                pipe.write(_header(x))
                pipe.write(_bytes(x))
            pipe.flush()
            for result, size in zip(results, sizes, strict=True):
                content = answer.read(size)
                assert len(content) == size, f"the process ended with status {self._process.wait()}"
                if size:
                    result.copy_(torch.frombuffer(bytearray(content), dtype=result.dtype).view(result.shape))


@cache
def _executed(isa: str) -> Executed:
    return Executed(isa)


def _request(operation: int, problem: MapPairs, sizes: list[int]) -> bytes:
    def option(name: str) -> int:  # of one of the two operators
        return getattr(problem, name, 0)

    q, x = problem.q, getattr(problem, "x", None)
    windows = q.shape[3] if q.dim() == 6 else 1
    return struct.pack(
        "<16q2d2q5q",
        *(operation, torch.get_num_threads(), problem.pair, option("reduction"), option("center"), problem.shift),
        *(option("transpose"), option("softmax")),
        *(*q.shape[:3], windows, problem.Nq, problem.Nk, q.shape[-1], 0 if x is None else x.shape[-1]),
        *(problem.logit_scale, problem.temperature, _DTYPES[q.dtype], 0 if x is None else _DTYPES[x.dtype]),
        *(sizes + [0] * (5 - len(sizes))),
    )


def _header(x: Tensor) -> bytes:
    strides = [*x.stride()[:3], x.stride(3) if x.dim() == 6 else 0, x.stride(-2)]  # not used for dflow
    return struct.pack("<8q", _DTYPES[x.dtype], x.untyped_storage().nbytes(), x.storage_offset(), *strides)


def _bytes(x: Tensor) -> bytes:
    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return memory.numpy().tobytes()
