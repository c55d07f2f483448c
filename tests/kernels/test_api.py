"""The public functions: the errors for bad input, and what they promise of their results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair, explain
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]

GOOD = (2, 3, 2, 5, 4)  # B, T, heads, N, D


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or GOOD, dtype=dtype)


def nested(layout: torch.layout = torch.strided) -> Tensor:
    frames = [torch.zeros(T, 2, 5, 4) for T in (2, 3)]
    return torch.nested.nested_tensor(frames, layout=layout)


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
    "nested": (nested(), nested(), {}, TypeError, r"q: expected a dense tensor with strides, got a nested tensor"),
    "jagged": (x(), nested(torch.jagged), {}, TypeError, r"k: expected a dense tensor with.*got a nested tensor"),
    "sparse": (x().to_sparse(), x(), {}, TypeError, r"q: expected a dense tensor.*got the layout torch\.sparse_coo"),
    "mkldnn": (x(), x().to_mkldnn(), {}, TypeError, r"k: expected a dense tensor.*got the layout torch\._mkldnn"),
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
    "scale too large": (
        {"scale": 1e39},
        ValueError,
        r"scale: expected a finite number, got 1e\+39, which torch\.float32",
    ),
    "scale too small": ({"scale": -1e39}, ValueError, r"scale: expected a finite number, got -1e\+39, which torch"),
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
        r"impl: expected None or one of \('reference', 'chunked', 'cpu', 'triton', 'cuda'\), got 'gpu'",
    ),
    "impl a list": ({"impl": ["cpu"]}, TypeError, r"impl: expected None or a str, got list"),
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
def test_bad_frames_raise(name: str) -> None:
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
def test_bad_log_sum_exps_raise(name: str) -> None:
    """A log-sum-exp that breaks its contract raises an error that names it."""
    lse, error, message = BAD_LSE[name]
    with pytest.raises(error, match="^lse: " + message):
        am_flow(x(), x(), lse=lse)
    for argument in ("lse_a", "lse_b"):
        with pytest.raises(error, match=f"^{argument}: {message}"):
            am_flow_pair(x(), x(), x(), x(), **{argument: lse})


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_raise_the_same_in_both_forms(name: str) -> None:
    """A bad option raises the same error in both forms."""
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        am_flow(x(), x(), **options)
    with pytest.raises(error, match=message):
        am_flow_pair(x(), x(), x(), x(), **options)


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_raise(name: str) -> None:
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
def test_an_implementation_asked_for_never_falls_back(dtype: torch.dtype, device: str, message: str) -> None:
    """An implementation that was asked for never falls back: it says what it can't take."""
    q = x(dtype=dtype).to(device)
    with pytest.raises(ValueError, match=message):
        am_flow(q, q, impl="cpu")


@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
@pytest.mark.parametrize("groups", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shape_dtype_and_default_scale_are_as_documented(
    dtype: torch.dtype, groups: tuple[int, ...], head_reduction: str
) -> None:
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


def test_float64_is_computed_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """No kernel computes in float64, and none is missed."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8, dtype=torch.float64)
    flow = am_flow(q, k)
    assert flow.dtype == torch.float64
    torch.testing.assert_close(flow, tt.oracle_flow(Problem(q, k)), rtol=1e-14, atol=0)
    assert explain(q, k).impl == "chunked"
    assert not recwarn.list


def test_a_scale_that_only_float64_holds_is_taken_for_float64() -> None:
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8, dtype=torch.float64)
    assert am_flow(q * 1e-30, k * 1e-10, scale=1e39).isfinite().all()


def test_explain_names_the_implementation_and_the_reason(cpu_kernels_run: bool) -> None:
    """`explain` names the implementation that runs and the reason, for tensors and for the machine."""
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8, dtype=torch.bfloat16)
    explanation = explain(q, k)
    assert explanation.impl == ("cpu" if cpu_kernels_run else "chunked")
    assert f"am_flow runs {explanation.impl!r}: {explanation.reason}" in str(explanation)
    assert "(1, 3, 2, 7, 8) bfloat16 on cpu" in str(explanation)
    assert explain(q, k, impl="reference").impl == "reference"
    assert f"torch {torch.__version__}" in str(explain())
    assert explain().impl is None
    if cpu_kernels_run:
        assert "amflow_native" in str(explain())
    else:
        with pytest.raises(RuntimeError, match="the CPU capability is"):
            explain(q, k, impl="cpu")


BAD_FEATURES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "not a tensor": ([1.0], {}, TypeError, r"x: expected a torch\.Tensor, got list"),
    "integer": (x(2, 2, 2, 5, 3, dtype=torch.int64), {}, TypeError, r"x: expected float32 or.*got torch\.int64"),
    "another dtype": (x(2, 2, 2, 5, 3).half(), {}, TypeError, r"x: expected float32 or the dtype of q, .*float16"),
    "another device": (x(2, 2, 2, 5, 3).to("meta"), {}, ValueError, r"x: expected the device of q, cpu, got meta"),
    "all frames": (x(2, 3, 2, 5, 3), {}, ValueError, r"x: expected features of the keys.*\(2, 2, 2, 5, C\), got"),
    "heads": (x(2, 2, 1, 5, 3), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 1, 5, 3\)"),
    "queries": (x(2, 2, 2, 4, 3), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 2, 4, 3\)"),
    "keys": (x(2, 2, 2, 5, 3), {"transpose": True}, ValueError, r"x: expected features of the queries.*2, 4, C\)"),
    "no features": (x(2, 2, 2, 5), {}, ValueError, r"x: expected features of the keys.*got \(2, 2, 2, 5\)"),
    "C is 0": (x(2, 2, 2, 5, 0), {}, ValueError, r"x: expected from 1 to 256 features.*got 0"),
    "C is 257": (x(2, 2, 2, 5, 257), {}, ValueError, r"x: expected from 1 to 256 features.*got 257"),
    "strided": (x(2, 2, 2, 3, 5).mT, {}, ValueError, r"x: expected a contiguous last dimension, got strides"),
    "sparse": (x(2, 2, 2, 5, 3).to_sparse(), {}, TypeError, r"x: expected a dense tensor.*sparse_coo"),
    "transpose": (x(2, 2, 2, 5, 3), {"transpose": 1}, TypeError, r"transpose: expected a bool, got int"),
    "softmax": (x(2, 2, 2, 5, 3), {"softmax": None}, TypeError, r"softmax: expected a bool, got NoneType"),
    "temperature of M": (x(2, 2, 2, 5, 3), {"temperature": 0.5}, ValueError, r"temperature: expected 1 without"),
    "temperature": (x(2, 2, 2, 5, 3), {"softmax": True, "temperature": 0}, ValueError, r"temperature: .*1/64"),
    "scale": (x(2, 2, 2, 5, 3), {"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
    "scale too large": (x(2, 2, 2, 5, 3), {"scale": 1e39}, ValueError, r"scale: .*which torch\.float32 can't hold"),
    "impl": (x(2, 2, 2, 5, 3), {"impl": "gpu"}, ValueError, r"impl: expected None or one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_raise_the_same_in_both_forms(name: str) -> None:
    """Bad features or options raise the same error in both forms; it names the argument and says what is expected."""
    features, options, error, message = BAD_FEATURES[name]
    q, k = x(2, 3, 2, 4, 6), x(2, 3, 2, 5, 6)
    with pytest.raises(error, match=message):
        am_flow_matmul(q, k, features, **options)
    with pytest.raises(error, match=message):
        am_flow_matmul_pair(q[:, 1:], k[:, 1:], q[:, 1:], k[:, 1:], features, **options)


def test_frames_of_the_motion_operator_are_checked_as_those_of_a_flow() -> None:
    """Frames are checked as am_flow checks them, and options are keyword-only."""
    q, features = x(2, 3, 2, 5, 4), x(2, 2, 2, 5, 3)
    with pytest.raises(ValueError, match=r"k: expected the shape of q"):
        am_flow_matmul(q, q[:1], features)
    with pytest.raises(ValueError, match=r"q: expected more frames .* than lag = 3, got T = 3"):
        am_flow_matmul(q, q, features, lag=3)
    with pytest.raises(ValueError, match=r"k_b: expected the shape of q_b"):
        am_flow_matmul_pair(q, q, q, q[:1], features)
    with pytest.raises(TypeError, match="positional"):
        am_flow_matmul(q, q, features, True)  # type: ignore[misc]
