"""Peak working memory of one call in a separate process, allocations of native code included.

python -m benchmarks.memory ours 1x4x6x1370x64 forward
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.providers import DIRECTIONS, PROVIDERS, Provider, make_inputs
from benchmarks.shapes import Shape

Result = TypeVar("Result")
WARM_UP = Shape(1, 2, 2, 33, 64)


def measure(provider: Provider, shape: Shape, direction: str, threads: int) -> dict[str, object]:
    """Runs the probe in a fresh process; `bytes` is the working memory besides inputs and results."""
    command = [sys.executable, "-m", "benchmarks.memory", provider.name, str(shape), direction, "--threads"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([*command, str(threads)], cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def probe(provider: Provider, shape: Shape, direction: str) -> dict[str, object]:
    """Peak resident memory during one call, minus the resident memory before it and minus the results."""
    call = provider.prepare(shape, direction)
    warm_up = shape if provider.compiles else WARM_UP  # loads libraries, starts thread pools, compiles
    call(make_inputs(warm_up, provider.dtype, provider.device, direction))
    inputs = make_inputs(shape, provider.dtype, provider.device, direction)
    growth, method, results = peak_growth(lambda: call(inputs))
    result_bytes = sum(result.nbytes for result in results)
    return {
        "shape": str(shape),
        "provider": provider.name,
        "label": provider.label,
        "direction": direction,
        "dtype": str(provider.dtype).removeprefix("torch."),
        "bytes": max(0, growth - result_bytes),
        "result_bytes": result_bytes,
        "method": method,
    }


def peak_growth(call: Callable[[], Result]) -> tuple[int, str, Result]:
    """Growth of peak resident memory during a call in bytes, the source of this figure, and the result of the call."""
    gc.collect()
    _return_free_memory()
    peak_was_reset = _reset_peak()
    before = _status("VmRSS") if peak_was_reset else _max_rss()
    result = call()
    peak = _status("VmHWM") if peak_was_reset else _max_rss()
    return peak - before, "VmHWM" if peak_was_reset else "ru_maxrss", result


def _return_free_memory() -> None:
    """Returns freed heap to the system: reusing it would hide memory that the call takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _reset_peak() -> bool:
    """Resets the recorded peak to the current resident memory (Linux). False where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field}")


def _max_rss() -> int:
    """Peak resident memory since the process started, which a call raises only if it exceeds all earlier peaks."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Prints the figures of one probe as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("provider", choices=list(PROVIDERS))
    parser.add_argument("shape", type=Shape.parse, metavar="BxTxHEADSxNxD")
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(probe(PROVIDERS[args.provider], args.shape, args.direction)))


if __name__ == "__main__":
    main()
