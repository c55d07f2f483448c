"""What the compiled Triton kernels execute for each element of a map, as the machine in tests/ptx counts it."""

from __future__ import annotations

from collections import Counter

import torch

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from tests.ptx import driver

ARCHITECTURES = (80, 90)  # whose instructions the machine knows
KINDS = ("MMA", "ex2", "fp32", "shuffle", "shared", "global")  # instructions of threads
ACCESSES = {  # by name here, the machine's counters, of warps
    "wavefronts": ("shared wavefronts",),
    "conflicts": ("shared conflicts",),
    "sectors": ("global sectors read", "global sectors written"),
}


def counts(dtype: torch.dtype, N: int, D: int, architecture: int) -> dict[str, dict[str, float]]:
    """By kernel of a forward and a backward, per element of a map in the steady state.

    That is what a clip of three frames takes more than one of two: a round of each kernel's loop over frames, padding
    and the work around its inner loops included.
    """
    two, three = (_executed(dtype, N, D, T, architecture) for T in (2, 3))
    found = {}
    for kernel, after in three.items():
        more = {name: (count - two[kernel][name]) / N**2 for name, count in after.items()}
        accesses = {name: sum(more.get(counter, 0.0) for counter in names) for name, names in ACCESSES.items()}
        found[kernel] = {**{kind: 32 * more.get(kind, 0.0) for kind in ("all", *KINDS)}, **accesses}
    return found


def _executed(dtype: torch.dtype, N: int, D: int, T: int, architecture: int) -> dict[str, Counter[str]]:
    """The machine's counts by kernel, for one head of one clip."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, T, (1,), N, N, D, dtype=dtype))
    with driver.gpu(architecture, processors=0) as gpu:  # nothing to keep busy: one program takes all pairs
        flow = am_flow(q, k, impl="triton")
        flow.backward(tt.make_dflow(flow.shape))
    names = [launch.kernel.removeprefix("am_flow_").removesuffix("_kernel") for launch in gpu.launches]
    return dict(zip(names, (launch.report.counts for launch in gpu.launches), strict=True))
