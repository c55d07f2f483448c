"""`AMFlowStream`: the flows of a whole clip, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amflow_kernels import AMFlowStream, am_flow
from amflow_kernels import testing as tt

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]


@pytest.fixture(autouse=True)
def _one_seed_and_no_compiled_code() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


class Step(nn.Module):
    """A model's step on one frame: it projects the tokens, and its stream compares them with the frames before."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qk = nn.Linear(16, 48)
        self.stream = AMFlowStream(**options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k = self.qk(x).unflatten(-1, (2, 3, 8)).permute(2, 0, 3, 1, 4)
        return x.mean(1), self.stream(q, k)


@pytest.mark.parametrize("dynamic", [None, True, False], ids="dynamic={}".format)
@pytest.mark.parametrize("lag", [1, 3])
def test_a_compiled_step_gives_the_flows_of_the_eager_one(lag: int, dynamic: bool | None) -> None:
    """Frame by frame, in several videos of different sizes, whether or not some frames are computed eagerly."""
    eager, step = Step(lag=lag, center=True), Step(lag=lag, center=True)
    step.load_state_dict(eager.state_dict())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens, alternating in ((20, False), (20, True), (31, False)):
        for stream in (eager.stream, step.stream):
            stream.reset()
        for t, x in enumerate(torch.randn(lag + 4, 2, tokens, 16)):
            _, want = eager(x)
            _, flow = (step if alternating and t % 2 else compiled)(x)
            assert (flow is None) is (want is None) is (t < lag)
            if want is not None:
                assert flow.std() > 0
                torch.testing.assert_close(flow, want, rtol=0, atol=1e-6)


def test_a_compiled_stream_needs_few_graphs_for_any_lag() -> None:
    """Many graphs would exceed torch.compile's limit, after which it runs eagerly or raises."""
    stream = AMFlowStream(lag=12)
    compiled = torch.compile(lambda q, k: stream(q, k), backend="aot_eager", fullgraph=True)
    q, k = tt.make_qk(1, 16, (2,), 5, 5, 4)
    clip = am_flow(q, k, lag=12)
    for t in range(16):
        flow = compiled(q[:, t], k[:, t])
        assert flow is None if t < 12 else torch.equal(flow, clip[:, t - 12])


# Views with a contiguous last dimension, (T, B, heads, N, D), whose elements overlap or are not in order.
VIEWS: dict[str, Callable[[], Tensor]] = {
    "overlapping windows": lambda: torch.randn(5, 2, 3, 12).unfold(-1, 8, 1),
    "expanded heads": lambda: torch.randn(5, 2, 1, 9, 8).expand(-1, -1, 3, -1, -1),
    "expanded batch": lambda: torch.randn(5, 1, 3, 9, 8).expand(-1, 2, -1, -1, -1),
    "permuted": lambda: torch.randn(5, 2, 9, 3, 8).transpose(2, 3),
    "a slice of the head dimension": lambda: torch.randn(5, 2, 3, 9, 12)[..., 4:],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", VIEWS)
def test_frames_may_be_any_views_with_a_contiguous_last_dimension(name: str, compiled: bool) -> None:
    q, k = VIEWS[name](), VIEWS[name]()
    clip = am_flow(q.transpose(0, 1).contiguous(), k.transpose(0, 1).contiguous(), lag=2)
    stream = AMFlowStream(lag=2)
    step: Any = torch.compile(stream.__call__, backend="aot_eager", fullgraph=True) if compiled else stream
    flows = [step(*frame) for frame in zip(q, k, strict=True)]
    assert flows[:2] == [None, None]
    for t, flow in enumerate(flows[2:]):
        torch.testing.assert_close(flow, clip[:, t], rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["q", "k"])
def test_a_last_dimension_that_is_not_contiguous_is_refused_by_name(name: str, compiled: bool) -> None:
    """In the first frame and later, and the stream goes on as if that frame had not come."""
    stream = AMFlowStream()
    step: Any = torch.compile(stream.__call__, backend="aot_eager") if compiled else stream
    good = dict(zip("qk", torch.randn(2, 1, 2, 5, 4), strict=True))
    bad = {**good, name: torch.randn(1, 2, 4, 5).mT}
    for due in (False, True):
        with pytest.raises(ValueError, match=rf"^{name}: expected a contiguous last dimension, got strides"):
            step(**bad)
        assert (step(**good) is None) is not due


def test_a_video_may_begin_in_inference_mode_and_go_on_outside_of_it() -> None:
    q, k = tt.make_qk(1, 4, (2,), 5, 5, 4)
    clip = am_flow(q, k)
    stream = AMFlowStream()
    for t in range(4):
        with torch.inference_mode(t < 2):
            flow = stream(q[:, t], k[:, t])
        assert flow is None if t == 0 else torch.equal(flow, clip[:, t - 1])


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
