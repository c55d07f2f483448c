"""Kernels for tests of the machine, written by hand."""

from __future__ import annotations

import struct
from typing import Any

from torch import Tensor

from tests.ptx import machine

DECLARATIONS = """
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<80>;
.reg .b64 %d<16>;
"""
# %d1 and %d2: the tensors; %r1: the thread; %d3 and %d4: their elements of 4 bytes of this thread; %r2: bytes to it
START = """
ld.param.u64 %d1, [a];
ld.param.u64 %d2, [b];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
cvt.u64.u32 %d3, %r2;
add.s64 %d4, %d2, %d3;
add.s64 %d3, %d1, %d3;
mov.b32 %r3, shared;
add.s32 %r3, %r3, %r2;
"""


def kernel(body: str, before: str = "") -> machine.Kernel:
    """A kernel of two tensors, with dynamic shared memory: %r3 is the address of this thread's word there."""
    return machine.load(
        f""".version 8.0
        .target sm_90a
        {before}
        .extern .shared .align 1024 .b8 shared[];
        .visible .entry tested(.param .u64 a, .param .u64 b)
        {{ {DECLARATIONS} {START} {body}
        ret; }}"""
    )


def region(x: Tensor, shadow: Tensor | None = None) -> machine.Region:
    return machine.Region(x.data_ptr(), x.nbytes, "a tensor", shadow)


def run(
    body: str,
    a: Tensor,
    b: Tensor,
    *,
    threads: int = 64,
    blocks: int = 1,
    shared: int = 4096,
    seed: int = 0,
    before: str = "",
    **shadow: Any,
) -> machine.Report:
    return kernel(body, before).run(
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        parameters=struct.pack("QQ", a.data_ptr(), b.data_ptr()),
        shared=shared,
        memory=[region(a, **shadow), region(b)],
        seed=seed,
    )
