"""What runs on this machine: the text that ``amflow doctor`` and ``python -m amflow_kernels`` print."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import amflow_kernels


def report() -> str:
    """Versions, devices and the kernels that run here, in lines of text.

    Builds the native library if it is missing.
    """
    lines = [
        f"amflow_kernels {amflow_kernels.__version__}, {Path(amflow_kernels.__file__).parent}",
        f"python {platform.python_version()}, {platform.platform()}",
        f"triton {_version('triton')}",
        f"timm {_version('timm')}",
        *amflow_kernels.explain().lines,
        *(_describe_gpu(index) for index in range(torch.cuda.device_count())),
    ]
    if not torch.cuda.is_available():
        lines.append("devices: cpu only")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_gpu(index: int) -> str:
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {capability}"
