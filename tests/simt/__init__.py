"""The CUDA kernels on the CPU: compiled by the host compiler against simt.h, for tests alone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from amflow_kernels import _build, ops
from amflow_kernels.impl import cuda

HERE = Path(__file__).parent
_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-march=native", "-Wall", "-Wno-unknown-pragmas"]


def build(folder: Path) -> Path:
    """The library, of the sources that `_build.CUDA` lists."""
    library, sources = folder / "amflow_simt.so", _build.source_dir()
    torch_dir = Path(torch.__file__).parent
    headers = [
        "-DAMFLOW_SIMT",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{HERE}",
        "-isystem",
        torch_dir / "include",
    ]
    compilers = []
    for name, (source, own) in _build.CUDA.objects.items():
        command = [_build.compiler(), *_FLAGS, *headers, *own, "-x", "c++", "-c", sources / source, "-o", folder / name]
        compilers.append(subprocess.Popen([str(word) for word in command]))
    statuses = [compiler.wait() for compiler in compilers]
    assert not any(statuses)
    objects = [str(folder / name) for name in _build.CUDA.objects]
    subprocess.run(
        [_build.compiler(), "-shared", *objects, "-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"],
        check=True,
    )
    return library


@contextmanager
def machine(processors: int = 1, shared: int = 232448) -> Iterator[None]:
    """`impl="cuda"` runs on CPU tensors, as on a GPU of so many multiprocessors and bytes of shared memory."""
    with ExitStack() as stack:
        for name, value in {
            "_ops": lambda: torch.ops.amflow_simt,
            "_on": lambda q: nullcontext(),
            "_device": lambda q: (processors, shared, 0),
            "unavailable": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(cuda, name, value))
        stack.enter_context(mock.patch.dict(ops.IMPLS, {"cuda": replace(ops.IMPLS["cuda"], devices=("cpu",))}))
        yield
