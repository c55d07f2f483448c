"""The CUDA kernels on the CPU: compiled by the host compiler against simt.h, for tests alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from amflow_kernels import _build, ops
from amflow_kernels.impl import cuda

HERE = Path(__file__).parent
_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-march=native", "-Wall", "-Wno-unknown-pragmas"]


def build(folder: Path) -> Path:
    """The library, of the sources that `_build.CUDA` lists."""
    library, sources = folder / "amflow_simt.so", _build.source_dir()
    torch_dir = Path(torch.__file__).parent
    headers = ["-DAMFLOW_SIMT", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", "-isystem", torch_dir / "include"]
    compilers = []
    for name, (source, own) in _build.CUDA.objects.items():
        command = [_build.compiler(), *_FLAGS, *headers, *own, "-x", "c++", "-c", sources / source, "-o", folder / name]
        compilers.append(subprocess.Popen([str(word) for word in command]))
    assert not any([compiler.wait() for compiler in compilers])
    objects = [str(folder / name) for name in _build.CUDA.objects]
    subprocess.run(
        [_build.compiler(), "-shared", *objects, "-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"], check=True
    )
    return library
