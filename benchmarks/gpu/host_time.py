"""Host time of a call: Python, PyTorch's dispatch and Triton's launcher, without a GPU.

python -m benchmarks.gpu.host_time

Over the stub driver, with CPU tensors so small that PyTorch's own kernels take next to no time. On a GPU, the driver's
launch and PyTorch's CUDA kernels come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from time import perf_counter
from unittest import mock

import torch

from amflow_kernels import am_flow
from amflow_kernels.impl.triton import launch
from amflow_kernels.problem import Problem
from benchmarks.gpu import stub_driver
from benchmarks.tables import Table

CALLS = 3000
NEEDS = (True, True, False, False)  # gradients of q and k
SHAPES = {"strips": (1, 3, 2, 33, 64), "tiles": (1, 3, 2, 33, 72)}  # (B, T, heads, N, D): D decides


def microseconds(call: Callable[[], object]) -> list[str]:
    """Quartiles of the host time of a call."""
    times = []
    for _ in range(CALLS):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return [f"{1e6 * x:.1f}" for x in quantiles(times)]


def rows() -> list[list[str]]:
    """Quartiles for the forward and the backward of every shape, of the host code alone and of the public function."""
    table = []
    unrecorded = launch.run
    with stub_driver.machine(90) as launches:
        for path, shape in SHAPES.items():
            q, k = torch.zeros(2, *shape, dtype=torch.bfloat16).unbind()
            problem = Problem(q, k)
            flow, saved = launch.am_flow(problem)
            calls: dict[str, Callable[[], object]] = {
                "host code, forward": partial(launch.am_flow, problem),
                "host code, backward": partial(launch.am_flow_backward, problem, flow, saved, NEEDS),
                "am_flow": partial(am_flow, q, k, impl="triton"),
            }
            for name, call in calls.items():
                launches.clear()
                call()
                with mock.patch.object(launch, "run", unrecorded):
                    table.append([path, name, str(len(launches)), *microseconds(call)])
    return table


def main() -> None:
    """The command."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    torch.set_num_threads(1)
    heads = ["path", "call", "launches", "quartile", "median us", "quartile"]
    print(Table("Host time", heads, rows(), []).plain())


if __name__ == "__main__":
    main()
