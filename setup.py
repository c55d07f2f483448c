"""What pyproject.toml can't say: libraries compiled ahead of time, and the README's links on a package index.

AMFLOW_BUILD=1 pip install . --no-build-isolation     (needs torch, ninja and a C++ compiler)
AMFLOW_CUDA=1 pip install . --no-build-isolation      (needs nvcc too; for the GPUs in TORCH_CUDA_ARCH_LIST)
"""

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
PICTURES = (".gif", ".jpg", ".png", ".svg")


def asked_for(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


AHEAD_OF_TIME = asked_for("AMFLOW_BUILD") or asked_for("AMFLOW_CUDA")


class LinkedDistribution(Distribution):
    """The README's relative links lead to the repository if [project.urls] has its address, as Source."""

    def parse_config_files(self, *arguments: Any, **options: Any) -> None:
        super().parse_config_files(*arguments, **options)
        source = (self.metadata.project_urls or {}).get("Source")
        if source:
            self.metadata.long_description = absolute_links(
                self.metadata.long_description, source.rstrip("/"), self.metadata.version
            )

    def has_ext_modules(self) -> bool:
        return AHEAD_OF_TIME


def absolute_links(readme: str, source: str, version: str) -> str:
    """Markdown whose relative links lead to the files of a version's tag, those of pictures to their bytes."""

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link[0].endswith(PICTURES) else "blob"
        return f"{source}/{view}/v{version}/{link[0]}"

    return re.sub(r"(?<=\]\()(?![a-z]+:|#)[^)\s]+", absolute, readme)


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


class PlatformWheel(bdist_wheel):
    """The libraries use no API of Python and the stable one of torch: one wheel serves every version of both."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=LinkedDistribution,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel} if AHEAD_OF_TIME else {},
)
