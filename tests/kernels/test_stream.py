"""`AMFlowStream`: the flows of a whole clip, frame by frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import AMFlowStream, am_flow
from amflow_kernels import testing as tt

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]


@pytest.mark.parametrize("groups", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"lag": 3}, {"scale": 0.3, "temperature": 0.5, "head_reduction": "mean", "center": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flows_have_the_bits_of_the_whole_clip(
    groups: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, impl: str
) -> None:
    """Even if the memory of a frame is overwritten after the call."""
    q, k = tt.make_qk(2, 6, groups, 35, 50, 24, dtype=dtype)
    clip = am_flow(q, k, impl=impl, **options)
    stream = AMFlowStream(impl=impl, **options)
    lag = options.get("lag", 1)
    memory = torch.empty_like(q[:, 0]), torch.empty_like(k[:, 0])
    for t in range(6):
        flow = stream(*(x.copy_(frames[:, t]) for x, frames in zip(memory, (q, k), strict=True)))
        if t < lag:
            assert flow is None
        else:
            assert torch.equal(flow, clip[:, t - lag])


def test_reset_begins_another_video() -> None:
    stream = AMFlowStream()
    q = torch.randn(1, 2, 5, 4)
    assert stream(q, q) is None
    assert stream(q, q) is not None
    stream.reset()
    other = torch.randn(2, 2, 7, 4)
    assert stream(other, other) is None
    assert stream(other, other).shape == (2, 2, 7)


def test_nothing_is_kept_for_a_gradient() -> None:
    stream = AMFlowStream()
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    stream(q, q)
    assert not stream(q, q).requires_grad


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (1, 2, 5, 4), dtype=dtype)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "not a tensor": (None, x(), TypeError, r"q: expected a torch\.Tensor, got NoneType"),
    "a clip": (x(), x(1, 3, 2, 2, 5, 4), ValueError, r"k: expected one frame.*got 6 dimensions: \(1, 3, 2, 2, 5, 4\)"),
    "keys": (x(), x(1, 2, 5, 3), ValueError, r"k: expected the shape of q"),
    "shape": (x(1, 2, 6, 4), x(), ValueError, r"q: expected the shape of the frame before, .*5, 4.*reset\(\)"),
    "dtype": (x(dtype=torch.float16), x(dtype=torch.float16), ValueError, r"q: expected the dtype of the frame before"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_frames_raise_and_leave_the_stream_as_it_was(name: str) -> None:
    """Whether or not a flow is due."""
    q, k, error, message = BAD[name]
    for lag in (1, 2):
        stream = AMFlowStream(lag=lag)
        stream(x(), x())
        with pytest.raises(error, match=message):
            stream(q, k)
        flow = stream(x(), x())
        assert (flow is None) is (lag == 2)


def test_bad_options_raise() -> None:
    for lag, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="lag: expected"):
            AMFlowStream(lag=lag)
    with pytest.raises(ValueError, match="temperature: expected at least 1/64"):
        AMFlowStream(temperature=0.0)
    with pytest.raises(ValueError, match="impl: expected None or one of"):
        AMFlowStream(impl="gpu")
