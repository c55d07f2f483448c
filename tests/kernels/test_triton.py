"""The Triton kernels' own rules, in Triton's interpreter, with shapes small enough for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amflow_kernels import am_flow, dispatch, explain
from amflow_kernels import testing as tt
from amflow_kernels.dispatch import uses_lse
from amflow_kernels.problem import Problem
from tests.kernels import conformance
from tests.kernels.conformance import small_case

pytest.importorskip("triton", reason="Triton is not installed")

from amflow_kernels.impl.triton import configs, launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter", "hardware_products"),
]


SLOW = pytest.mark.slow


def assert_flows_within_budgets(problem: Problem) -> None:
    """Flow and centred flow against the oracle."""
    centred = replace(problem, center=True)
    exact = tt.oracle_flow(centred)
    tt.assert_flow(tt.run(problem, "triton"), exact, problem.Nq)
    tt.assert_centred(tt.run(centred, "triton"), exact, problem.Nq, frame_step=0.2)


def assert_within_budgets(problem: Problem) -> None:
    """Flow, centred flow and gradients against the oracle."""
    assert_flows_within_budgets(problem)
    inputs = [x.detach().requires_grad_() for x in tt.inputs_of(problem)]
    flow = tt.run(tt.with_inputs(problem, inputs), "triton")
    dflow = tt.make_dflow(problem.flow_shape)
    grads = torch.autograd.grad(flow, inputs, dflow)
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow))


def results(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flow = am_flow(q, k, lag=2, impl="triton")
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_and_wide_offsets_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of pairs that a program takes and the width of its offsets influence no result."""
    q, k = tt.make_qk(1, 9, (1,), 20, 70, 16, dtype=dtype)
    expected = results(q, k)
    for processors, index in ((10**6, None), (1, launch.tl.int64)):
        with monkeypatch.context() as patch:
            patch.setattr(configs.Device, "of", lambda _, n=processors: configs.Device(90, 232448, n))
            if index is not None:
                patch.setattr(launch, "_index_type", lambda *_, t=index: t)
                patch.setattr(launch, "_layout", launch._Layout)  # not one from the cache
            for got, want in zip(results(q, k), expected, strict=True):
                assert torch.equal(got, want)


def test_chunks_are_as_long_as_keeps_every_multiprocessor_busy() -> None:
    """A program takes as many pairs as leave two programs for each multiprocessor."""
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
        (577, (9, 64), 1),
        (640, (10, 64), 0),
    ],
)
def test_a_strip_covers_all_keys(Nk: int, tiles: tuple[int, int], rest: int) -> None:
    """Its tiles have one width; single columns cover the remaining keys."""
    strip = configs.strip(Nk, 64, torch.bfloat16, H100)
    assert strip is not None
    assert (strip.KEY_TILES, strip.BLOCK_N, strip.REST) == (*tiles, rest)  # noqa: SIM300
    covered = strip.KEY_TILES * strip.BLOCK_N + strip.REST
    assert covered - strip.BLOCK_N < Nk <= covered
    assert strip.PARTIAL is (covered > Nk)


def test_long_rows_wide_heads_and_float32_take_tiles() -> None:
    """No strip is configured for them."""
    assert configs.strip(641, 64, torch.bfloat16, H100) is None
    assert configs.strip(257, 64, torch.float32, H100) is None
    assert configs.strip(257, 72, torch.bfloat16, H100) is None


@pytest.mark.parametrize(("N", "most"), [(197, 0.21), (257, 0.07), (261, 0.07), (577, 0.03), (730, 0.07), (1370, 0.04)])
def test_padding_is_limited(N: int, most: float) -> None:
    """Work beyond the maps themselves, on an H100; it is largest at 197: 7 x 32 keys and 208 rows."""
    strip = configs.strip(N, 64, torch.bfloat16, H100)
    if strip is not None:
        left = N % strip.rows
        rows = N - left + (16 if 0 < left <= 16 else strip.rows if left else 0)
        padded = rows * (strip.KEY_TILES * strip.BLOCK_N + strip.REST) / N**2 - 1
        assert padded <= most
        return
    for kernel in ("rows", "weights", "fwd"):
        config = configs.config(kernel, torch.bfloat16, H100)
        owned, inner = config.BLOCK_M, config.BLOCK_N
        if kernel == "fwd":
            owned, inner = inner, owned
        computed = -(-N // owned) * owned * (N // inner * inner + configs.tail(N, inner))
        assert computed / N**2 - 1 <= most


def test_small_shared_memory_takes_fewer_stages() -> None:
    """The number of pipeline stages depends on the shared memory that a program can have."""
    small = configs.Device(80, 101376, 84)
    strip = configs.strip(400, 64, torch.bfloat16, small)
    assert strip is not None
    assert strip.num_stages == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_heads_wider_than_one_step_of_a_product_are_within_budgets(dtype: torch.dtype) -> None:
    """Each of the passes over tiles then loops over columns of q and k."""
    q, k = tt.make_qk(1, 3, (1,), 20, 70, 136, dtype=dtype)
    assert_within_budgets(Problem(q, k))


@pytest.fixture
def amd_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an AMD GPU, as far as the choice of kernels can tell."""
    properties = SimpleNamespace(major=9, minor=4, multi_processor_count=304)  # without the shared memory of a program
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    configs.Device.of.cache_clear()
    yield
    configs.Device.of.cache_clear()


def test_an_interpreter_that_numpy_breaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's with NumPy 2.4, where a kernel would fail with a TypeError about 0-dimensional arrays."""
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.3.5")
    q, k = tt.make_qk(1, 2, (1,), 4, 4, 8)
    assert dispatch.choose(Problem(q, k), "triton").name == "triton"
    monkeypatch.setattr("numpy.__version__", "2.4.0")
    with pytest.raises(RuntimeError, match=r"Triton 3\.6\.0 does not work with NumPy 2\.4\.0: install numpy<2\.4"):
        am_flow(q, k, impl="triton")


@pytest.mark.usefixtures("amd_gpu")
def test_amd_gpus_have_64_kb_of_shared_memory() -> None:
    """PyTorch does not report how much a program can have there."""
    assert configs.Device.of(torch.device("cuda", 0)) == configs.Device(80, 65536, 304)


@pytest.mark.usefixtures("amd_gpu")
def test_amd_gpus_take_plain_pytorch_by_default_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the kernels have run on one, they run there only if asked for."""
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("triton",)})  # a CPU plays the GPU
    q, k = tt.make_qk(1, 2, (1,), 4, 4, 8)
    choice = dispatch.choose(Problem(q, k), None)
    assert (choice.name, choice.fallback) == ("chunked", True)
    assert "triton: it has not yet run on an AMD GPU" in choice.reason
    assert dispatch.choose(Problem(q, k), "triton").name == "triton"
    with pytest.warns(RuntimeWarning, match="not yet run on an AMD GPU"):
        am_flow(q, k)


def test_every_gpu_takes_the_nearest_configurations() -> None:
    """GPUs that are not in the table take the configurations of the nearest architecture that is."""
    found = [configs.architecture(*version) for version in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (7, 5))]
    assert found == [80, 80, 90, 100, 100, 80, 80]


@pytest.mark.parametrize(
    "N", [12, 49, 70, 261, *(pytest.param(n, marks=SLOW) for n in (33, 110, 230, 256, 330, 577, 600))]
)
def test_every_kind_of_strip_is_within_its_budgets(N: int) -> None:
    """One tile or several, whole or partial, with or without columns, the last rows in a small block or not."""
    q, k = tt.make_qk(1, 3, (1,), N if N < 200 else 40, N, 64, dtype=torch.float16)
    for scale in (None, -0.125):
        assert_flows_within_budgets(Problem(q, k, scale=scale))


@pytest.mark.parametrize(
    "tokens",
    [
        (20, 64),
        (65, 130),
        (24, 257),
        *(pytest.param(tokens, marks=SLOW) for tokens in ((64, 20), (24, 197), (197, 24), (257, 24), (300, 33))),
    ],
)
def test_every_kind_of_gradient_strip_is_within_its_budgets(tokens: tuple[int, int]) -> None:
    """Few tiles or many, whole or partial, with or without one more row or key, in both directions."""
    q, k = tt.make_qk(1, 3, (1,), *tokens, 16, dtype=torch.float16)
    assert_within_budgets(Problem(q, k))


@pytest.mark.parametrize(
    ("tokens", "seed"),
    [
        ((65, 17), 0),
        ((17, 65), 6),
        pytest.param((65, 65), 1, marks=SLOW),
        *(pytest.param(tokens, 0, marks=SLOW) for tokens in ((129, 17), (17, 129), (257, 17), (17, 257))),
    ],
)
def test_both_passes_of_a_gradient_see_the_same_signs(tokens: tuple[int, int], seed: int) -> None:
    """Where elements of a map are near 1, rounding errors decide the sign of their change: in both passes alike."""
    q, k = tt.make_qk(1, 3, (1,), *tokens, 16, dtype=torch.float16, logit_std=60.0, seed=seed)
    problem = Problem(q, k, temperature=0.1)
    inputs = [x.requires_grad_() for x in (q, k)]
    dflow = tt.make_dflow(problem.flow_shape)
    grads = torch.autograd.grad(tt.run(problem, "triton"), inputs, dflow)
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow))


@pytest.mark.parametrize("head_reduction", ["none", pytest.param("mean_map", marks=SLOW)])
def test_float16_gradients_are_not_biased_toward_zero(head_reduction: str) -> None:
    """Matrix instructions drop the digits beyond TF32's: the gradients of the logits are rounded to it before."""
    case = small_case(tokens=(70, 70), D=64, dtype=torch.float16, temperature=1.0, head_reduction=head_reduction)
    problem = case.problem()
    dflow = case.incoming(problem.flow_shape)
    exact = tt.oracle_grads(problem, dflow)
    for grad, expected in zip(conformance.gradients(problem, [True, True], dflow, "triton"), exact, strict=True):
        assert grad is not None
        assert abs((grad * expected).sum() / expected.square().sum() - 1) < 1e-4


def test_frames_in_no_pair_have_a_gradient_of_zero_with_large_logits() -> None:
    """A forward in strips does not compute their maps, so a backward in tiles must not read their statistics."""
    q, k = tt.make_qk(1, 3, (1,), 330, 16, 16, dtype=torch.float16)
    q[:, 1] *= 60
    inputs = q.requires_grad_(), k.requires_grad_()
    flow = am_flow(*inputs, lag=2, impl="triton")
    for grad in torch.autograd.grad(flow, inputs, tt.make_dflow(flow.shape)):
        assert grad.isfinite().all()
        assert not grad[:, 1].any()


FAR = {  # strides of (batch, frame, head, token, feature)
    "frame": (0, 2**30 + 8, 2**11, 16, 1),
    "head": (0, 2**11, 2**30 + 8, 16, 1),
    "token": (0, 16, 64, 2**25, 1),
}


@pytest.mark.parametrize(
    ("far", "tokens", "head_reduction"),
    [
        ("frame", 20, "none"),
        ("frame", 66, "mean_map"),
        ("head", 20, "none"),
        ("head", 20, "mean_map"),
        ("token", 65, "none"),
        ("token", 129, "none"),
        pytest.param("token", 129, "mean_map", marks=SLOW),
    ],
)
def test_offsets_may_need_64_bits(far: str, tokens: int, head_reduction: str) -> None:
    """Frames, heads or tokens lie so far apart that the offset of an element needs more than 32 bits.

    65 and 129 tokens have a row and a key after the tiles; 129 have a second tile.
    """
    heads = 3 if far == "head" else 1
    shape = (1, 3, heads, tokens, 16)
    span = sum((n - 1) * s for n, s in zip(shape, FAR[far], strict=True)) + 1
    memory = torch.empty(2 * span, dtype=torch.float16)  # never touched but where the frames are: no memory is taken
    want_q, want_k = tt.make_qk(*shape[:2], shape[2:3], tokens, tokens, 16, dtype=torch.float16)
    q, k = (memory[n * span :].as_strided(shape, FAR[far]).copy_(x) for n, x in enumerate((want_q, want_k)))
    inputs = q.requires_grad_(), k.requires_grad_()
    flow = am_flow(*inputs, head_reduction=head_reduction, impl="triton")
    dflow = tt.make_dflow(flow.shape)
    grads = torch.autograd.grad(flow, inputs, dflow)
    assert torch.equal(flow, am_flow(want_q, want_k, head_reduction=head_reduction, impl="triton"))
    problem = Problem(want_q, want_k, head_reduction=head_reduction)
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow))


@pytest.mark.parametrize("kernel", ["bwd_strip_q", "bwd_strip_k"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_strips_cover_all_rows_and_repeat_no_work(kernel: str, dtype: torch.dtype) -> None:
    """For any number of rows or keys up to 320; no two warps do the same work."""
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


@pytest.mark.parametrize(("dtype", "widths"), [(torch.bfloat16, (16, 32, 64)), (torch.float32, (16, 32))])
def test_block_d_pads_little(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    """A product never pads D beyond the next multiple of 16."""
    for D in range(1, 257):
        width = configs.block_d(D, dtype)
        assert width in widths
        assert -(-D // width) * width == max(16, -(-D // 16) * 16)


def test_explain_describes_the_launches() -> None:
    """explain names the implementation, Triton's version, and how the forward is launched."""
    q, k = tt.make_qk(1, 2, (1,), 4, 4, 8)
    explanation = explain(q, k, impl="triton")
    assert explanation.impl == "triton"
    assert "triton kernels: Triton " in str(explanation)
    assert "forward in three passes, tiles of 128 x 64, 128 x 64, 64 x 128; backward in three passes by tiles" in str(
        explanation
    )
    assert "configurations for sm_90" in str(explanation)
    q, k = tt.make_qk(1, 2, (1,), 257, 257, 64, dtype=torch.float16)
    explanation = explain(q, k, impl="triton")
    assert "forward in one pass, strips of 64 rows and 1 x 256 + 1 keys; backward in two passes by strips" in str(
        explanation
    )


def lse_of(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.logsumexp(scale * (q @ k.mT), -1)


@pytest.mark.parametrize(
    ("pair", "head_reduction", "scale", "logit_std"),
    [  # every two values of any two meet
        (False, "none", 0.2, 1.0),
        (True, "mean_map", -0.2, 1.0),
        pytest.param(False, "mean_map", -0.2, 4.0, marks=pytest.mark.slow),
        pytest.param(True, "none", -0.2, 4.0, marks=pytest.mark.slow),
        pytest.param(True, "mean_map", 0.2, 4.0, marks=pytest.mark.slow),
    ],
)
def test_given_log_sum_exps_spare_a_pass(
    pair: bool, head_reduction: str, scale: float, logit_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that computes row statistics is not launched, and the flows keep their budgets."""
    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (launched.append(kernel.__name__), run(kernel, *rest)))
    q, k = tt.make_qk(1, 4, (2,), 33, 70, 24, logit_std=logit_std)
    frames = {"q": q, "k": k}
    if pair:
        frames = {"q": q[:, ::2], "k": k[:, ::2], "q_b": q[:, 1::2], "k_b": k[:, 1::2]}
    lse = {"lse": lse_of(frames["q"], frames["k"], scale)}
    if pair:
        lse["lse_b"] = lse_of(frames["q_b"], frames["k_b"], scale)
    lse = {name: x.mT.contiguous().mT for name, x in lse.items()}
    problem = Problem(**frames, **lse, scale=scale, head_reduction=head_reduction)
    assert uses_lse(problem, "triton")
    assert_flows_within_budgets(problem)
    assert launched
    assert "am_flow_rows_kernel" not in launched


@pytest.mark.parametrize("head_reduction", ["none", pytest.param("mean_map", marks=SLOW)])
def test_gradients_of_peaked_maps_use_no_given_log_sum_exps(head_reduction: str) -> None:
    """A row of nearly one element is off by the rounding of its log-sum-exp, much more than its gradients may be."""
    case = small_case(logits="one-hot", temperature=0.1, seed=1, head_reduction=head_reduction)
    problem = case.problem()
    lse = lse_of(problem.q.double(), problem.k.double(), problem.logit_scale).float()
    q, k = (x.detach().requires_grad_() for x in (problem.q, problem.k))
    dflow = case.incoming(problem.flow_shape)
    assert not uses_lse(replace(problem, q=q, k=k), "triton")
    grads = torch.autograd.grad(tt.run(replace(problem, q=q, k=k, lse=lse), "triton"), (q, k), dflow)
    exact, tie, magnitude = (f(problem, dflow) for f in (tt.oracle_grads, tt.grad_tie, tt.grad_magnitude))
    tt.assert_grads(grads, exact, tie, magnitude)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_sum_exp_that_is_not_finite_makes_nan_of_its_flows(value: float) -> None:
    """The flows that do not use its row stay finite."""
    q, k = tt.make_qk(1, 4, (1,), 5, 70, 8)
    lse = lse_of(q, k, 8**-0.5)
    lse[0, 1, 0, 2] = value
    flow = am_flow(q, k, lse=lse, impl="triton")
    assert flow[0, :2].isnan().all()
    assert flow[0, 2].isfinite().all()


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_gradients_stay_finite_beside_a_key_of_weight_zero(dtype: torch.dtype, budget: float) -> None:
    """A key has logits of -inf in one frame: gradients that are finite in the reference are finite here."""
    q, k = tt.make_qk(1, 5, (1,), 33, 40, 16, dtype=dtype)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, 2, :, 7, 0] = -torch.inf
    grads = []
    for impl in ("triton", "reference"):
        x = q.detach().requires_grad_(), k.detach().requires_grad_()
        flow = am_flow(*x, impl=impl)
        grads.append(torch.autograd.grad(flow, x, tt.make_dflow(flow.shape)))
    for found, expected in zip(*grads, strict=True):
        finite = expected.isfinite()
        assert finite.double().mean() > 0.5
        error = (found - expected)[finite].double().norm() / expected[finite].double().norm()
        assert error < budget


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(4096, 24), (24, 4096)])
def test_long_rows_and_columns_are_within_budgets(tokens: tuple[int, int]) -> None:
    """Many tiles in a row, and many in a column, forward and backward."""
    q, k = tt.make_qk(1, 2, (1,), *tokens, 16)
    assert_within_budgets(Problem(q, k))


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


@pytest.fixture
def coarse_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in TF32 parts as no GPU makes them worse.

    Both parts of an operand are truncated, the product of the two small parts is left out, and every sum of eight
    products is truncated to float32.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    from triton._C.libtriton import ir

    def truncated_to_tf32(x: Any) -> Any:
        return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def truncated(x: Any) -> Any:
        nearest = x.astype(np.float32)
        return np.where(np.abs(nearest.astype(np.float64)) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)

    def add_product(total: Any, a: Any, b: Any) -> Any:
        for k in range(0, a.shape[1], 8):
            total = truncated(total + a[:, k : k + 8].astype(np.float64) @ b[k : k + 8].astype(np.float64))
        return total

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise_acc: Any) -> Any:
        assert precision == ir.INPUT_PRECISION.TF32x3
        a_large, b_large = truncated_to_tf32(a.data), truncated_to_tf32(b.data)
        a_small, b_small = truncated_to_tf32(a.data - a_large), truncated_to_tf32(b.data - b_large)
        total = add_product(np.zeros(d.data.shape, np.float32), a_small, b_large)
        total = add_product(add_product(total, a_large, b_small), a_large, b_large)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("coarse_matrix_instructions")
@pytest.mark.parametrize(
    ("tokens", "D", "logit_std", "frame_step", "temperature"),
    [
        (65, 64, 1.0, 1e-3, 1.0),
        (65, 64, 3.0, 0.2, 1 / 64),
        (130, 64, 1.0, 0.2, 1.0),
        (130, 64, 6.0, 0.2, 1.0),
        (65, 128, 6.0, 0.2, 0.1),
    ],
)
def test_float32_in_tf32_parts_is_within_the_budgets_of_float32(
    tokens: int, D: int, logit_std: float, frame_step: float, temperature: float
) -> None:
    """Flow, centred flow and gradients, also of frames that hardly differ."""
    q, k = tt.make_qk(1, 2, (1,), tokens, tokens, D, logit_std=logit_std, frame_step=frame_step)
    problem = Problem(q, k, center=True, temperature=temperature)
    exact = tt.oracle_flow(problem)
    inputs = [x.requires_grad_() for x in tt.inputs_of(problem)]
    centred = tt.run(tt.with_inputs(problem, inputs), "triton")
    tt.assert_centred(centred.detach(), exact, tokens, frame_step=frame_step, temperature=temperature)
    flow = tt.run(replace(problem, center=False), "triton")
    tt.assert_flow(flow.detach(), exact, tokens, temperature=temperature)
    dflow = tt.make_dflow(problem.flow_shape)
    grads = torch.autograd.grad(centred, inputs, dflow)
    tt.assert_grads(grads, tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow))


@pytest.mark.usefixtures("coarse_matrix_instructions")
@pytest.mark.parametrize("operator", ["M", "P^T"])
def test_the_motion_operator_in_tf32_parts_is_within_the_budgets_of_float32(operator: str) -> None:
    """The product with features, and its gradients."""
    row = {name: values[0] for name, values in conformance.FACTORS.items()}
    row |= {"dtype": torch.float32, "tokens": (40, 33), "D": 64, "temperature": 1.0}
    case = conformance.MatmulCase(**row, operator=operator, C=17)
    conformance.check_product(case, "triton")
    conformance.check_product_gradients(case, "triton")
