"""The matrix of compiled kernels, as far as it goes without compiling it all. Kernels compile in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

COMPILED = {"TRITON_INTERPRET": None}  # unset: the kernels are compiled


def test_the_matrix_reaches_every_kernel_once(cold_python: Callable[..., Any]) -> None:
    code = """
from amflow_kernels.impl.triton.kernels import backward, forward, matmul, strip, strip_backward
from benchmarks.gpu import compile_matrix

modules = (backward, forward, matmul, strip, strip_backward)
kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
found = compile_matrix.distinct(list(compile_matrix.tasks([90], quick=False)))
assert {f"am_flow_{task.launches()[n].name}_kernel" for task, n in found} == kernels
assert len(set(found)) == len(found)
"""
    cold_python(code, env=COMPILED)


def test_a_kernel_that_does_not_fit_is_a_finding(cold_python: Callable[..., Any]) -> None:
    code = """
from benchmarks.gpu import compile_matrix, stub_driver

task = compile_matrix.Task(90, "bfloat16", 16, 20)
assert compile_matrix.finding(task, 0) is None
stub_driver.SHARED[90] = 1024
found = compile_matrix.finding(task, 0)
assert found.startswith("strip, 90 bfloat16 N = 20, D = 16: OutOfResources"), found
"""
    cold_python(code, env=COMPILED)
