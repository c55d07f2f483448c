"""Everything is in pyproject.toml; this only compiles the native library ahead of time when asked to:

AMFLOW_BUILD=1 pip install . --no-build-isolation     (torch and a C++ compiler must be there)
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        from amflow_kernels import _build, _ext

        target = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        with tempfile.TemporaryDirectory() as scratch:
            _ext.install(_build.compile_library(Path(scratch)), target / "amflow_kernels" / _build.LIBRARY)


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if os.environ.get("AMFLOW_BUILD", "0") not in ("", "0"):
    setup(cmdclass={"build_py": BuildWithLibrary}, distclass=BinaryDistribution)
else:
    setup()
