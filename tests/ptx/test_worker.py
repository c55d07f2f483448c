"""Calls that run in another process."""

from __future__ import annotations

import pytest
import torch

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from tests.ptx import worker
from tests.ptx.machine import Fault

pytest.importorskip("triton", reason="Triton is not installed")


def test_what_a_forward_left_unwritten_is_unwritten_in_the_backward(sm_80: worker.Remote) -> None:
    """And a fault there is raised here."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (1,), 20, 66, 16, dtype=torch.bfloat16))
    flow = am_flow(q, k, impl="triton")
    ((_, written),) = sm_80._saved.values()
    assert written is not None
    written.zero_()
    with pytest.raises(Fault, match="uninitialised") as caught:
        flow.sum().backward()
    assert "am_flow_bwd_strip_q_kernel" in str(caught.value)
