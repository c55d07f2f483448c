"""Triton's JIT, binder, compiler and launcher without a GPU: over a stub of libcuda (stub_cuda.c).

    with stub_driver.machine(90) as launches:
        launch.am_flow(problem)  # q, k ... are CPU tensors, or on device "meta", without storage
    launches[0].compiled.metadata.shared

Kernels compute nothing, and results are uninitialised, unless a function is passed that executes them (tests/ptx has
one). AMD's GPUs ("gfx942") have no stub: kernels are only compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from amflow_kernels.impl.triton import Triton, configs, interpreted, launch

SOURCE = Path(__file__).with_name("stub_cuda.c")
LIBRARY = "libcuda.so.1"  # the name under which Triton links it
SHARED: dict[int | str, int] = {  # bytes of shared memory that a program can have
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
}
PROCESSORS = 132

Architecture = int | str  # 90 for sm_90, or the name of an AMD architecture


class Launch(NamedTuple):
    """One launch: the host code's call, the compiled kernel, host seconds of the call (with compilation, if any)."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any
    seconds: float

    @property
    def name(self) -> str:
        """As the compile reports name the kernel."""
        return str(self.kernel.__name__).removeprefix("am_flow_").removesuffix("_kernel")


class Execution(NamedTuple):
    """A launch as it reaches libcuda."""

    ptx: str  # of the kernel
    sizes: Any  # those of the grid and of a block in x, y and z, and the bytes of dynamic shared memory
    parameters: Any  # an array of pointers to their values, for ctypes
    arguments: tuple[Any, ...]  # of the host code's call


@contextmanager
def machine(
    architecture: Architecture,
    processors: int = PROCESSORS,
    *,
    compiles: bool = True,
    execute: Callable[[Execution], None] | None = None,
) -> Iterator[list[Launch]]:
    """A machine with one GPU of that architecture, and the list of the launches on it.

    Unless it `compiles`, launches are only recorded, and `compiled_for` compiles one. With `execute`, kernels are
    compiled to PTX and no further, and every launch ends in a call of it, whose exceptions the launch raises.
    impl="triton" then takes CPU tensors. A kernel that needs more shared memory than the GPU has raises
    triton.runtime.errors.OutOfResources. Raises RuntimeError where there is a GPU, or with Triton's interpreter.
    """
    driver = _driver()
    launches: list[Launch] = []
    run = launch.run if execute is None else _executed_by(execute)

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        begin = perf_counter()
        compiled = None
        if compiles and driver.is_cuda:
            compiled = run(kernel, programs, arguments, options)
        seconds = perf_counter() - begin
        each = Launch(kernel, programs, arguments, options, compiled, seconds)
        if compiles and not driver.is_cuda:
            each = each._replace(compiled=compiled_for(architecture, each))
        launches.append(each)
        return each.compiled

    column = configs.architecture(*divmod(architecture, 10)) if isinstance(architecture, int) else 80
    device = configs.Device(column, SHARED[architecture], processors)
    with (
        mock.patch.object(driver, "architecture", architecture),
        mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx if execute else None),
        mock.patch.object(configs.Device, "of", staticmethod(lambda _: device)),
        mock.patch.object(Triton, "devices", ("cuda", "cpu", "meta")),
        mock.patch.object(launch, "run", record),
    ):
        yield launches


def _executed_by(execute: Callable[[Execution], None]) -> Callable[..., Any]:
    """`launch.run`, whose launches end in calls of `execute`."""
    run = launch.run

    def run_and_execute(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        failures: list[BaseException] = []

        def hand_over(image: int, sizes: Any, parameters: Any) -> int:
            try:
                ptx = ctypes.string_at(image).decode()
                execute(Execution(ptx, sizes, parameters, arguments))
            except BaseException as error:  # C has no exceptions
                failures.append(error)
            return len(failures)

        callback = _EXECUTE(hand_over)
        _library().stub_execute_by(callback)
        try:
            return run(kernel, programs, arguments, options)
        except RuntimeError:  # Triton's, of a launch that failed
            if failures:
                raise failures[0] from None
            raise
        finally:
            _library().stub_execute_by(None)

    return run_and_execute


_EXECUTE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
)


def _stop_at_ptx(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook on the stages of a compilation. Without arguments: what sets such kernels apart in its cache."""
    if stages is None:
        return "only PTX", "only PTX"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def launches_of_the_library() -> int:
    """How many launches have reached the stub of libcuda in this process."""
    return int(_library().stub_launches())


def compiled_for(architecture: Architecture, each: Launch) -> Any:
    """The kernel of a launch, bound to its arguments and compiled. Raises as `machine` does."""
    driver = _driver()
    with mock.patch.object(driver, "architecture", architecture):
        compiled = each.kernel.run(*each.arguments, grid=(each.programs,), warmup=True, **each.options)
    if compiled.metadata.shared > SHARED[architecture]:
        raise OutOfResources(compiled.metadata.shared, SHARED[architecture], "shared memory")
    return compiled


class _Driver(CudaDriver):
    """Triton's driver of NVIDIA's GPUs, for a GPU that is not there. It is numbered by its architecture, so that Triton
    keeps the kernels of each architecture apart.
    """

    def __init__(self) -> None:
        self.architecture: Architecture = 90
        self.utils = CudaUtils()
        self.utils.get_device_properties = lambda device: {"max_shared_mem": SHARED[device]}
        self.launcher_cls = CudaLauncher

    @property
    def is_cuda(self) -> bool:
        return isinstance(self.architecture, int)

    def get_current_target(self) -> GPUTarget:
        if self.is_cuda:
            return GPUTarget("cuda", self.architecture, 32)
        return GPUTarget("hip", self.architecture, 64)

    def get_current_device(self) -> Architecture:
        return self.architecture

    def set_current_device(self, device: Architecture) -> None:
        pass

    def get_current_stream(self, device: Architecture) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(device, 10)


@cache
def _driver() -> _Driver:
    """The stub driver, which this process keeps as Triton's driver: Triton asks it to unload its kernels at the end."""
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1: the stub driver needs kernels that are compiled, not interpreted")
    if torch.cuda.is_available():
        raise RuntimeError("the stub driver replaces the GPU's: hide the GPU (CUDA_VISIBLE_DEVICES=)")
    triton.knobs.nvidia.libcuda_path = str(Path(_library()._name).parent)
    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    return driver


@cache
def _library() -> ctypes.CDLL:
    """The stub of libcuda, built on first use into Triton's cache and loaded for everything that links to libcuda."""
    source = SOURCE.read_bytes()
    folder = get_cache_manager(hashlib.sha256(source).hexdigest())
    path = folder.get_file(LIBRARY)
    if path is None:
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        with tempfile.TemporaryDirectory() as build:
            output = Path(build) / LIBRARY
            flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{include}"]
            subprocess.run(["cc", *flags, "-o", output, SOURCE], check=True)
            path = folder.put(output.read_bytes(), LIBRARY)
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
