"""The CUDA kernels on the CPU: compiled by the host compiler against simt.h, for the tests."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch

from amflow_kernels import _build, _ext
from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl import cuda

HERE = Path(__file__).parent
_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-march=native", "-Wall", "-Wno-unknown-pragmas"]


def build() -> Path:
    """Compiles the library, once for its sources; it is kept beside the native libraries."""
    file = _ext.cache_dir() / f"simt_{_key()}" / "amflow_simt.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            shutil.move(_compile(Path(scratch)), file)
    return file


def _key() -> str:
    """A hash of all that the library depends on."""
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in cpu.split("\n") if line.startswith("flags")), "")  # -march=native
    parts = (_build.source_key(_build.CUDA), torch.__version__, _build.compiler(), _FLAGS, flags)
    sources = (HERE / "simt.h").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(repr(parts).encode() + sources).hexdigest()[:20]


def _compile(folder: Path) -> Path:
    """Compiles the sources that `_build.CUDA` lists."""
    built, sources = folder / "amflow_simt.so", _build.source_dir()
    torch_dir = Path(torch.__file__).parent
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    headers = ["-DAMFLOW_SIMT", target, f"-I{HERE}", "-isystem", torch_dir / "include"]
    compilers = []
    for name, (source, own) in _build.CUDA.objects.items():
        command = [_build.compiler(), *_FLAGS, *headers, *own, "-x", "c++", "-c", sources / source, "-o", folder / name]
        compilers.append(subprocess.Popen([str(word) for word in command]))
    statuses = [compiler.wait() for compiler in compilers]
    assert not any(statuses)
    objects = [str(folder / name) for name in _build.CUDA.objects]
    subprocess.run(
        [_build.compiler(), "-shared", *objects, "-o", str(built), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"],
        check=True,
    )
    return built


@contextmanager
def machine(processors: int = 1, shared: int = 232448) -> Iterator[None]:
    """`impl="cuda"` runs on CPU tensors, as on a GPU of so many multiprocessors and bytes of shared memory."""
    with ExitStack() as stack:
        for name, value in {
            "_ops": lambda: torch.ops.amflow_simt,
            "_on": lambda q: nullcontext(),
            "_device": lambda q: (processors, shared, 0),
        }.items():
            stack.enter_context(mock.patch.object(cuda, name, value))
        implementation = IMPLEMENTATIONS["cuda"]
        stack.enter_context(mock.patch.object(implementation, "devices", ("cpu",)))
        stack.enter_context(mock.patch.object(implementation, "unavailable", return_value=None))
        yield
