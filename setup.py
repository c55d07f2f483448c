"""Compiles the native libraries ahead of time on request; everything else is in pyproject.toml.

AMFLOW_BUILD=1 pip install . --no-build-isolation     (needs torch, ninja and a C++ compiler)
AMFLOW_CUDA=1 pip install . --no-build-isolation      (needs nvcc too; for the GPUs in TORCH_CUDA_ARCH_LIST)
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def asked_for(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


class BuildWithLibraries(build_py):
    def run(self) -> None:
        super().run()
        if importlib.util.find_spec("torch") is None:
            variable = "AMFLOW_BUILD" if asked_for("AMFLOW_BUILD") else "AMFLOW_CUDA"
            raise SystemExit(f"{variable}=1 needs torch at build time: install it, then pass --no-build-isolation")
        sys.path.insert(0, str(ROOT))
        from amflow_kernels import _build, _ext

        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "amflow_kernels"
        libraries = {"AMFLOW_BUILD": _build.CPU, "AMFLOW_CUDA": _build.CUDA}
        for library in (library for variable, library in libraries.items() if asked_for(variable)):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    built = _build.compile_library(library, Path(scratch))
                except _build.BuildError as error:
                    raise SystemExit(f"compiling {library.title}: {error}") from error
                _ext.install(built, _ext.ahead_of_time(library, target))


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if asked_for("AMFLOW_BUILD") or asked_for("AMFLOW_CUDA"):
    setup(cmdclass={"build_py": BuildWithLibraries}, distclass=BinaryDistribution)
else:
    setup()
