"""Everything is in pyproject.toml; this only compiles the native library ahead of time when asked to:

AMFLOW_BUILD=1 pip install . --no-build-isolation     (torch, ninja and a C++ compiler must be there)
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


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if importlib.util.find_spec("torch") is None:
            raise SystemExit("AMFLOW_BUILD=1 needs torch at build time: install it, then pass --no-build-isolation")
        sys.path.insert(0, str(ROOT))
        from amflow_kernels import _build, _ext

        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "amflow_kernels"
        with tempfile.TemporaryDirectory() as scratch:
            _ext.install(_build.compile_library(Path(scratch)), _ext.ahead_of_time(target))


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if os.environ.get("AMFLOW_BUILD", "0") not in ("", "0"):
    setup(cmdclass={"build_py": BuildWithLibrary}, distclass=BinaryDistribution)
else:
    setup()
