"""The motion operator's Triton kernels, in Triton's interpreter: the cases and checks of test_matmul.py, smaller."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_matmul as motion
import test_matrix as matrix
import test_triton as flow
import torch
from torch import library

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter"),
]

SMALL: dict[str, list[Any]] = {
    **motion.SHARED,
    "tokens": [(1, 1), (17, 17), (33, 70), (70, 33)],
    "C": [1, 3, 17, 70],
    "D": [1, 17, 64, 72],
    "frames": [(2, 1), (5, 2), (4, 0)],
    "logits": ["plain", "negative", "zero", "still"],
    "dtype": [torch.float32, torch.float16],
    "groups": [(1,), (2, 2)],
    "layout": ["contiguous", "fused_qkv", "offset"],
    "x_layout": ["contiguous", "offset"],
    "dy": ["contiguous", "expanded"],
}
TABLES = [
    {**SMALL, "operator": ["M", "M^T"], "temperature": [1.0]},
    {**SMALL, "operator": ["P", "P^T"], "temperature": [0.3, 1.0]},
]


def allowed(row: dict[str, Any]) -> bool:
    return matrix.allowed(row) and flow.cost(row) <= 24


CASES = [
    motion.Case(**row, seed=seed)
    for seed, row in enumerate(itertools.chain(*(matrix.pairwise(table, allowed) for table in TABLES)))
]


def always(*_: Any) -> bool:
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: motion.Case) -> None:
    """Products and the gradients that were asked for are within their budgets of the oracle."""
    motion.check_forward(case, "triton")
    motion.check_backward(case, "triton")


@pytest.mark.parametrize("operator", motion.OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_identical_frames(operator: str, dtype: torch.dtype) -> None:
    """Of equal frames M is exactly 0 and P exactly 1 / Nk, up to the rounding of a sum; dq and dk are exactly 0."""
    motion.test_identical_frames((17, 17), dtype, operator, "triton", always)


@pytest.mark.parametrize("transpose", [False, True])
def test_infinite_features(transpose: bool) -> None:
    """What is infinite in the last row stays in its column, as in the reference."""
    q, k = motion.tt.make_qk(1, 2, (1,), 5, 7, 6)
    x = motion.tt.make_features(q, k, 3, lag=1, transpose=transpose)
    x[..., -1, 1] = float("inf")
    y, want = (motion.am_flow_matmul(q, k, x, transpose=transpose, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(y, want)
    assert y.isinf().any()


@pytest.mark.parametrize("operator", motion.OPERATORS)
def test_opcheck(operator: str) -> None:
    """Both ops keep their schema, fake, autograd and dynamic-shape promises."""
    q, k = motion.tt.make_qk(1, 3, (1,), 5, 7, 6)
    transpose, softmax = motion.OPERATORS[operator]
    x = motion.tt.make_features(q, k, 3, lag=1, transpose=transpose)
    inputs = tuple(t.requires_grad_() for t in (q, k, x))
    arguments = (*inputs[:2], None, None, inputs[2], 0.3, 1, 1.0, transpose, softmax)
    library.opcheck(motion.matmul_ops.am_flow_matmul, (*arguments, "triton"))
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    dy = torch.randn(1, 2, 1, 7 if transpose else 5, 3)
    needs = [True, True, False, False, True]
    library.opcheck(motion.matmul_ops.am_flow_matmul_backward, (dy, *detached, needs, "triton"))
