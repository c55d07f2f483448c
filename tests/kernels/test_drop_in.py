"""The functions in the place of an image model's attention call: frames folded into the batch, and 16-bit results."""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from amflow_kernels import (
    AMFlowStream,
    am_flow,
    am_flow_attention,
    am_flow_matmul,
    am_flow_pair,
    dispatch,
    explain,
    motion_maps,
    motion_pca,
    ops,
    problem,
)
from amflow_kernels import testing as tt

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]

B, T, N, D = 2, 4, 11, 8
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def images(groups: tuple[int, ...] = (3,), layout: str = "fused_qkv", num: int = B) -> list[Tensor]:
    """q, k and v, (B * T, *groups, N, D), as an image model has them: all three views of one tensor, or of three."""
    q, k = tt.make_qk(num, T, groups, N, N, D, layout=layout)
    v = tt.make_qk(num, T, groups, N, N, D, layout=layout, seed=1)[0]
    return [x.flatten(0, 1) for x in (q, k, v)]


def features(q: Tensor, k: Tensor, lag: int = 1) -> Tensor:
    return tt.make_features(q.unflatten(0, (-1, T)), k, 3, lag=lag)


# Functions of q, k, v of images or of clips, with options.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "am_flow": lambda q, k, v, **options: am_flow(q, k, **options),
    "am_flow_attention": am_flow_attention,
    "am_flow_matmul": lambda q, k, v, x, **options: am_flow_matmul(q, k, x, **options),
    "motion_maps": lambda q, k, v, **options: motion_maps(q, k, **options),
    "motion_pca": lambda q, k, v, **options: motion_pca(q, k, rank=2, **options),
}


def results(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def both(name: str, inputs: list[Tensor], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The results of a function for images, and for the same as clips, with the attention's output folded."""
    extra = {"x": features(*inputs[:2], options.get("lag", 1))} if name == "am_flow_matmul" else {}
    found = results(FUNCTIONS[name](*inputs, num_frames=T, **extra, **options))
    clips = [x.unflatten(0, (-1, T)) for x in inputs]
    expected = results(FUNCTIONS[name](*clips, **extra, **options))
    if name == "am_flow_attention":
        expected[0] = expected[0].flatten(0, 1)
    return found, expected


@pytest.mark.parametrize("groups", [(3,), (3, 2)], ids=["heads", "windows"])
@pytest.mark.parametrize("layout", ["contiguous", "fused_qkv"])
@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_folded_frames_give_the_bits_of_clips(name: str, lag: int, layout: str, groups: tuple[int, ...]) -> None:
    found, expected = both(name, images(groups, layout), lag=lag)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("name", ["am_flow", "am_flow_attention"])
@pytest.mark.parametrize(
    "options", [{"head_reduction": "mean_map"}, {"head_reduction": "mean", "center": True, "out_dtype": BF16}], ids=str
)
def test_folded_frames_go_with_the_other_options(options: dict[str, Any], name: str) -> None:
    for x, y in zip(*both(name, images((3, 2)), **options), strict=True):
        assert torch.equal(x, y)


def test_the_attention_output_is_that_of_the_call_it_replaces() -> None:
    """Bits and strides, with and without gradients."""
    q, k, v = images()
    for needed in (False, True):
        inputs = [x.detach().requires_grad_(needed) for x in (q, k, v)]
        out, _ = am_flow_attention(*inputs, num_frames=T)
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()


def test_folded_frames_under_autocast() -> None:
    """Cast as the attention casts them; with out_dtype both results are in the dtype of the layers around."""
    inputs = images()
    with torch.autocast("cpu", dtype=BF16):
        found = am_flow_attention(*inputs, num_frames=T, center=True, out_dtype=BF16)
    expected = am_flow_attention(*(x.to(BF16) for x in inputs), num_frames=T, center=True, out_dtype=BF16)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == BF16
        assert torch.equal(x, y)


@pytest.mark.parametrize("groups", [(3,), (3, 2)], ids=["heads", "windows"])
def test_folded_frames_are_read_in_place(groups: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a fused qkv reach the kernel or the op as views of the same memory."""
    seen: list[Tensor] = []
    flow = ops.flow
    monkeypatch.setattr(
        ops, "flow", lambda problem, *args: (seen.extend((problem.q, problem.k)), flow(problem, *args))[1]
    )
    q, k, v = images(groups)
    am_flow(q, k, num_frames=T)
    am_flow_attention(q, k, v, num_frames=T)
    for x, image in zip(seen, (q, k, q, k), strict=True):
        assert x.data_ptr() == image.data_ptr()
        assert x.stride()[2:] == image.stride()[1:]


def test_gradients_of_folded_frames() -> None:
    q, k, v = (x.requires_grad_() for x in images())
    weights = tt.make_dflow((B, T - 1, 3, N))

    def grads(out: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.square().sum() + (flow * weights).sum(), (q, k, v))

    found = grads(*am_flow_attention(q, k, v, num_frames=T))
    expected = grads(*am_flow_attention(*(x.unflatten(0, (B, T)) for x in (q, k, v))))
    assert all(map(torch.equal, found, expected))


def test_log_sum_exps_are_folded_as_q_is() -> None:
    q, k, _ = images()
    lse = torch.logsumexp(D**-0.5 * (q @ k.mT), -1)
    flow = am_flow(q, k, num_frames=T, lse=lse)
    torch.testing.assert_close(flow, am_flow(q, k, num_frames=T), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"lse: expected 3 dimensions with num_frames.*or 4.*got 5"):
        am_flow(q, k, num_frames=T, lse=lse[None, None])


@pytest.mark.parametrize("name", ["am_flow", pytest.param("am_flow_attention", marks=pytest.mark.slow)])
def test_one_compiled_graph_takes_other_numbers_of_clips_and_tokens(name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    function = FUNCTIONS[name]

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(qkv: Tensor, num_frames: int) -> Any:
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return function(q, k, v, num_frames=num_frames, center=True, out_dtype=BF16)

    generator = torch.Generator().manual_seed(0)
    for clips, frames, tokens in ((5, 4, 11), (2, 3, 9), (3, 7, 13)):
        qkv = torch.randn(clips * frames, tokens, 72, generator=generator)
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        expected = results(function(q, k, v, num_frames=frames, center=True))
        for x, y in zip(results(step(qkv, frames)), expected, strict=True):
            torch.testing.assert_close(x, y.to(x.dtype))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_an_exported_program_takes_any_number_of_clips() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return am_flow(q, k, num_frames=T)

    clips, tokens = torch.export.Dim("clips", min=2), torch.export.Dim("tokens", min=3)
    shapes = {0: T * clips, 2: tokens}
    q, k, _ = images()
    program = torch.export.export(Model(), (q, k), dynamic_shapes=(shapes, shapes)).module()
    q, k, _ = images(num=5)
    assert torch.equal(program(q[:, :, :7], k[:, :, :7]), Model()(q[:, :, :7], k[:, :, :7]))


def test_no_images_give_no_flows() -> None:
    q = torch.zeros(0, 3, N, D)
    assert am_flow(q, q, num_frames=T).shape == (0, T - 1, 3, N)


def x(*shape: int) -> Tensor:
    return torch.zeros(shape or (6, 2, 5, 4))


BAD: dict[str, tuple[Tensor, Tensor, Any, type[Exception], str]] = {
    "not an int": (x(), x(), 3.0, TypeError, r"num_frames: expected None or an int, got float"),
    "a bool": (x(), x(), True, TypeError, r"num_frames: expected None or an int, got bool"),
    "none": (x(), x(), 0, ValueError, r"num_frames: expected at least 1, got 0"),
    "one": (x(), x(), 1, ValueError, r"q: expected more frames.*than lag = 1, got T = 1"),
    "no multiple": (x(), x(), 4, ValueError, r"q: expected a multiple of num_frames = 4 images.*got 6: \(6, 2, 5, 4\)"),
    "clips": (x(2, 3, 2, 5, 2, 4), x(), 3, ValueError, r"q: expected 4 dimensions with num_frames.*or 5.*got 6"),
    "other keys": (x(), x(3, 2, 5, 4), 3, ValueError, r"k: expected the shape of q"),
    "a list": ([1.0], x(), 3, TypeError, r"q: expected a torch\.Tensor, got list"),  # type: ignore[dict-item]
    "sparse": (x(), x().to_sparse(), 3, TypeError, r"k: expected a dense tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_images_that_are_no_clips_raise(name: str) -> None:
    q, k, num_frames, error, message = BAD[name]
    for function in (am_flow, explain, motion_maps):
        with pytest.raises(error, match=message):
            function(q, k, num_frames=num_frames)


def test_folded_frames_without_num_frames_raise_and_both_cures_are_named() -> None:
    q = x()
    for function in (am_flow, explain, motion_maps, lambda q, k: am_flow_attention(q, k, k)):
        with pytest.raises(ValueError, match=r"q: .*pass num_frames=T, or q\.unflatten\(0, \(B, T\)\)"):
            function(q, q)
    with pytest.raises(ValueError, match=r"q_a: .*pass q_a\.unflatten\(0, \(B, P\)\)"):
        am_flow_pair(q, q, q, q)


# ---------------------------------------------------------------------------------------------------- out_dtype


@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_a_centred_flow_is_rounded_once_to_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """So that it keeps its relative precision: each form of the function rounds the same result."""
    q, k = tt.make_qk(B, T, (2,), N, N, D, dtype=dtype)
    expected = am_flow(q, k, center=True).to(out_dtype)
    flow = am_flow(q, k, center=True, out_dtype=out_dtype)
    assert flow.dtype == out_dtype
    assert torch.equal(flow, expected)
    paired = am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], center=True, out_dtype=out_dtype)
    torch.testing.assert_close(paired, expected, rtol=1e-2, atol=1e-7)
    stream = AMFlowStream(center=True, out_dtype=out_dtype)
    stream(q[:, 0], k[:, 0])
    streamed = stream(q[:, 1], k[:, 1])
    assert streamed is not None
    assert streamed.dtype == out_dtype


def test_bfloat16_keeps_a_centred_flow_and_loses_a_plain_one() -> None:
    """Why 16 bits need center=True: the signal of a still clip survives one and not the other."""
    q, k = tt.make_qk(B, T, (2,), 50, 50, 32, frame_step=0.01)
    exact = tt.oracle_flow(problem.Problem(q, k, center=True))
    centred = am_flow(q, k, center=True, out_dtype=BF16)
    assert (centred.double() - exact).norm() < 4e-3 * exact.norm()
    plain = am_flow(q, k).to(BF16)
    assert (plain.double() - 1 - exact).norm() > 0.9 * exact.norm()


def test_a_16_bit_result_goes_into_a_16_bit_layer_and_gives_gradients() -> None:
    q, k = (y.requires_grad_() for y in tt.make_qk(B, T, (2,), N, N, D))
    layer = torch.nn.Linear(N, 5, dtype=BF16)
    layer(am_flow(q, k, center=True, out_dtype=BF16)).float().square().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == FP32
    assert q.grad.abs().max() > 0


BAD_OUT_DTYPES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "without center": ({"out_dtype": BF16}, ValueError, r"out_dtype: expected.*without center=True, got torch\.bf"),
    "float16": ({"out_dtype": FP16}, ValueError, r"out_dtype: .*which 16 bits round away; centred, the signal keeps"),
    "integers": ({"out_dtype": torch.int32}, TypeError, r"out_dtype: expected float32, bfloat16.*got torch\.int32"),
    "8 bits": ({"out_dtype": torch.float8_e5m2, "center": True}, TypeError, r"out_dtype: expected float32.*float8"),
    "a word": ({"out_dtype": "bfloat16"}, TypeError, r"out_dtype: expected None or a torch\.dtype, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OUT_DTYPES)
def test_a_bad_out_dtype_raises(name: str) -> None:
    options, error, message = BAD_OUT_DTYPES[name]
    q = torch.zeros(2, 3, 2, 5, 4)
    for call in (
        lambda: am_flow(q, q, **options),
        lambda: am_flow_pair(q, q, q, q, **options),
        lambda: am_flow_attention(q, q, q, **options),
        lambda: AMFlowStream(**options),
    ):
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------------------------------------------- readings


def test_explain_says_how_it_reads_the_dimensions() -> None:
    q, k = tt.make_qk(2, 4, (12,), 25, 25, 64)
    reading = "read as B=2, T=4, heads=12, N=25, D=64"
    assert reading in explain(q, k).lines
    assert reading in explain(q.flatten(0, 1), k.flatten(0, 1), num_frames=4).lines
    q, k = tt.make_qk(2, 4, (2, 3), 5, 9, 8)
    assert "read as B=2, T=4, heads=2, windows=3, Nq=5, Nk=9, D=8" in explain(q, k).lines


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fewer_tokens_than_heads_make_a_warning(compiled: bool) -> None:
    """Heads after tokens, as flash-attention packages have them, are read as so many heads of few tokens. Once."""
    torch._dynamo.reset()
    right, _ = tt.make_qk(B, T, (3,), N, N, D)
    function: Any = torch.compile(am_flow, backend="aot_eager", fullgraph=True) if compiled else am_flow
    wrong = right.transpose(2, 3)
    with pytest.warns(
        UserWarning, match=r"read as 11 heads of 3 tokens.*\(B, T, N, heads, D\), pass q\.transpose\(2, 3\)"
    ):
        function(wrong, wrong, impl="reference")
    assert any("read as 11 heads of 3 tokens" in line for line in explain(wrong).lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(wrong, wrong, impl="reference")
        function(right, right, impl="reference")
        function(right[..., :1, :], right, impl="reference")  # one query of a pooling head
    assert not any("Models have more tokens" in line for line in explain(right).lines)


def test_words_are_literal_types() -> None:
    """A type checker finds a misspelt one; the words are those that the checks take."""
    assert typing.get_args(dispatch.Impl) == tuple(dispatch.IMPLEMENTATIONS)
    for function in (am_flow, am_flow_pair, am_flow_matmul, am_flow_attention, motion_maps, motion_pca, explain):
        parameters = inspect.signature(function).parameters
        assert parameters["impl"].annotation == "Impl | None"
        if "head_reduction" in parameters:
            assert parameters["head_reduction"].annotation in ("HeadReduction", "Literal['none', 'mean']")
    assert set(problem.FlowOptions.__annotations__) < set(inspect.signature(am_flow).parameters)
