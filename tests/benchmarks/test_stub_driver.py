"""The stub driver: what Triton would do on a GPU, without one. Kernels are compiled, so this takes fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

COMPILED = {"TRITON_INTERPRET": None}  # unset: the kernels are compiled

CALLS = """
import torch
from amflow_kernels import am_flow
from amflow_kernels.impl.triton import launch
from amflow_kernels.problem import Problem
from benchmarks.gpu import stub_driver

q, k = torch.zeros(2, 1, 3, 2, 20, 16, dtype=torch.bfloat16)
"""


def test_launches_reach_the_stub_of_libcuda(cold_python: Callable[..., Any]) -> None:
    """Public functions take CPU tensors, host code also tensors without storage; every launch is recorded."""
    code = """
with stub_driver.machine(90) as launches:
    am_flow(q, k, impl="triton")
    launch.am_flow(Problem(q.to("meta"), k.to("meta")))
assert [each.kernel for each in launches] == ["strip", "strip"]
assert launches[0].compiled is launches[1].compiled
assert launches[0].compiled.metadata.target.arch == 90
assert stub_driver.launches_of_the_library() == 2
"""
    cold_python(CALLS + code, env=COMPILED)


def test_a_kernel_too_large_for_the_gpu_raises(cold_python: Callable[..., Any]) -> None:
    """As on a GPU: the error names what the kernel needs and what there is."""
    code = """
from triton.runtime.errors import OutOfResources
stub_driver.SHARED[90] = 1024
with stub_driver.machine(90):
    try:
        am_flow(q, k, impl="triton")
    except OutOfResources as error:
        assert "Hardware limit: 1024" in str(error), error
    else:
        raise AssertionError("it ran")
"""
    cold_python(CALLS + code, env=COMPILED)


def test_the_interpreter_is_refused(cold_python: Callable[..., Any]) -> None:
    code = """
try:
    with stub_driver.machine(90):
        pass
except RuntimeError as error:
    assert "TRITON_INTERPRET=1" in str(error), error
else:
    raise AssertionError("it ran")
"""
    cold_python(CALLS + code, env={"TRITON_INTERPRET": "1"})
