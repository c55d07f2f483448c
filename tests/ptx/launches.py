"""One launch on the machine for PTX, as a driver or a runtime of CUDA is asked for it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from tests.ptx import machine


class Launch(NamedTuple):
    """A launch that was executed."""

    kernel: str
    report: machine.Report


def execute(
    ptx: str,
    name: str | None,
    sizes: Any,
    parameters: Any,
    regions: list[machine.Region],
    *,
    seed: int,
    fp_fusion: bool,
) -> Launch:
    """Executes a kernel of a PTX text: the one with that name, or the only one.

    sizes: those of the grid and of a block in x, y and z, and the bytes of dynamic shared memory.
    parameters: ctypes' pointer to an array of pointers to their values.
    regions: the memory that it may touch.
    fp_fusion: whether the assembler may fuse products into sums.
    """
    kernel = _loaded(ptx, name, fp_fusion)
    packed = bytearray(kernel.parameter_bytes)
    for n, (_, offset, size) in enumerate(kernel.parameters):
        packed[offset : offset + size] = ctypes.string_at(parameters[n], size)
    report = kernel.run(
        grid=tuple(sizes[:3]), block=tuple(sizes[3:6]), parameters=bytes(packed), shared=sizes[6], memory=regions,
        seed=seed,
    )  # fmt: skip
    return Launch(kernel.name, report)


@cache
def _loaded(ptx: str, name: str | None, fp_fusion: bool) -> machine.Kernel:
    return machine.load(ptx, name, fp_fusion=fp_fusion)
