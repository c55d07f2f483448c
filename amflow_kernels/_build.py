"""Compiles the native libraries, on first use and for setup.py: the only list of their sources and flags.

Only the bindings include torch headers, those of the stable ABI. The CPU kernels are compiled once per instruction set,
the CUDA kernels once per dtype.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LOG = "build.log"

# -ffp-contract=off, -fmad=false: identical frames must give exactly 0, so a * b - c * d must not become an FMA.
# TORCH_TARGET_VERSION: use only the stable ABI of torch 2.11, so that every later torch can load the library.
_FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
]
_NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # without TORCH_CUDA_ARCH_LIST and without a GPU
_NVCC_BYTES = 2 << 30  # memory that one nvcc process may need
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# -fno-schedule-insns: otherwise GCC moves all loads of a product to its beginning, and spills.
_ARM = "-fno-schedule-insns"
_ISAS = {  # by machine: the instruction sets and their flags
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]},
    "aarch64": {"neon": ["-march=armv8-a", _ARM], "neon_bf16": ["-march=armv8.2-a+bf16", _ARM]},
}
MACHINE = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())  # macOS calls it arm64


@dataclass(frozen=True)
class Library:
    """A native library and how to compile it; paths are relative to csrc."""

    name: str
    title: str  # for messages: its contents and how long it takes to compile
    sources: tuple[str, ...]  # the folders that it is compiled from
    objects: dict[str, tuple[str, list[str]]]  # object file: its source and its own flags

    @property
    def file(self) -> str:
        return f"{self.name}.so"

    @property
    def cuda(self) -> bool:
        """Whether nvcc compiles it."""
        return any(source.endswith(".cu") for source, _ in self.objects.values())


def cpu_library(machine: str) -> Library:
    """The CPU kernels for a machine as `platform` names it on Linux, for all of its instruction sets."""
    return Library(
        "amflow_native",
        "the CPU kernels, some 20 s",
        ("cpu",),
        {
            "bindings.o": ("cpu/bindings.cpp", []),
            **{
                f"{source}_{isa}.o": (f"cpu/{source}.cpp", [f"-DAMFLOW_ISA={isa}", *flags])
                for source in ("am_flow", "matmul")
                for isa, flags in _ISAS.get(machine, {}).items()
            },
        },
    )


CPU = cpu_library(MACHINE)
CUDA = Library(
    "amflow_cuda",
    "the CUDA kernels, a minute or two",
    ("cuda",),
    {
        "bindings.o": ("cuda/bindings.cpp", []),
        "am_flow.o": ("cuda/am_flow.cu", []),
        **{
            f"forward_{dtype}.o": ("cuda/forward.cu", [f"-DAMFLOW_DTYPE={dtype}"]) for dtype in ("float", "bf16", "f16")
        },
    },
)


class BuildError(RuntimeError):
    """The native library could not be compiled; the message tells the user why."""


def source_dir() -> Path:
    """The folder csrc: in an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cpu" / "bindings.cpp").is_file():
            return candidate
    raise BuildError(f"the C++ sources are missing from {package}")


def compiler() -> str:
    """The C++ compiler: $CXX if set, otherwise the first of c++, g++ and clang++ on the path."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"$CXX, {chosen}, was not found" if chosen else "no C++ compiler found (c++, g++ or clang++)")


def nvcc() -> str:
    """nvcc: from $CUDA_HOME if set, otherwise from the path or from /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or (
        None if home else shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if found:
        return found
    where = f"in $CUDA_HOME/bin, {home}/bin" if home else "on the path, and CUDA_HOME is not set"
    raise BuildError(f"the CUDA kernels are compiled by nvcc, which was not found {where}")


def architectures() -> list[str]:
    """nvcc options for $TORCH_CUDA_ARCH_LIST, otherwise for this machine's GPUs, otherwise for _ARCHITECTURES."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not listed and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
        listed = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    options = []
    for word in re.split(r"[;\s]+", listed or _ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected numbers as in '8.0;9.0+PTX', got {word!r}")
        major, minor, ptx = match.groups()
        if int(major) < 8:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need compute capability 8.0 or more, got {word}")
        options.append(f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}")
        if ptx:
            options.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    return options


def source_key(library: Library) -> str:
    """A hash of a library's sources and of this file, which has their flags."""
    digest, sources = hashlib.sha256(Path(__file__).read_bytes()), source_dir()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".cpp", ".cu", ".h")):
        if path.relative_to(sources).parts[0] in library.sources:
            digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def build_key(library: Library) -> str:
    """A hash of everything that a build on this machine depends on: `source_key`, compilers, GPUs, torch version, and
    the kind of machine, since machines of two kinds may share a home.
    """
    if sys.platform != "linux" and (library.cuda or (sys.platform, MACHINE) != ("darwin", "aarch64")):
        where = "on Linux" if library.cuda else "on Linux and on macOS with Apple silicon"
        raise BuildError(f"{library.title.split(',')[0]} are built {where} only, this is {sys.platform} on {MACHINE}")
    compilers = [compiler(), *([nvcc()] if library.cuda else [])]
    versions = [
        subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout for path in compilers
    ]
    options = architectures() if library.cuda else []
    parts = (source_key(library), compilers, versions, options, torch.__version__, sys.platform, MACHINE)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def compile_library(library: Library, folder: Path, say: Callable[[str], None] | None = None) -> Path:
    """Compiles a library in `folder`, in parallel. The compilers' output goes to the file LOG there.

    `say` gets a line when a file is done: how many are, of how many, and its name.
    """
    if importlib.util.find_spec("ninja") is None:
        raise BuildError("the build tool ninja is not installed: pip install ninja")
    sources, torch_dir = source_dir(), Path(torch.__file__).parent
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_ninja_escape(compiler())}",
        f"flags = {' '.join(_FLAGS)} -isystem {_ninja_escape(str(torch_dir / 'include'))}",
        # Torch is loaded already. On macOS its libraries are named relative to a path that is not known here.
        "libs = -undefined dynamic_lookup"
        if sys.platform == "darwin"
        else f"libs = -L{_ninja_escape(str(torch_dir / 'lib'))} -ltorch_cpu",
        "rule cxx",
        "  command = $cxx $flags $own -c $in -o $out",
        "  description = $out",
        "rule link",
        "  command = $cxx -shared $in $libs -o $out",
        "  description = $out",
    ]
    if library.cuda:
        options = " ".join([*_NVCC_FLAGS, *architectures()])
        lines += [
            f"nvcc = {_ninja_escape(nvcc())} -ccbin $cxx",
            "rule nvcc",
            f"  command = $nvcc {options} $own -c $in -o $out",
            "  description = $out",
            "rule link_cuda",
            "  command = $nvcc -shared $in $libs -o $out",
            "  description = $out",
        ]
    for name, (source, own) in library.objects.items():
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines += [f"build {name}: {rule} {_ninja_escape(str(sources / source))}", f"  own = {' '.join(own)}"]
    rule = "link_cuda" if library.cuda else "link"
    lines += [f"build {library.file}: {rule} {' '.join(library.objects)}", f"default {library.file}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    log = folder / LOG
    jobs = ["-j", str(_nvcc_jobs())] if library.cuda else []
    command = [sys.executable, "-m", "ninja", "-C", str(folder), *jobs]
    env = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as ninja,
    ):
        assert ninja.stdout is not None
        for line in ninja.stdout:
            out.write(line)
            if say is not None and re.match(r"\[\d+/\d+\] ", line):
                say(line.rstrip())
    status = ninja.returncode
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BuildError(f"compiling failed (exit status {status}):\n{tail}")
    return folder / library.file


def _nvcc_jobs() -> int:
    """Number of parallel compilers: $MAX_JOBS, or as many as processors and memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(free[1]) * 1024 // _NVCC_BYTES if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
