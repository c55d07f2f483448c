"""The ops as PyTorch sees them: opcheck, torch.compile, torch.export, activation checkpointing, a cold start."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from amflow_kernels import am_flow, am_flow_pair, ops
from amflow_kernels import testing as tt

pytestmark = pytest.mark.capability

Impl = Callable[..., bool]

# scale, lag, temperature, head_reduction of one schema that serves both forms (lag 0: pairs)
SAMPLES = {
    "plain": ((2,), torch.float32, 0.3, 1, 1.0, "none"),
    "lag": ((2,), torch.bfloat16, 0.3, 2, 0.5, "mean"),
    "windows": ((2, 3), torch.float16, -0.3, 1, 1.0, "mean_map"),
    "pair": ((2,), torch.float32, 0.3, 0, 2.0, "none"),
    "pair of windows": ((2, 3), torch.bfloat16, 0.3, 0, 1.0, "mean_map"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sample(name: str, requires_grad: tuple[bool, bool] = (False, False)) -> tuple[tuple[Tensor | None, ...], Any]:
    """(q, k, q_b, k_b) and (scale, lag, temperature, head_reduction)."""
    groups, dtype, scale, lag, temperature, head_reduction = SAMPLES[name]
    q, k = tt.make_qk(2, 4, groups, 5, 7, 6, dtype=dtype)
    frames = [q, k] if lag else [q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2]]
    frames = [x.detach().requires_grad_(requires_grad[i % 2]) for i, x in enumerate(frames)]
    return (*frames, *[None] * (4 - len(frames))), (scale, lag, temperature, head_reduction)


@pytest.mark.parametrize("requires_grad", [(False, False), (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name: str, center: bool, requires_grad: tuple[bool, bool], impl: str, must_run: Impl) -> None:
    """amflow::am_flow keeps its schema, fake, autograd and dynamic-shape promises."""
    frames, options = sample(name, requires_grad)
    if must_run(impl, lambda: ops.am_flow(*frames, None, None, *options, center, impl)):
        library.opcheck(ops.am_flow, (*frames, None, None, *options, center, impl))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_backward(name: str, needs: tuple[bool, bool], impl: str, must_run: Impl) -> None:
    """amflow::am_flow_backward keeps the same promises, whichever gradients are needed."""
    frames, options = sample(name)
    q, k = frames[:2]
    dflow = tt.make_dflow(tt.flow_shape(q, k, lag=options[1], head_reduction=options[3]))
    needed = [n and x is not None for n, x in zip(needs * 2, frames, strict=True)]
    arguments = (dflow, *frames, *options, needed, impl, torch.empty(0))
    if must_run(impl, lambda: ops.am_flow_backward(*arguments)):
        library.opcheck(ops.am_flow_backward, arguments)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_opcheck_empty(shape: tuple[int, int], impl: str) -> None:
    """So do both ops on no clips and on no pairs."""
    q = torch.zeros(*shape, 2, 5, 6)
    frames, lag = ((q, q, None, None), 1) if shape[1] else ((q, q, q, q), 0)
    options = (0.3, lag, 1.0, "none")
    library.opcheck(ops.am_flow, (*frames, None, None, *options, False, impl))
    dflow = torch.zeros(shape[0], max(0, shape[1] - lag), 2, 5)
    needed = [x is not None for x in frames]
    library.opcheck(ops.am_flow_backward, (dflow, *frames, *options, needed, impl, torch.empty(0)))


def head(q: Tensor, k: Tensor, impl: str, **options: Any) -> Tensor:
    """What a model makes of a flow: something before it, something after it, one number."""
    flow = am_flow(q * 1.5, k + 0.1, center=True, impl=impl, **options)
    paired = am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], impl=impl)
    return (flow * 3).square().sum() + paired.square().mean()


def loss_and_grads(function: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kw: Any) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    loss = function(q, k, *args, **kw)
    loss.backward()  # not autograd.grad, which reentrant checkpointing refuses
    return [loss.detach(), q.grad, k.grad]


def assert_all_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


# B, T, Nq, Nk; no two sizes of the first are equal, or PyTorch compiles for equal ones
SHAPES = [(3, 4, 5, 7), (2, 3, 6, 9), (4, 5, 8, 11), (5, 6, 17, 19), (2, 7, 33, 21)]


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_compile_with_any_shape(dynamic: bool | None, graphs: int, impl: str, must_run: Impl) -> None:
    """One full graph serves every B, T and N, forward and backward: no recompiles as the shapes change.

    With dynamic=None PyTorch compiles the first shape as it is and generalises at the second.
    """
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    if not must_run(impl, lambda: head(*tt.make_qk(3, 4, (2,), 5, 7, 6), impl)):
        return
    for B, T, Nq, Nk in SHAPES:
        q, k = tt.make_qk(B, T, (2,), Nq, Nk, 6)
        assert_all_close(loss_and_grads(compiled, q, k, impl), loss_and_grads(head, q, k, impl))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_with_inductor(dtype: torch.dtype, impl: str, must_run: Impl) -> None:
    """The default backend gives the eager result on views of a fused qkv, with every option set."""

    def attention(qkv: Tensor, weight: Tensor) -> Tensor:
        q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = q.unflatten(0, (2, 4)), k.unflatten(0, (2, 4))
        flow = am_flow(q, k, scale=0.4, lag=2, temperature=0.5, head_reduction="mean", impl=impl)
        return (flow * weight).sum()

    qkv, weight = torch.randn(8, 10, 48, dtype=dtype), torch.randn(10)
    if must_run(impl, lambda: attention(qkv, weight)):
        compiled = torch.compile(attention, fullgraph=True)
        expected = loss_and_grads(attention, qkv, weight)
        got = loss_and_grads(compiled, qkv, weight)
        torch.testing.assert_close(got, expected)


def test_bad_input_under_compile() -> None:
    """The checks work in traced code: a bad option still raises, and names itself."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, temperature: float) -> Tensor:
        return am_flow(q, k, temperature=temperature, impl="reference")

    q, k = tt.make_qk(1, 3, (2,), 5, 7, 6)
    with pytest.raises(Exception, match="temperature: expected at least 1/64"):
        compiled(q, k, 0.001)


def test_export(impl: str, must_run: Impl) -> None:
    """torch.export keeps the op as one node and the exported program serves other B, T and N."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return am_flow(q, k, head_reduction="mean", center=True, impl=impl) * 2

    q, k = tt.make_qk(2, 3, (2,), 5, 7, 6)
    if not must_run(impl, lambda: Model()(q, k)):
        return
    # T from 3 on: PyTorch specialises sizes of 1, and with T = 2 that is the number of flows
    B, T, Nq, Nk = (torch.export.Dim(name, min=3 if name == "T" else 2) for name in ("B", "T", "Nq", "Nk"))
    program = torch.export.export(Model(), (q, k), dynamic_shapes=({0: B, 1: T, 3: Nq}, {0: B, 1: T, 3: Nk}))
    assert [n.target for n in program.graph.nodes].count(torch.ops.amflow.am_flow.default) == 1
    for B, T, Nq, Nk in SHAPES:
        q, k = tt.make_qk(B, T, (2,), Nq, Nk, 6)
        assert torch.equal(program.module()(q, k), Model()(q, k))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, impl: str, must_run: Impl) -> None:
    """Checkpointed, the gradients are the same bits, and nothing but the inputs is kept."""
    q, k = tt.make_qk(1, 3, (2,), 17, 19, 8)
    if must_run(impl, lambda: head(q, k, impl)):
        got = loss_and_grads(lambda q, k: checkpoint(head, q, k, impl, use_reentrant=use_reentrant), q, k)
        for x, y in zip(got, loss_and_grads(head, q, k, impl), strict=True):
            assert torch.equal(x, y)


def test_backward_twice(impl: str, must_run: Impl) -> None:
    """With retain_graph the second backward adds the same gradient again; without it the inputs are let go."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    loss = am_flow(q, k, impl=impl).square().sum()
    loss.backward(retain_graph=True)
    once = q.grad.clone()
    loss.backward()
    assert torch.equal(q.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inputs_changed_before_backward(impl: str, must_run: Impl) -> None:
    """Changing q in place between forward and backward is an error, not a wrong gradient."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    loss = am_flow(q, k, impl=impl).square().sum()
    with torch.no_grad():
        q += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_reference_cycles(impl: str, must_run: Impl) -> None:
    """Inputs are freed as soon as the flow is dropped, without the garbage collector."""
    q, k = (x.requires_grad_() for x in tt.make_qk(1, 3, (2,), 17, 19, 8))
    if not must_run(impl, lambda: am_flow(q, k, impl=impl)):
        return
    gc.collect()
    gc.disable()
    try:
        freed: list[bool] = []
        product = q * 1.0
        weakref.finalize(product, freed.append, True)
        flow = am_flow(product, k, impl=impl)
        flow.sum().backward()
        del product, flow
        assert freed
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_cold_process_compiled_first(backend: str, cpu_kernels_run: bool, cold_python: Callable[..., Any]) -> None:
    """A process whose very first call is compiled with fullgraph works, forward and backward."""
    code = f"""
import warnings
import torch
from amflow_kernels import am_flow
warnings.simplefilter("ignore", RuntimeWarning)
q, k = (x.requires_grad_() for x in torch.randn(2, 1, 3, 2, 9, 8))
flow = torch.compile(lambda q, k: am_flow(q, k) * 2, fullgraph=True, backend="{backend}")(q, k)
(dq,) = torch.autograd.grad(flow.square().sum(), q)
expected = am_flow(q, k) * 2
assert torch.equal(flow, expected)
assert torch.equal(dq, torch.autograd.grad(expected.square().sum(), q)[0])
from amflow_kernels import explain
print("ran", explain(q, k).impl)
"""
    assert ("ran cpu" if cpu_kernels_run else "ran reference") in cold_python(code).stdout
