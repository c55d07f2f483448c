"""impl="cuda" on CPU tensors: its host code as it ships, and every launch executed as nvcc compiled it, to PTX.

cuda.load()
with cuda.gpu():
    flow = am_flow(q, k, impl="cuda")
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from amflow_kernels import _build, _ext
from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl import cuda as implementation
from tests.ptx import launches
from tests.ptx.memory import Memory, tensors_in

RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
_EXECUTE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
)


def nvcc() -> str | None:
    """nvcc: as `_build.nvcc` finds it, or from the package nvidia-cuda-nvcc of PyPI; None if there is none."""
    try:
        return _build.nvcc()
    except _build.BuildError:
        pass
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvcc" and file.parent.name == "bin"), None)


@cache
def load() -> ctypes.CDLL:
    """The library of csrc/cuda with cuda_runtime.cpp, built on first use, and loaded. Its PTX lies beside it."""
    folder = _ext.cache_dir() / f"ptx_{_key()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _compile(Path(scratch) / "built")
            (Path(scratch) / "built").rename(folder)
    library = folder / _build.CUDA.file
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def _key() -> str:
    """A hash of all that the library depends on."""
    compiler = nvcc()
    assert compiler is not None, "nvcc was not found: pip install nvidia-cuda-nvcc"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (_build.source_key(_build.CUDA), torch.__version__, _build.compiler(), version)
    sources = RUNTIME.read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(repr(parts).encode() + sources).hexdigest()[:20]


def _compile(folder: Path) -> None:
    """Compiles what `_build.CUDA` lists, but the kernels only to PTX, which is the same for all architectures."""
    folder.mkdir()
    sources, torch_dir = _build.source_dir(), Path(torch.__file__).parent
    host = [_build.compiler(), *_build._FLAGS, "-isystem", str(torch_dir / "include")]
    target = ["-gencode=arch=compute_80,code=compute_80", "-ccbin", _build.compiler(), "-keep"]
    device = [str(nvcc()), *_build._NVCC_FLAGS, *target]
    compilers = []
    for name, (source, own) in {**_build.CUDA.objects, "runtime.o": (str(RUNTIME), [])}.items():
        command = [*host, *own]
        if source.endswith(".cu"):
            kept = folder / name.removesuffix(".o")
            kept.mkdir()
            command = [*device, "-keep-dir", str(kept), *own]
        compilers.append(subprocess.Popen([*command, "-c", str(sources / source), "-o", str(folder / name)]))
    statuses = [each.wait() for each in compilers]
    assert not any(statuses), "compiling csrc/cuda failed"
    objects = [str(folder / name) for name in (*_build.CUDA.objects, "runtime.o")]
    link = [_build.compiler(), "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(folder / _build.CUDA.file)]
    subprocess.run([*link, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"], check=True)
    for kept in (path for path in folder.iterdir() if path.is_dir()):
        (ptx,) = kept.glob("*.ptx")
        ptx.rename(folder / f"{kept.name}.ptx")
        shutil.rmtree(kept)


@cache
def _kernels() -> dict[str, str]:
    """The PTX of every kernel by its name: one entry, and everything that is no entry."""
    found = {}
    for file in Path(load()._name).parent.glob("*.ptx"):
        entry = r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^}"
        text = file.read_text()
        rest = re.sub(entry, "", text, flags=re.M | re.S)
        for one in re.finditer(entry, text, re.M | re.S):
            found[one[1]] = f"{rest}\n{one[0]}\n"
    return found


class Gpu:
    """The machine on which the kernels run.

    Attributes:
        seed: picks everything that a GPU leaves open, such as the order of blocks.
        launches: everything that was executed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launches: list[launches.Launch] = []

    def forward(self, flow: torch.Tensor, *arguments: Any) -> None:
        """The op of the library, as `amflow_kernels` calls it, on CPU tensors."""
        memory = Memory()
        memory.adopt(flow, torch.zeros(flow.untyped_storage().nbytes(), dtype=torch.uint8))
        failures: list[BaseException] = []

        def execute(name: bytes, sizes: Any, parameters: Any) -> int:
            try:
                regions = [*memory.regions(tensors_in(arguments)), *memory.allocated()]
                kernel = name.decode()
                launch = launches.execute(
                    _kernels()[kernel], kernel, sizes, parameters, regions, seed=self.seed, fp_fusion=False
                )  # as nvcc is told
                self.launches.append(launch)
            except BaseException as error:  # C++ must not see it
                failures.append(error)
            return len(failures)

        callback = _EXECUTE(execute)
        library = load()
        library.runtime_execute_by(callback)
        on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        try:
            with memory:
                torch.ops.amflow_cuda.forward.default.redispatch(on_cuda, flow, *arguments)
        except RuntimeError:  # the library's, of a launch that failed
            if failures:
                raise failures[0] from None
            raise
        finally:
            library.runtime_execute_by(_EXECUTE())
        memory.check_written(flow, "the flow")

    describe = staticmethod(lambda *arguments: torch.ops.amflow_cuda.describe(*arguments))


@contextmanager
def gpu(processors: int = 1, shared: int = 232448, seed: int = 0) -> Iterator[Gpu]:
    """impl="cuda" runs on CPU tensors, as on a GPU of so many multiprocessors and bytes of shared memory."""
    executed = Gpu(seed)
    load()
    with ExitStack() as stack:
        for name, value in {
            "_ops": lambda: executed,
            "_on": lambda q: nullcontext(),
            "_device": lambda q: (processors, shared, 0),
        }.items():
            stack.enter_context(mock.patch.object(implementation, name, value))
        chosen = IMPLEMENTATIONS["cuda"]
        stack.enter_context(mock.patch.object(chosen, "devices", ("cpu",)))
        stack.enter_context(mock.patch.object(chosen, "unavailable", return_value=None))
        yield executed
