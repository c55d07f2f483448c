"""Compiles the native library: the one list of sources and flags, used on first use and by setup.py.

The kernels know no torch headers and are compiled once per instruction set; the bindings use torch's stable ABI.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

LIBRARY = "amflow_native.so"
LOG = "build.log"

# -ffp-contract=off: identical frames must give exactly 0, so a * b - c * d may not become an FMA.
# TORCH_TARGET_VERSION: of the stable ABI only what torch 2.11 has, so that every later torch loads the library.
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
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_SOURCES = ("am_flow", "matmul")  # in csrc/cpu, each compiled for every instruction set
_ISAS = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}
_OBJECTS: dict[str, tuple[str, list[str]]] = {
    "bindings.o": ("bindings.cpp", []),
    **{
        f"{source}_{isa}.o": (f"cpu/{source}.cpp", [f"-DAMFLOW_ISA={isa}", *flags])
        for source in _SOURCES
        for isa, flags in _ISAS.items()
    },
}


class BuildError(RuntimeError):
    """The native library could not be compiled; the message is the reason, for people to read."""


def source_dir() -> Path:
    """The C++ sources: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "bindings.cpp").is_file():
            return candidate
    raise BuildError(f"the C++ sources are missing from {package}")


def compiler() -> str:
    """The C++ compiler: $CXX if that is set, else c++, g++ or clang++, whichever is found first."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"$CXX, {chosen}, was not found" if chosen else "no C++ compiler found (c++, g++ or clang++)")


def source_key() -> str:
    """A hash of the sources and of how they are compiled."""
    digest, sources = hashlib.sha256(Path(__file__).read_bytes()), source_dir()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".cpp", ".h")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def build_key() -> str:
    """A hash of all that a library built here depends on: `source_key`, the compiler and the torch version."""
    if sys.platform != "linux":
        raise BuildError(f"the native library is built on Linux only, this is {sys.platform}")
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(repr((source_key(), cxx, version, torch.__version__)).encode()).hexdigest()[:20]


def compile_library(folder: Path) -> Path:
    """Compiles LIBRARY in `folder`, in parallel. The output of the compiler goes to LOG there."""
    sources, torch_dir = source_dir(), Path(torch.__file__).parent
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_ninja_escape(compiler())}",
        f"flags = {' '.join(_FLAGS)} -isystem {_ninja_escape(str(torch_dir / 'include'))}",
        f"libs = -L{_ninja_escape(str(torch_dir / 'lib'))} -ltorch_cpu",
        "rule compile",
        "  command = $cxx $flags $isa -c $in -o $out",
        "rule link",
        "  command = $cxx -shared $in $libs -o $out",
    ]
    for name, (source, isa) in _OBJECTS.items():
        lines += [f"build {name}: compile {_ninja_escape(str(sources / source))}", f"  isa = {' '.join(isa)}"]
    lines += [f"build {LIBRARY}: link {' '.join(_OBJECTS)}", f"default {LIBRARY}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    log = folder / LOG
    with log.open("w") as out:
        status = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder)], stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BuildError(f"compiling failed (exit status {status}):\n{tail}")
    return folder / LIBRARY


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
