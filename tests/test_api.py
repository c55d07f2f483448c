"""The public functions: what they refuse and how they say it, empty input, and what they keep and give back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_pair, explain
from amflow_kernels import testing as tt

pytestmark = pytest.mark.capability

MustRun = Callable[[str, Callable[[], object]], bool]

GOOD = (2, 3, 2, 5, 4)  # B, T, heads, N, D


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or GOOD, dtype=dtype)


BAD_FRAMES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "not a tensor": (x(), [1.0], {}, TypeError, r"k: expected a torch\.Tensor, got list"),
    "integer": (x(dtype=torch.int64), x(), {}, TypeError, r"q: expected float32, bfloat16.*got torch\.int64"),
    "complex": (x(), x(dtype=torch.complex64), {}, TypeError, r"k: expected float32.*got torch\.complex64"),
    "8-bit float": (x(dtype=torch.float8_e4m3fn), x(), {}, TypeError, r"q: expected.*got torch\.float8_e4m3fn"),
    "4 dimensions": (x(2, 3, 5, 4), x(), {}, ValueError, r"q: expected \(B, T, heads, N, D\).*got 4.*\(2, 3, 5, 4\)"),
    "7 dimensions": (x(), x(1, 2, 1, 1, 1, 3, 4), {}, ValueError, r"k: expected \(B, T, heads, N, D\).*got 7 dim"),
    "ranks differ": (x(), x(2, 3, 2, 1, 5, 4), {}, ValueError, r"k: expected 5 dimensions as q, got 6"),
    "B differs": (x(), x(1, 3, 2, 5, 4), {}, ValueError, r"k: expected the shape of q.*\(2, 3, 2, 5, 4\), got \(1, 3"),
    "T differs": (x(), x(2, 4, 2, 5, 4), {}, ValueError, r"k: expected the shape of q.*got \(2, 4, 2, 5, 4\)"),
    "heads differ": (x(), x(2, 3, 1, 5, 4), {}, ValueError, r"k: expected the shape of q.*got \(2, 3, 1, 5, 4\)"),
    "windows differ": (x(2, 3, 2, 2, 5, 4), x(2, 3, 2, 3, 5, 4), {}, ValueError, r"k: expected the shape of q"),
    "D differs": (x(), x(2, 3, 2, 5, 3), {}, ValueError, r"k: expected the shape of q.*got \(2, 3, 2, 5, 3\)"),
    "dtype differs": (x(), x(dtype=torch.float16), {}, TypeError, r"k: expected the dtype of q, .*32, got.*16"),
    "device differs": (x(), x().to("meta"), {}, ValueError, r"k: expected the device of q, cpu, got meta"),
    "no heads": (x(2, 3, 0, 5, 4), x(2, 3, 0, 5, 4), {}, ValueError, r"q: expected at least one head.*\(2, 3, 0"),
    "no windows": (x(2, 3, 1, 0, 5, 4), x(2, 3, 1, 0, 5, 4), {}, ValueError, r"q: expected at least.*window"),
    "no queries": (x(2, 3, 2, 0, 4), x(), {}, ValueError, r"q: expected at least one token.*\(2, 3, 2, 0, 4\)"),
    "no keys": (x(), x(2, 3, 2, 0, 4), {}, ValueError, r"k: expected at least one token"),
    "D is 0": (x(2, 3, 2, 5, 0), x(2, 3, 2, 5, 0), {}, ValueError, r"q: expected a head dimension.*1 to 256, got 0"),
    "D is 257": (x(1, 2, 1, 1, 257), x(1, 2, 1, 1, 257), {}, ValueError, r"q: expected a head dimension.*256, got 257"),
    "q strided": (x(2, 3, 2, 4, 5).mT, x(), {}, ValueError, r"q: expected a contiguous last dimension, got strides"),
    "k strided": (x(), x(2, 3, 2, 5, 8)[..., ::2], {}, ValueError, r"k: expected a contiguous last dimension.*80.*2\)"),
    "lag 0": (x(), x(), {"lag": 0}, ValueError, r"lag: expected at least 1, got 0"),
    "lag negative": (x(), x(), {"lag": -1}, ValueError, r"lag: expected at least 1, got -1"),
    "lag a float": (x(), x(), {"lag": 1.0}, TypeError, r"lag: expected an int, got float"),
    "lag a bool": (x(), x(), {"lag": True}, TypeError, r"lag: expected an int, got bool"),
    "T is lag": (x(), x(), {"lag": 3}, ValueError, r"q: expected more frames.*than lag = 3, got T = 3"),
    "T is 0": (x(2, 0, 2, 5, 4), x(2, 0, 2, 5, 4), {}, ValueError, r"q: expected more frames.*lag = 1, got T = 0"),
}  # fmt: skip

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale NaN": ({"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
    "scale infinite": ({"scale": -math.inf}, ValueError, r"scale: expected a finite number, got -inf"),
    "scale a tensor": ({"scale": torch.ones(())}, TypeError, r"scale: expected a number, got Tensor"),
    "scale a string": ({"scale": "1"}, TypeError, r"scale: expected a number, got str"),
    "temperature low": ({"temperature": 0.0156}, ValueError, r"temperature: expected at least 1/64.*got 0\.0156"),
    "temperature 0": ({"temperature": 0}, ValueError, r"temperature: expected at least 1/64.*got 0\.0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, r"temperature: expected at least 1/64.*got -1\.0"),
    "temperature infinite": ({"temperature": math.inf}, ValueError, r"temperature: expected a finite number, got inf"),
    "temperature NaN": ({"temperature": math.nan}, ValueError, r"temperature: expected a finite number, got nan"),
    "temperature None": ({"temperature": None}, TypeError, r"temperature: expected a number, got NoneType"),
    "head_reduction": ({"head_reduction": "sum"}, ValueError, r"head_reduction: expected one of \('none'.*got 'sum'"),
    "head_reduction None": ({"head_reduction": None}, ValueError, r"head_reduction: expected one of.*got None"),
    "center": ({"center": 1}, TypeError, r"center: expected a bool, got int"),
    "impl": (
        {"impl": "gpu"},
        ValueError,
        r"impl: expected None or one of \('reference', 'cpu', 'triton', 'cuda'\), got 'gpu'",
    ),
}

BAD_PAIRS: dict[str, tuple[Any, Any, Any, Any, type[Exception], str]] = {
    "not a tensor": (x(), x(), None, x(), TypeError, r"q_b: expected a torch\.Tensor, got NoneType"),
    "k_a": (x(), x(2, 3, 2, 5, 3), x(), x(), ValueError, r"k_a: expected the shape of q_a"),
    "k_b": (x(), x(), x(), x(2, 3, 1, 5, 4), ValueError, r"k_b: expected the shape of q_b"),
    "P differs": (x(), x(), x(2, 4, 2, 5, 4), x(2, 4, 2, 5, 4), ValueError, r"q_b: expected.*q_a, .*got \(2, 4"),
    "Nq differs": (x(), x(), x(2, 3, 2, 6, 4), x(), ValueError, r"q_b: expected.*q_a, .*got \(2, 3, 2, 6"),
    "Nk differs": (x(), x(), x(), x(2, 3, 2, 6, 4), ValueError, r"k_b: expected.*k_a, .*got \(2, 3, 2, 6"),
    "dtype differs": (x(), x(), x().half(), x().half(), TypeError, r"q_b: expected the dtype of q_a, .*16"),
    "device differs": (x(), x(), x().to("meta"), x().to("meta"), ValueError, r"q_b: expected the device of.*meta"),
    "strided": (x(), x(), x(), x(2, 3, 2, 4, 5).mT, ValueError, r"k_b: expected a contiguous last dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames(name: str) -> None:
    """Bad q, k or lag raises an error that names the argument, what came and what is expected."""
    q, k, options, error, message = BAD_FRAMES[name]
    with pytest.raises(error, match=message):
        am_flow(q, k, **options)


BAD_LSE: dict[str, tuple[Any, type[Exception], str]] = {
    "not a tensor": (1.0, TypeError, r"expected None or a torch\.Tensor, got float"),
    "half": (x(2, 3, 2, 5, dtype=torch.float16), TypeError, r"expected float32, got torch\.float16"),
    "device": (x(2, 3, 2, 5).to("meta"), ValueError, r"expected the device of q(_.)?, cpu, got meta"),
    "padded": (
        x(2, 3, 2, 32),
        ValueError,
        r"expected one number for each row of q.*without padding, \(2, 3, 2, 5\), got \(2, 3, 2, 32\)",
    ),
    "folded": (x(6, 2, 5), ValueError, r"expected one number for each row of q.*got \(6, 2, 5\)"),
}


@pytest.mark.parametrize("name", BAD_LSE)
def test_bad_lse(name: str) -> None:
    """A log-sum-exp that breaks its contract raises an error that names it."""
    lse, error, message = BAD_LSE[name]
    with pytest.raises(error, match="^lse: " + message):
        am_flow(x(), x(), lse=lse)
    for argument in ("lse_a", "lse_b"):
        with pytest.raises(error, match=f"^{argument}: {message}"):
            am_flow_pair(x(), x(), x(), x(), **{argument: lse})


def test_lse_changes_nothing_where_it_is_not_needed(impl: str, must_run: MustRun) -> None:
    """Implementations that make their own row sums give the same bits with and without a log-sum-exp."""
    q, k = tt.make_qk(1, 3, (2,), 5, 7, 4)
    if must_run(impl, lambda: am_flow(q, k, impl=impl)):
        wrong = torch.zeros(1, 3, 2, 5)
        assert torch.equal(am_flow(q, k, lse=wrong, impl=impl), am_flow(q, k, impl=impl))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    """A bad option raises the same error in both forms."""
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        am_flow(x(), x(), **options)
    with pytest.raises(error, match=message):
        am_flow_pair(x(), x(), x(), x(), **options)


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs(name: str) -> None:
    """Bad frames of the pair form raise an error that names the argument."""
    *frames, error, message = BAD_PAIRS[name]
    with pytest.raises(error, match=message):
        am_flow_pair(*frames)


def test_options_are_keyword_only() -> None:
    """Options can't be given by position, so that a new one never changes the meaning of a call."""
    with pytest.raises(TypeError, match="positional"):
        am_flow(x(), x(), 1.0)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        am_flow_pair(x(), x(), x(), x(), 1.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        (torch.float64, "cpu", r"impl='cpu': expected one of torch\.float32.*got torch\.float64"),
        (torch.float32, "meta", r"impl='cpu': expected tensors on cpu, got meta"),
    ],
)
def test_impl_that_cannot_take_the_input(dtype: torch.dtype, device: str, message: str) -> None:
    """An implementation that was asked for never falls back: it says what it can't take."""
    q = x(dtype=dtype).to(device)
    with pytest.raises(ValueError, match=message):
        am_flow(q, q, impl="cpu")


@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
@pytest.mark.parametrize("groups", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shape_dtype_and_default_scale(dtype: torch.dtype, groups: tuple[int, ...], head_reduction: str) -> None:
    """The result is contiguous, of the promised shape, float32 (float64 for float64); scale=None is D ** -0.5."""
    q, k = tt.make_qk(2, 5, groups, 7, 9, 16, dtype=dtype)
    flow = am_flow(q, k, lag=2, head_reduction=head_reduction)
    assert flow.shape == (2, 3, *(groups if head_reduction == "none" else groups[1:]), 9)
    assert flow.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert flow.is_contiguous()
    assert torch.equal(flow, am_flow(q, k, scale=0.25, lag=2, head_reduction=head_reduction))
    pair_flow = am_flow_pair(q[:, :-2], k[:, :-2], q[:, 2:], k[:, 2:], head_reduction=head_reduction)
    assert pair_flow.shape == flow.shape
    tt.assert_flow(pair_flow, flow.double() - 7 / 9, 7)


@pytest.mark.parametrize("head_reduction", ["none", "mean_map"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 5, 4), (2, 0, 2, 5, 4), (0, 0, 2, 5, 4)], ids=str)
def test_empty(shape: tuple[int, ...], head_reduction: str, impl: str) -> None:
    """No clips (B = 0) or no pairs (P = 0) give an empty flow and empty gradients, wherever it runs."""
    B, P, H, N, _ = shape
    tail = (H, N) if head_reduction == "none" else (N,)
    q = torch.zeros(shape, requires_grad=True)
    flows = [(am_flow_pair(q, q, q, q, head_reduction=head_reduction, impl=impl), (B, P, *tail))]
    if P:
        flows.append((am_flow(q, q, head_reduction=head_reduction, impl=impl), (B, P - 1, *tail)))
    for flow, expected in flows:
        assert flow.shape == expected
        assert flow.dtype == torch.float32
        (grad,) = torch.autograd.grad(flow.sum(), q)
        assert grad.shape == shape


def test_nothing_is_saved_without_grad(impl: str, must_run: MustRun) -> None:
    """If no input requires grad, or under no_grad, the flow has no graph and no tensor is kept for backward."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert am_flow(q, k, impl=impl).grad_fn is None
        assert am_flow_pair(q, k, q, k, impl=impl).grad_fn is None
        with torch.no_grad():
            assert not am_flow(q.clone().requires_grad_(), k, impl=impl).requires_grad
        with torch.inference_mode():
            assert not am_flow(q.clone().requires_grad_(), k, impl=impl).requires_grad
        assert not saved
        assert am_flow(q, k.clone().requires_grad_(), impl=impl).requires_grad
        assert [s.shape for s in saved if s.numel()] == [q.shape, k.shape]  # the inputs, and no map


@pytest.mark.parametrize("which", range(4))
def test_only_the_gradients_asked_for(which: int, impl: str, must_run: MustRun) -> None:
    """Only inputs that require grad get one, and it is the one they get when all require it."""
    q, k = tt.make_qk(1, 6, (2,), 17, 19, 8)
    frames = [x.contiguous() for x in (q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2])]
    if not must_run(impl, lambda: am_flow_pair(*frames, impl=impl)):
        return
    dflow = tt.make_dflow((1, 3, 2, 19))
    every = [f.clone().requires_grad_() for f in frames]
    am_flow_pair(*every, impl=impl).backward(dflow)
    one = [f.clone().requires_grad_(i == which) for i, f in enumerate(frames)]
    am_flow_pair(*one, impl=impl).backward(dflow)
    for i in range(4):
        assert (one[i].grad is not None) == (i == which)
    assert torch.equal(one[which].grad, every[which].grad)


def test_second_order_raises(impl: str, must_run: MustRun) -> None:
    """A gradient of a gradient is refused with a clear message instead of being silently wrong."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 7, 9, 8))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    (dq,) = torch.autograd.grad(am_flow(q, k, impl=impl).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="AM flow has first-order gradients only; a second-order gradient"):
        torch.autograd.grad(dq.sum(), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, impl: str, must_run: MustRun) -> None:
    """Autocast neither casts the inputs nor the result, forward or backward: the bits are the same."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 30, 50, 16, dtype=dtype))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    dflow = tt.make_dflow((1, 2, 2, 50))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            flow = am_flow(q, k, impl=impl)
            results.append((flow, *torch.autograd.grad(flow, (q, k), dflow)))
    assert results[1][0].dtype == torch.float32
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_float64_is_the_reference(recwarn: pytest.WarningsRecorder) -> None:
    """float64 runs the reference in float64, without a warning: that is what the reference is for."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8, dtype=torch.float64)
    flow = am_flow(q, k)
    assert flow.dtype == torch.float64
    assert torch.equal(flow, tt.oracle_flow(q, k))
    assert explain(q, k).impl == "reference"
    assert not recwarn.list


def test_explain(cpu_kernels_run: bool) -> None:
    """`explain` names the implementation that runs and the reason, for tensors and for the machine."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8, dtype=torch.bfloat16)
    told = explain(q, k)
    assert told.impl == ("cpu" if cpu_kernels_run else "reference")
    assert f"am_flow runs {told.impl!r}: {told.reason}" in str(told)
    assert "(1, 3, 2, 7, 8) bfloat16 on cpu" in str(told)
    assert explain(q, k, impl="reference").impl == "reference"
    assert f"torch {torch.__version__}" in str(explain())
    assert explain().impl is None
    if cpu_kernels_run:
        assert "amflow_native" in str(explain())
    else:
        with pytest.raises(RuntimeError, match="the CPU capability is"):
            explain(q, k, impl="cpu")
