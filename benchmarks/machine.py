"""The machine and the versions on which measurements depend."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import amflow_kernels
from amflow_kernels.doctor import cpu_model
from benchmarks.timing import cache_bytes

# Variables that keep PyTorch, oneDNN and MKL from using all that the processor has.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine() -> dict[str, Any]:
    """Processor, threads and versions; nothing that identifies this machine."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amflow_kernels": amflow_kernels.__version__,
    }
