"""`am_flow_attention`: PyTorch's attention and our flow of the same maps, in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from amflow_kernels import am_flow, am_flow_attention, attention
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]

B, T, HEADS, N, D = 2, 3, 2, 17, 16
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def qkv(dtype: torch.dtype = FP32, layout: str = "contiguous", groups: tuple[int, ...] = (HEADS,)) -> list[Tensor]:
    q, k = tt.make_qk(B, T, groups, N, N, D, dtype=dtype, layout=layout)
    v = tt.make_qk(B, T, groups, N, N, D, dtype=dtype, seed=1)[0]
    return [q, k, v]


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    folded = (x.flatten(0, 1).flatten(1, -3) for x in (q, k, v))
    out = scaled_dot_product_attention(*folded, scale=scale).unflatten(1, q.shape[2:-2]).unflatten(0, q.shape[:2])
    return out, am_flow(q, k, scale=scale, **options)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize(("layout", "groups"), [("contiguous", (2,)), ("fused_qkv", (2,)), ("fused_qkv", (2, 3))])
@pytest.mark.parametrize("options", [{}, {"scale": -0.3, "lag": 2, "head_reduction": "mean", "center": True}], ids=str)
def test_both_results_have_the_bits_of_the_separate_calls(
    dtype: torch.dtype, layout: str, groups: tuple[int, ...], options: dict[str, Any]
) -> None:
    inputs = qkv(dtype, layout, groups)
    for got, want in zip(am_flow_attention(*inputs, **options), expected(*inputs, **options), strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
        assert got.stride() == want.stride()


def test_sizes_of_queries_keys_and_values_may_differ() -> None:
    """Nq and Nk may differ, and so may the widths of v and q."""
    q, k = tt.make_qk(1, 3, (2,), 5, 9, 8)
    v = torch.randn(1, 3, 2, 9, 24)
    out, flow = am_flow_attention(q, k, v)
    assert out.shape == (1, 3, 2, 5, 24)
    assert flow.shape == (1, 2, 2, 9)
    for got, want in zip((out, flow), expected(q, k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 2, 5, 8), (2, 3, 2, 1, 8)], ids=str)
def test_no_clips_and_single_tokens(shape: tuple[int, ...]) -> None:
    out, flow = am_flow_attention(*(torch.randn(shape) for _ in range(3)))
    assert out.shape == shape
    assert flow.shape == (shape[0], shape[1] - 1, shape[2], shape[3])


def test_gradients_add_up(impl: str) -> None:
    """q and k get the gradients of both results, v only that of the attention."""
    inputs = [x.requires_grad_() for x in qkv()]

    def grads(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        out, flow = results
        return torch.autograd.grad((out, flow), inputs, (torch.ones_like(out), tt.make_dflow(flow.shape)))

    for got, want in zip(
        grads(am_flow_attention(*inputs, impl=impl)), grads(expected(*inputs, impl=impl)), strict=True
    ):
        assert torch.equal(got, want)


def test_autocast_casts_what_the_attention_casts() -> None:
    inputs = qkv()
    with torch.autocast("cpu", dtype=BF16):
        out, flow = am_flow_attention(*inputs)
        assert scaled_dot_product_attention(*inputs).dtype == out.dtype == BF16
    want_out, want_flow = expected(*(x.to(BF16) for x in inputs))
    assert torch.equal(out, want_out)
    assert flow.dtype == FP32
    assert torch.equal(flow, want_flow)


def test_autocast_accepts_mixed_dtypes() -> None:
    """Autocast leaves the norms of q and k in float32: mixed dtypes that the attention accepts are accepted here."""
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=BF16):
        out, flow = am_flow_attention(q, k, v.to(BF16))
    want_out, want_flow = expected(*(x.to(BF16) for x in (q, k, v)))
    assert torch.equal(out, want_out)
    assert torch.equal(flow, want_flow)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_compiled_as_one_graph(dtype: torch.dtype, impl: str) -> None:
    torch._dynamo.reset()  # each implementation and dtype is one more graph, and there is a limit
    inputs = qkv(dtype)
    compiled = torch.compile(am_flow_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs, impl=impl), am_flow_attention(*inputs, impl=impl), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("dtype", "options"), [(FP32, {}), (FP16, {"head_reduction": "mean_map"})], ids=["float32", "mean over maps"]
)
def test_log_sum_exps_of_the_attention_are_used(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the flow's forward is faster with the attention's log-sum-exps, it gets them: wherever it works in tiles.

    The CPU has no such attention: one that computes the same stands in for it.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    from amflow_kernels.impl.triton import launch

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(scale * (q.float() @ k.float().mT), -1)
        return scaled_dot_product_attention(q, k, v, scale=scale), lse

    monkeypatch.setattr(attention, "_kernel_with_lse", lambda *_: kernel)
    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (launched.append(kernel.__name__), run(kernel, *rest)))
    for groups in ((HEADS,), (2, 3)):
        inputs = qkv(dtype, groups=groups)
        out, flow = am_flow_attention(*inputs, impl="triton", **options)
        assert torch.equal(out, expected(*inputs, impl="reference")[0])
        tt.assert_flow(flow, tt.oracle_flow(Problem(*inputs[:2], center=True, **options)), N)
    assert "am_flow_fwd_kernel" in launched
    assert "am_flow_rows_kernel" not in launched


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=str)
def test_log_sum_exps_come_from_the_kernel_that_pytorch_chooses(
    backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's descriptions of its kernels, which need no GPU: one number for each row, in float32."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: backend.value)
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, n, 64, dtype=BF16, device="cuda") for n in (65, 33, 33))
        kernel = attention._kernel_with_lse(q, k, v, 0.1)
        assert kernel is not None
        out, lse = kernel(q, k, v, 0.1)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:-1]
        assert lse.dtype == FP32
        narrow = [x[..., :60] for x in (q, k, v)]  # the attention call would pad them
        assert attention._kernel_with_lse(*narrow, 0.1) is None
        assert attention._kernel_with_lse(q.to("cpu"), k.to("cpu"), v.to("cpu"), 0.1) is None
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.EFFICIENT_ATTENTION.value)
        assert attention._kernel_with_lse(q, k, v, 0.1) is None


def x(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape or (2, 3, 2, 5, 4), dtype=dtype)


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "mask": (x(), {"attn_mask": torch.ones(5, 5)}, ValueError, r"attn_mask: expected None .*plain.*got \(5, 5\)"),
    "dropout": (x(), {"dropout_p": 0.1}, ValueError, r"dropout_p: expected 0\.0 .*got 0\.1"),
    "causal": (x(), {"is_causal": True}, ValueError, r"is_causal: expected False .*got True"),
    "grouped": (x(), {"enable_gqa": True}, ValueError, r"enable_gqa: expected False .*got True"),
    "not a tensor": (None, {}, TypeError, r"v: expected a torch\.Tensor, got NoneType"),
    "dtype": (x(dtype=FP16), {}, TypeError, r"v: expected the dtype of q, torch\.float32, got torch\.float16"),
    "device": (x().to("meta"), {}, ValueError, r"v: expected the device of q, cpu, got meta"),
    "tokens": (x(2, 3, 2, 6, 4), {}, ValueError, r"v: expected the shape of k but for.*got \(2, 3, 2, 6, 4\)"),
    "heads": (x(2, 3, 1, 5, 4), {}, ValueError, r"v: expected the shape of k but for.*got \(2, 3, 1, 5, 4\)"),
    "empty": (x(2, 3, 2, 5, 0), {}, ValueError, r"v: expected the shape of k but for.*got \(2, 3, 2, 5, 0\)"),
    "lag": (x(), {"lag": 3}, ValueError, r"q: expected more frames.*than lag = 3"),
    "scale": (x(), {"scale": float("nan")}, ValueError, r"scale: expected a finite number"),
    "impl": (x(), {"impl": "gpu"}, ValueError, r"impl: expected None or one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input raises before any attention is computed."""
    v, options, error, message = BAD[name]

    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("attention ran")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", never)
    with pytest.raises(error, match=message):
        am_flow_attention(x(), x(), v, **options)
    with pytest.raises(TypeError, match=r"q: expected a torch\.Tensor"):
        am_flow_attention([1.0], x(), x())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_it_can_be_traced() -> None:
    """Under torch.jit.trace sizes are tensors, and so is the default scale that comes from D."""
    q, k, v = torch.randn(3, 1, 3, 2, 5, 6)
    traced = torch.jit.trace(lambda q, k, v: am_flow_attention(q, k, v), (q, k, v))
    q, k, v = torch.randn(3, 2, 4, 2, 7, 6)
    for x, y in zip(traced(q, k, v), am_flow_attention(q, k, v), strict=True):
        torch.testing.assert_close(x, y)
