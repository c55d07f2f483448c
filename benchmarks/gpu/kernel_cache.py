"""A folder of compiled kernels that can be filled on one machine and used on another.

Triton's own cache can't: its key holds a hash of all files of the installation, and its groups of files hold absolute
paths. `install` makes this process use the folder `FOLDER`, by a key of Triton's version, architecture, the kernel's
source and its options; `pack` and `unpack` carry it elsewhere. `record` tells which kernels a call would launch,
without a GPU and without compiling anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager

from amflow_kernels.impl.triton import configs
from benchmarks.gpu import stub_driver

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu_cache"  # of the kernels of this machine
ARCHIVE = ROOT / "gpu_cache" / "kernels.tar.xz"  # what travels
MANIFEST = ROOT / "gpu_cache" / "manifest.json"
LARGEST_ARCHIVE = 48 << 20  # bytes
PREFIX = "am_flow_"  # of the names of our kernels


class MovableFiles(FileCacheManager):
    """Finds the files of a kernel beside each other, wherever the folder lies now."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        group = Path(self.cache_dir) / f"__grp__{filename}"
        if not group.exists():
            return None
        files = (group.parent / name for name in json.loads(group.read_text())["child_paths"])
        return {file.name: str(file) for file in files if file.exists()}  # the archive leaves out sources


def key(src: Any, backend: Any, options: Any, env_vars: dict[str, str]) -> str:
    """In place of `triton.runtime.cache.get_cache_key`. `extern_libs` are paths within the installation."""
    chosen = {name: value for name, value in sorted(vars(options).items()) if name != "extern_libs"}
    return f"{triton.__version__}-{backend.target}-{src.hash()}-{chosen}-{sorted(env_vars.items())}"


@dataclass
class Lookups:
    """The kernels of this library that this process took from the folder, and those that it compiled."""

    hits: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    def listen(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        """What Triton calls after each compilation."""
        if src.name.startswith(PREFIX):
            (self.hits if cache_hit else self.misses).append(src.name)


def install(folder: Path = FOLDER) -> Lookups:
    """Make this process use the folder. Only binaries are kept in it."""
    lookups = Lookups()
    compiler.get_cache_key = key
    knobs.cache.dir = str(folder)
    knobs.cache.manager_class = MovableFiles
    knobs.compilation.store_binary_only = True
    knobs.compilation.listener = lookups.listen
    return lookups


@dataclass(frozen=True)
class Kernel:
    """A kernel as Triton's compiler is asked for it."""

    src: Any
    target: GPUTarget
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.src.name)

    @cached_property
    def digest(self) -> str:
        """What distinguishes it from all others."""
        backend = compiler.make_backend(self.target)
        options = backend.parse_options(dict(self.options))
        environment = compiler.get_cache_invalidating_env_vars()
        return hashlib.sha256(key(self.src, backend, options, environment).encode()).hexdigest()

    def folder(self) -> Path:
        """Where its files are once it is compiled."""
        return Path(knobs.cache.dir) / base64.b32encode(bytes.fromhex(self.digest)).decode().rstrip("=")

    def is_compiled(self) -> bool:
        return (self.folder() / f"__grp__{self.name}.json").exists()

    def compile(self) -> None:
        """Compile it, and the C code that launches it: Triton 3.6 has one for each signature."""
        compiled = triton.compile(self.src, target=self.target, options=self.options)
        no_gpu = nullcontext() if torch.cuda.is_available() else stub_driver.machine(self.target.arch)
        with no_gpu:
            CudaLauncher(self.src, compiled.metadata)


_devices = count(10**6)  # Triton does not ask again for a kernel of the same device


class _Driver:
    """A driver that knows only what Triton asks for before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.device = next(_devices)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _NotCompiled:
    """Stands for a compiled kernel whose launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        pass


@contextmanager
def record(device: configs.Device, architecture: int = 90) -> Iterator[list[Kernel]]:
    """Launches only append their kernels, each once: of this GPU, 90 for compute capability 9.0."""
    recorded: list[Kernel] = []

    def note(src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> _NotCompiled:
        recorded.append(Kernel(src, target, options))
        return _NotCompiled()

    with (
        mock.patch.object(driver, "_active", _Driver(GPUTarget("cuda", architecture, 32))),
        mock.patch.object(triton.compiler, "compile", note),
        mock.patch.object(configs.Device, "of", return_value=device),
    ):
        yield recorded


def versions() -> dict[str, str]:
    """What decides, beside the GPU, whether an archive serves a process; the launchers depend on Python's."""
    return {"triton": triton.__version__, "python": platform.python_version()}


def pack(kernels: int, target: GPUTarget) -> dict[str, Any]:
    """Write the binaries in the folder into the archive, and beside it what it holds, which is returned."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:xz", preset=4) as archive:
        for file in sorted(FOLDER.rglob("*")):
            if file.suffix != ".source" and file.name != stub_driver.LIBRARY and file.is_file():
                archive.add(file, file.relative_to(FOLDER))
    manifest = {**versions(), "target": str(target), "kernels": kernels, "bytes": ARCHIVE.stat().st_size}
    MANIFEST.write_text(json.dumps(manifest) + "\n")
    return manifest


def unpack() -> dict[str, Any]:
    """Put the archive's kernels into the folder; gives what the archive holds, nothing if there is none."""
    if not ARCHIVE.exists():
        return {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(FOLDER, filter="data")
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text())
    return manifest
