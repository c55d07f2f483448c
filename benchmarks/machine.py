"""The machine and the versions on which measurements depend."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import amflow_kernels
from amflow_kernels.doctor import cpu_model
from benchmarks.timing import cache_bytes


def machine() -> dict[str, Any]:
    """Processor, threads and versions; nothing that identifies this machine."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amflow_kernels": amflow_kernels.__version__,
    }
