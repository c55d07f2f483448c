"""The Triton kernels: on the CPU, in Triton's interpreter, with shapes small enough for it.

The interpreter's bfloat16 products are wrong: that dtype needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import ceil, prod
from typing import Any

import pytest
import test_matrix as matrix
import torch
from test_ops import sample
from torch import library

from amflow_kernels import am_flow, am_flow_pair, explain, ops
from amflow_kernels import testing as tt

pytest.importorskip("triton", reason="Triton is not installed")

from amflow_kernels.impl.triton import configs, launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter"),
]

FACTORS: dict[str, list[Any]] = {
    **matrix.FACTORS,
    "tokens": [(1, 1), (17, 17), (65, 65), (33, 70), (70, 33)],
    "D": [1, 17, 64, 72, 256],
    "frames": [(2, 1), (5, 2), (18, 1), (4, 0)],
    "logits": ["plain", "negative", "large", "still"],
    "dtype": [torch.float32, torch.float16],
    "groups": [(1,), (3,), (2, 2)],
}


def cost(row: dict[str, Any]) -> int:
    """Tiles of maps that the interpreter computes, in units of some 5 ms."""
    (Nq, Nk), (T, _), groups = (row.get(n, d) for n, d in (("tokens", (1, 1)), ("frames", (2, 1)), ("groups", (1,))))
    D, heads = row.get("D", 64), 3 * groups[0] if row.get("head_reduction") == "mean_map" else 1
    return T * prod(groups) * heads * ceil(Nq / 32) * ceil(Nk / 32) * ceil(D / configs.block_d(D))


def allowed(row: dict[str, Any]) -> bool:
    return matrix.allowed(row) and cost(row) <= 120


CASES = [matrix.Case(**row, seed=seed) for seed, row in enumerate(matrix.pairwise(FACTORS, allowed))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: matrix.Case) -> None:
    """Flow, centred flow and the gradients that were asked for are within their budgets of the oracle."""
    matrix.check_forward(case, "triton")
    matrix.check_backward(case, "triton")


@pytest.mark.parametrize(
    ("kind", "head_reduction"),
    [("NaN in q", "none"), ("NaN in k", "mean_map"), ("+inf logit", "none"), ("all -inf", "mean")],
)
def test_nan_rule(kind: str, head_reduction: str) -> None:
    """A bad map row makes NaN of all of the flows that use its map and leaves every other flow as it was."""
    matrix.test_nan_rule((5, 70), torch.float32, kind, head_reduction, "triton", lambda *_: True)


@pytest.mark.parametrize("frame", ["a", "b"])
def test_nan_rule_for_pairs(frame: str) -> None:
    """In pair form a bad map row makes NaN of that pair's flow alone."""
    matrix.test_nan_rule_for_pairs("NaN in q", frame, "triton", lambda *_: True)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_minus_inf_logit_weighs_nothing(scale: float) -> None:
    """Logits of -inf are weights of 0."""
    matrix.test_minus_inf_logit_weighs_nothing(torch.float32, scale, "triton", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_reduction", ["none", "mean", "mean_map"])
def test_equal_frames(head_reduction: str, dtype: torch.dtype) -> None:
    """Frames that are the same give Nq / Nk exactly, a centred flow of 0 and no gradient at all."""
    q, k = (x[:, :1].expand(-1, 3, -1, -1, -1).contiguous() for x in tt.make_qk(1, 1, (2,), 33, 70, 24, dtype=dtype))
    q, k = q.requires_grad_(), k.requires_grad_()
    flow = am_flow(q, k, head_reduction=head_reduction, impl="triton")
    assert torch.equal(flow, torch.full_like(flow, 33 / 70))
    centred = am_flow(q, k, head_reduction=head_reduction, center=True, impl="triton")
    assert torch.equal(centred, torch.zeros_like(centred))
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert torch.equal(grad, torch.zeros_like(grad))


def results(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flow = am_flow(q, k, lag=2, impl="triton")
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_and_wide_offsets_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many pairs a program takes, and how wide its offsets are, has no influence on any result."""
    q, k = tt.make_qk(1, 9, (1,), 20, 70, 16, dtype=dtype)
    expected = results(q, k)
    for processors, index in ((10**6, None), (1, launch.tl.int64)):
        with monkeypatch.context() as patch:
            patch.setattr(configs.Device, "of", lambda _, n=processors: configs.Device(90, 232448, n))
            if index is not None:
                patch.setattr(launch, "_index_type", lambda _, t=index: t)
            for got, want in zip(results(q, k), expected, strict=True):
                assert torch.equal(got, want)


def test_chunk_sizes() -> None:
    """As many pairs as fit while there are two programs for each multiprocessor."""
    assert configs.chunk(15, 10_000, 132) == 16
    assert configs.chunk(100, 10_000, 132) == configs.MAX_CHUNK
    assert configs.chunk(3, 10_000, 132) == 4
    assert configs.chunk(15, 60, 132) == 2
    assert configs.chunk(15, 1, 132) == 1
    assert configs.chunk(1, 1, 132) == 1


H100 = configs.Device(90, 232448, 132)


@pytest.mark.parametrize(
    ("Nk", "tiles", "rest"),
    [
        (12, (1, 16), 0),
        (17, (1, 16), 1),
        (49, (1, 64), 0),
        (66, (3, 32), 0),
        (197, (7, 32), 0),
        (225, (4, 64), 0),
        (257, (1, 256), 1),
        (262, (1, 256), 6),
        (263, (5, 64), 0),
        (512, (8, 64), 0),
    ],
)
def test_strips(Nk: int, tiles: tuple[int, int], rest: int) -> None:
    """A strip covers all keys, in tiles of one width and columns."""
    strip = configs.strip(Nk, 64, torch.bfloat16, H100)
    assert strip is not None
    assert (strip.KEY_TILES, strip.BLOCK_N, strip.REST) == (*tiles, rest)  # noqa: SIM300
    covered = strip.KEY_TILES * strip.BLOCK_N + strip.REST
    assert covered - strip.BLOCK_N < Nk <= covered
    assert strip.PARTIAL is (covered > Nk)


def test_no_strips() -> None:
    """Long rows, wide heads and float32 are for the tiled kernels."""
    assert configs.strip(513, 64, torch.bfloat16, H100) is None
    assert configs.strip(257, 64, torch.float32, H100) is None
    assert configs.strip(257, 72, torch.bfloat16, H100) is None


@pytest.mark.parametrize(("N", "most"), [(197, 0.21), (257, 0.07), (261, 0.07), (577, 0.14), (1370, 0.04)])
def test_little_is_padded(N: int, most: float) -> None:
    """How much more than the maps the forward computes on an H100; most at 197: 7 x 32 keys and 208 rows."""
    strip = configs.strip(N, 64, torch.bfloat16, H100)
    if strip is not None:
        left = N % strip.rows
        rows = N - left + (16 if 0 < left <= 16 else strip.rows if left else 0)
        padded = rows * (strip.KEY_TILES * strip.BLOCK_N + strip.REST) / N**2 - 1
        assert padded <= most
        return
    for kernel in ("rows", "weights", "fwd"):
        config = configs.config(kernel, 64, torch.bfloat16, H100)
        owned, inner = config.BLOCK_M, config.BLOCK_N
        if kernel == "fwd":
            owned, inner = inner, owned
        computed = -(-N // owned) * owned * (N // inner * inner + configs.tail(N, inner))
        assert computed / N**2 - 1 <= most


def test_small_shared_memory() -> None:
    """Where a program can have less shared memory, fewer stages of the pipeline take it."""
    small = configs.Device(80, 101376, 84)
    strip = configs.strip(400, 64, torch.bfloat16, small)
    assert strip is not None
    assert strip.num_stages == 1
    assert configs.config("weights", 256, torch.bfloat16, small).num_stages == 1
    assert configs.config("weights", 256, torch.bfloat16, H100).num_stages == 2


def test_architectures() -> None:
    """Every GPU takes the configurations of the nearest that is in the table."""
    found = [configs.architecture(*version) for version in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (7, 5))]
    assert found == [80, 80, 90, 100, 100, 80, 80]


@pytest.mark.parametrize("N", [12, 33, 49, 70, 110, 230, 256, 261, 330])
def test_every_kind_of_strip(N: int) -> None:
    """One tile and several, whole and partial, with columns and without, the last rows in a small block and not."""
    q, k = tt.make_qk(1, 3, (1,), N if N < 200 else 40, N, 64, dtype=torch.float16)
    for scale in (None, -0.125):
        exact = tt.oracle_flow(q, k, center=True, scale=scale)
        tt.assert_flow(am_flow(q, k, impl="triton", scale=scale), exact, q.shape[-2])
        centred = am_flow(q, k, center=True, impl="triton", scale=scale)
        tt.assert_centred(centred, exact, q.shape[-2], frame_step=0.2)


def gradients(frames: list[torch.Tensor], needed: tuple[bool, ...], **options: Any) -> None:
    """The gradients that are asked for are within their budget."""
    function: Callable[..., torch.Tensor] = am_flow_pair if len(frames) == 4 else am_flow
    inputs = [x.detach().requires_grad_(need) for x, need in zip(frames, needed, strict=True)]
    flow = function(*inputs, impl="triton", **options)
    dflow = tt.make_dflow(flow.shape)
    grads = torch.autograd.grad(flow, [x for x in inputs if x.requires_grad], dflow)
    exact, tie = tt.oracle_grads(dflow, *frames, **options), tt.grad_tie(dflow, *frames, **options)
    tt.assert_grads(grads, *([x for x, need in zip(of, needed, strict=True) if need] for of in (exact, tie)))


@pytest.mark.parametrize(
    "tokens", [(20, 64), (64, 20), (65, 130), (24, 197), (197, 24), (24, 257), (257, 24), (300, 33)]
)
def test_every_kind_of_gradient_strip(tokens: tuple[int, int]) -> None:
    """Few tiles and many, whole and not, with a row or key more and without, in both directions."""
    q, k = tt.make_qk(1, 3, (1,), *tokens, 16, dtype=torch.float16)
    gradients([q, k], (True, True))


@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_some_gradients_of_pairs(needed: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any of the four gradients without the others."""
    q, k = tt.make_qk(1, 4, (1,), 17, 40, 16, dtype=dtype)
    gradients([q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2]], tuple(map(bool, needed)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_frames_in_no_pair(dtype: torch.dtype) -> None:
    """With lag 3 of five frames, the third is in no pair: its gradient is 0, whatever was in memory."""
    q, k = tt.make_qk(1, 5, (1,), 17, 40, 16, dtype=dtype)
    with tt.poison_allocations():
        gradients([q, k], (True, True), lag=3)


def test_frames_in_no_pair_with_large_logits() -> None:
    """Their maps are not made by a forward in strips, and must not be looked at by a backward in tiles."""
    q, k = tt.make_qk(1, 3, (1,), 330, 16, 16, dtype=torch.float16)
    q[:, 1] *= 60
    inputs = q.requires_grad_(), k.requires_grad_()
    flow = am_flow(*inputs, lag=2, impl="triton")
    for grad in torch.autograd.grad(flow, inputs, tt.make_dflow(flow.shape)):
        assert grad.isfinite().all()
        assert not grad[:, 1].any()


@pytest.mark.parametrize("stride", ["frame", "token"])
@pytest.mark.parametrize("tokens", [20, 66])
def test_offsets_past_32_bits(stride: str, tokens: int) -> None:
    """Frames, or tokens, that lie so far apart that an element's place needs more than 32 bits."""
    frames = 4
    step = 2**30 + 8 if stride == "frame" else 2**26
    shape = (1, frames, 1, tokens, 16)
    strides = (0, step, 0, 16, 1) if stride == "frame" else (0, 16, 0, step, 1)
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    memory = torch.empty(2 * span, dtype=torch.float16)  # never touched but where the frames are: no memory is taken
    want_q, want_k = tt.make_qk(1, frames, (1,), tokens, tokens, 16, dtype=torch.float16)
    q, k = (memory[n * span :].as_strided(shape, strides).copy_(x) for n, x in enumerate((want_q, want_k)))
    inputs = q.requires_grad_(), k.requires_grad_()
    flow = am_flow(*inputs, impl="triton")
    dflow = tt.make_dflow(flow.shape)
    grads = torch.autograd.grad(flow, inputs, dflow)
    assert torch.equal(flow, am_flow(want_q, want_k, impl="triton"))
    exact = tt.oracle_grads(dflow, want_q, want_k)
    tt.assert_grads(grads, exact, tt.grad_tie(dflow, want_q, want_k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_of_zero(dtype: torch.dtype) -> None:
    """All maps are then uniform, padding or none: no flow and no gradient."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (1,), 20, 49, 16, dtype=dtype))
    flow = am_flow(q, k, scale=0.0, center=True, impl="triton")
    assert torch.equal(flow, torch.zeros_like(flow))
    for grad in torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("kernel", ["bwd_strip_q", "bwd_strip_k"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_strips(kernel: str, dtype: torch.dtype) -> None:
    """A strip covers all rows or keys, for any number of them up to 320, and with its tiles no warp repeats another."""
    for n in range(1, 321):
        strip = configs.gradient_strip(kernel, n, 64, dtype)
        assert strip is not None
        owned, wide = (strip.BLOCK_M, strip.BLOCK_N) if kernel == "bwd_strip_q" else (strip.BLOCK_N, strip.BLOCK_M)
        covered = strip.TILES * wide + strip.REST
        assert covered - wide < n <= covered
        assert strip.PARTIAL is (covered > n)
        assert not (strip.PARTIAL and strip.REST)
        assert owned < wide
        assert wide >= 8 * strip.num_warps
    assert configs.gradient_strip(kernel, 321, 64, dtype) is None
    assert configs.gradient_strip(kernel, 64, 72, dtype) is None
    assert configs.gradient_strip(kernel, 64, 64, torch.float32) is None


def test_block_d_pads_little() -> None:
    """A product never pads D beyond the next multiple of 16."""
    for D in range(1, 257):
        width = configs.block_d(D)
        assert width in (16, 32, 64)
        assert -(-D // width) * width == max(16, -(-D // 16) * 16)


@pytest.mark.parametrize("name", ["plain", "pair"])
def test_opcheck(name: str) -> None:
    """Both ops keep their schema, fake, autograd and dynamic-shape promises, with what the forward saves."""
    frames, options = sample(name)
    lse = [None if x is None else lse_of(x, y, options[0]) for x, y in (frames[:2], frames[2:])]
    library.opcheck(ops.am_flow, (*frames, *lse, *options, False, "triton"))
    flow, saved = ops.am_flow(*frames, *lse, *options, False, "triton")
    needed = [x is not None for x in frames]
    arguments = (tt.make_dflow(flow.shape), *frames, *options, needed, "triton", saved.detach())
    library.opcheck(ops.am_flow_backward, arguments)


def test_explain() -> None:
    """explain names the implementation, Triton's version, and how the forward is launched."""
    q, k = tt.make_qk(1, 2, (1,), 4, 4, 8)
    told = explain(q, k, impl="triton")
    assert told.impl == "triton"
    assert "triton kernels: Triton " in str(told)
    assert "forward in three passes, tiles of 64 x 32, 64 x 16, 16 x 64; backward in three passes by tiles" in str(told)
    assert "configurations for sm_90" in str(told)
    q, k = tt.make_qk(1, 2, (1,), 257, 257, 64, dtype=torch.float16)
    told = explain(q, k, impl="triton")
    assert "forward in one pass, strips of 64 rows and 1 x 256 + 1 keys; backward in two passes by strips" in str(told)


def lse_of(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.logsumexp(scale * (q.float() @ k.float().mT), -1)


@pytest.mark.parametrize(
    ("pair", "head_reduction", "scale", "logit_std"),
    [  # every two values of any two meet
        (False, "none", 0.2, 1.0),
        (False, "mean_map", -0.2, 4.0),
        (True, "none", -0.2, 4.0),
        (True, "mean_map", 0.2, 4.0),
        (True, "mean_map", -0.2, 1.0),
    ],
)
def test_log_sum_exp(
    pair: bool, head_reduction: str, scale: float, logit_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the rows' log-sum-exps, no pass is made for them, and every result keeps its budget."""
    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (launched.append(kernel.__name__), run(kernel, *rest)))
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 24, logit_std=logit_std)
    options: dict[str, Any] = {"scale": scale, "head_reduction": head_reduction}
    function: Callable[..., torch.Tensor] = am_flow_pair if pair else am_flow
    frames = [q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2]] if pair else [q, k]
    names = ["lse_a", "lse_b"] if pair else ["lse"]
    lse = {n: lse_of(*frames[2 * i : 2 * i + 2], scale).mT.contiguous().mT for i, n in enumerate(names)}
    frames = [x.detach().requires_grad_() for x in frames]
    exact = tt.oracle_flow(*frames, center=True, **options).detach()
    centred = function(*frames, center=True, impl="triton", **options, **lse)
    tt.assert_centred(centred.detach(), exact, 33, frame_step=0.2)
    flow = function(*frames, impl="triton", **options, **lse)
    tt.assert_flow(flow.detach(), exact, 33)
    dflow = tt.make_dflow(flow.shape)
    grads = torch.autograd.grad(flow, frames, dflow)
    arguments = (dflow, *frames)
    tt.assert_grads(grads, tt.oracle_grads(*arguments, **options), tt.grad_tie(*arguments, **options))
    assert launched
    assert "am_flow_rows_kernel" not in launched


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_sum_exp_not_finite(value: float) -> None:
    """A log-sum-exp that is not finite makes NaN of the flows that use its row, and of no other."""
    q, k = tt.make_qk(1, 4, (1,), 5, 70, 8)
    lse = lse_of(q, k, 8**-0.5)
    lse[0, 1, 0, 2] = value
    flow = am_flow(q, k, lse=lse, impl="triton")
    assert flow[0, :2].isnan().all()
    assert flow[0, 2].isfinite().all()


@pytest.mark.parametrize("tokens", [(4096, 24), (24, 4096)])
def test_long_rows_and_columns(tokens: tuple[int, int]) -> None:
    """Many tiles in a row, and many in a column, forward and backward."""
    q, k = tt.make_qk(1, 2, (1,), *tokens, 16)
    exact = tt.oracle_flow(q, k, center=True)
    flow = am_flow(q.requires_grad_(), k.requires_grad_(), impl="triton")
    tt.assert_flow(flow.detach(), exact, tokens[0])
    arguments = (tt.make_dflow(flow.shape), q, k)
    grads = torch.autograd.grad(flow, (q, k), arguments[0])
    tt.assert_grads(grads, tt.oracle_grads(*arguments), tt.grad_tie(*arguments))


def test_cpu_tensors_need_the_interpreter(cold_python: Callable[..., Any]) -> None:
    """impl='triton' on CPU tensors raises unless the interpreter was asked for, and impl=None never takes it."""
    code = """
import torch
from amflow_kernels import am_flow, explain
q = torch.randn(1, 2, 1, 4, 8)
try:
    am_flow(q, q, impl="triton")
except ValueError as error:
    assert "impl='triton': expected tensors on cuda, got cpu" in str(error), error
else:
    raise AssertionError("it ran")
"""
    cold_python(code, env={"TRITON_INTERPRET": None})
    code = """
import sys, torch
from amflow_kernels import am_flow, explain
q = torch.randn(1, 2, 1, 4, 8)
assert explain(q, q).impl != "triton"
am_flow(q, q)
assert "amflow_kernels.impl.triton.launch" not in sys.modules
am_flow(q, q, impl="triton")
assert "amflow_kernels.impl.triton.launch" in sys.modules
"""
    cold_python(code, env={"TRITON_INTERPRET": "1"})
