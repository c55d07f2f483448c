"""What a bug report needs, and what runs here: the text of ``amflow doctor`` and ``python -m amflow_kernels``.

Prints nothing that names the machine or its user, except where their folders do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import amflow_kernels
from amflow_kernels import _build, _ext
from amflow_kernels.dispatch import IMPLEMENTATIONS

VARIABLES = (  # those that change what is built or what runs
    "ATEN_CPU_CAPABILITY", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CXX", "MAX_JOBS", "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip
DEVELOPMENT = ("bench", "dev", "docs", "test")  # extras of which users need nothing
HEADINGS = ("kernels", "present", "usable here", "has run on this kind of GPU")


def report() -> str:
    """Versions, devices, tools, folders and the kernels that run here, in lines of text.

    Builds the native library of the CPU kernels if it is missing; on a GPU also that of the CUDA kernels.
    """
    table = [HEADINGS, *kernel_rows()]  # before the rest, since it may build
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADINGS))]
    return "\n".join(
        [
            f"amflow_kernels {amflow_kernels.__version__}, {Path(amflow_kernels.__file__).parent}",
            f"python {platform.python_version()}, {platform.platform()}",
            f"torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"cpu: {cpu_model()}, {os.cpu_count()} cores, capability {torch.backends.cpu.get_cpu_capability()} (torch)",
            f"compiler: {_tool(_build.compiler)}",
            f"nvcc: {_tool(_build.nvcc)}",
            *gpu_lines(),
            *package_lines(),
            *(f"cache of {name}: {_folder(folder)}" for name, folder in caches().items()),
            f"environment: {', '.join(f'{v}={os.environ[v]}' for v in VARIABLES if v in os.environ) or 'as it is'}",
            *("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in table),
        ]
    )


def kernel_rows() -> Iterator[tuple[str, str, str, str]]:
    """For each implementation with kernels: its name, and the columns of HEADINGS."""
    gpus = [torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())]
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.devices is None:
            continue
        for_gpus = "cuda" in implementation.devices
        why_not = "PyTorch finds no GPU" if for_gpus and not gpus else implementation.unavailable()
        usable = f"no: {why_not.splitlines()[0]}" if why_not else "yes"  # asked first, since this may build
        ran = ", ".join(_has_run(capability, implementation.ran_on) for capability in gpus) if for_gpus else ""
        yield name, implementation.presence(), usable, ran or "-"


def _has_run(capability: tuple[int, int], ran_on: frozenset[int]) -> str:
    major, minor = capability
    if torch.version.hip is not None:
        return "no (AMD)"
    return f"{'yes' if 10 * major + minor in ran_on else 'no'} (sm_{major}{minor})"


def package_lines() -> list[str]:
    """The versions of Triton and of all packages that the extras for users name, and those not installed."""
    try:
        requirements = importlib.metadata.requires("amflow-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return ["optional packages: not known, since amflow-kernels itself is not installed"]
    names = {"triton"}
    for line in requirements:
        extra, name = re.search(r"extra == ['\"](.*?)['\"]", line), re.match(r"[\w.-]+", line)
        if extra and name and extra[1] not in DEVELOPMENT and name[0] != "amflow-kernels":
            names.add(name[0])
    versions = {name: _version(name) for name in sorted(names, key=str.lower)}
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [name for name, version in versions.items() if not version]
    return [f"installed: {', '.join(installed) or 'none'}", f"not installed: {', '.join(missing) or 'none'}"]


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" in known:
        return known["model name"]
    arm = [f"{key[4:]} {known[key]}" for key in ("CPU implementer", "CPU part") if key in known]  # which has no name
    return ", ".join([platform.machine(), *arm])


def gpu_lines() -> list[str]:
    """PyTorch's GPUs, and the driver, which may be there although PyTorch finds no GPU."""
    try:
        driver = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = [f"{name} {version}" for name, version in versions.items() if version] or ["CPUs only"]
    lines = [f"gpu driver: {driver[1] if driver else 'none found'}; torch is built for {built_for[0]}"]
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        capability = f"compute capability {properties.major}.{properties.minor}"
        lines.append(f"cuda:{n} {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return lines if len(lines) > 1 else [*lines, "devices: cpu only"]


def caches() -> dict[str, Path]:
    """The folders in which compiled kernels are kept."""
    home = Path("~").expanduser()
    return {
        "amflow_kernels": _ext.cache_dir(),
        "Triton": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
    }


def _folder(path: Path) -> str:
    if not path.exists():
        return f"{path}, not made yet"
    return str(path) if os.access(path, os.W_OK) else f"{path}, which can't be written"


def _tool(find: Callable[[], str]) -> str:
    """A compiler's path and version, or why there is none."""
    try:
        path = find()
    except _build.BuildError as error:
        return f"none: {error}"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{path}, {_version_line(lines)}"


def _version_line(lines: Sequence[str]) -> str:
    """nvcc says its version in another line than the first."""
    return next((line for line in lines if "release" in line), lines[0] if lines else "which states no version")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
