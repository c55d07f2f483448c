"""Compiles, without a GPU, every kernel that the GPU suite launches on an H100.

python -m benchmarks.gpu.warm_cache           in an environment of its own, with the versions of the suite's machine
python -m benchmarks.gpu.warm_cache --here    with this Python and its packages

Writes gpu_cache/kernels.tar.xz, which git ignores. The suite finds it in that place on any machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "numpy")
ENVIRONMENT = ROOT / "build" / "gpu_cache_environment"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.warm_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--here", action="store_true", help="use this Python and its packages")
    parser.add_argument("--limit", type=int, help="compile only so many kernels: a trial")
    arguments = parser.parse_args()
    if arguments.here:
        return _warm(arguments.limit)
    command = [str(_environment()), "-m", "benchmarks.gpu.warm_cache", "--here", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT).returncode


def _environment() -> Path:
    """The Python of an environment with the packages of the suite's machine."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        wanted = shutil.which(f"python{PYTHON}")
        if not wanted or subprocess.run([wanted, "--version"], capture_output=True).returncode:
            print(f"There is no Python {PYTHON} here: Python {sys.version.split()[0]} compiles the kernels")
            wanted = sys.executable
        subprocess.run([wanted, "-m", "venv", str(ENVIRONMENT)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def _warm(limit: int | None) -> int:
    from benchmarks.gpu import kernel_cache, plan  # need torch and Triton
    from benchmarks.gpu.problems import H100

    shutil.rmtree(kernel_cache.FOLDER, ignore_errors=True)
    kernel_cache.install()
    jobs = list(plan.needed(plan.cases(dry=False), H100, 90))[:limit]
    failed = plan.fill(jobs, H100, 90, os.cpu_count() or 1)
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    packed = kernel_cache.pack(len(jobs) - len(failed), jobs[0][1].target)
    print(f"{kernel_cache.ARCHIVE.relative_to(ROOT)}: {packed}")
    return 1 if failed or packed["bytes"] > kernel_cache.LARGEST_ARCHIVE else 0


if __name__ == "__main__":
    sys.exit(main())
