"""The ops as PyTorch sees them: opcheck, torch.compile, torch.export, a cold start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from amflow_kernels import am_flow, am_flow_matmul, am_flow_matmul_pair, am_flow_pair, ops
from amflow_kernels import testing as tt
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem
from tests.kernels.conformance import BF16, FP16, FP32, OPERATORS, Subject
from tests.kernels.op_calls import call_flow_op, clip_and_features


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def op_arguments(problem: Problem | MatmulProblem) -> tuple[Any, ...]:
    """The arguments of the op but for `impl`, and for `center` of the flow."""
    options = (problem.logit_scale, problem.shift, problem.temperature)
    if isinstance(problem, MatmulProblem):
        return (*problem.frames, problem.x, *options, problem.transpose, problem.softmax)
    return (*problem.frames, problem.lse, problem.lse_b, *options, problem.head_reduction)


def flow_problem(name: str, dtype: torch.dtype) -> Problem:
    groups = (2, 3) if "windows" in name else (2,)
    q, k = tt.make_qk(2, 4, groups, 5, 7, 6, dtype=dtype)
    if "pair" in name:
        frames = {"q": q[:, ::2], "k": k[:, ::2], "q_b": q[:, 1::2], "k_b": k[:, 1::2]}
        return Problem(**frames, scale=0.3, temperature=2.0, head_reduction="mean_map" if "windows" in name else "none")
    options: dict[str, Any] = {
        "clip": {"scale": 0.3},
        "clip with lag": {"scale": 0.3, "lag": 2, "temperature": 0.5, "head_reduction": "mean"},
        "clip of windows": {"scale": -0.3, "head_reduction": "mean_map"},
    }[name]
    return Problem(q, k, **options)


FLOWS = ("clip", "clip with lag", "clip of windows", "pair", "pair of windows")
DTYPE_OF = dict(zip(FLOWS, (FP32, BF16, FP16, FP32, BF16), strict=True))


def dtype_for(subject: Subject, wanted: torch.dtype) -> torch.dtype:
    return wanted if wanted in subject.dtypes else FP32


def require_grad(tensors: tuple[Any, ...], needed: tuple[bool, ...]) -> list[Any]:
    """Detached copies of the tensors that require a gradient as `needed` says, cyclically."""
    return [
        x.detach().requires_grad_(needed[i % len(needed)]) if isinstance(x, Tensor) else x
        for i, x in enumerate(tensors)
    ]


@pytest.mark.parametrize("requires_grad", [(False, False), (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_op_passes_opcheck(name: str, requires_grad: tuple[bool, bool], subject: Subject) -> None:
    """Schema, fake, autograd and dynamic-shape promises, with what the forward saves."""
    arguments = op_arguments(flow_problem(name, dtype_for(subject, DTYPE_OF[name])))
    arguments = (*require_grad(arguments[:4], requires_grad), *arguments[4:])
    library.opcheck(ops.am_flow, (*arguments, name == "pair", subject.name))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_backward_op_passes_opcheck(name: str, needs: tuple[bool, bool], subject: Subject) -> None:
    problem = flow_problem(name, dtype_for(subject, DTYPE_OF[name]))
    frames, lse, options = op_arguments(problem)[:4], op_arguments(problem)[4:6], op_arguments(problem)[6:]
    _, saved = ops.am_flow(*frames, *lse, *options, False, subject.name)
    needed = [n and x is not None for n, x in zip(needs * 2, frames, strict=True)]
    dflow = tt.make_dflow(problem.flow_shape)
    library.opcheck(ops.am_flow_backward, (dflow, *frames, *options, needed, subject.name, saved.detach()))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_the_flow_ops_pass_opcheck_without_clips_and_without_pairs(shape: tuple[int, int], impl: str) -> None:
    q = torch.zeros(*shape, 2, 5, 6)
    problem = Problem(q, q) if shape[1] else Problem(q, q, q_b=q, k_b=q)
    frames, lse, options = op_arguments(problem)[:4], op_arguments(problem)[4:6], op_arguments(problem)[6:]
    library.opcheck(ops.am_flow, (*frames, *lse, *options, False, impl))
    _, saved = ops.am_flow(*frames, *lse, *options, False, impl)
    needed = [x is not None for x in frames]
    library.opcheck(
        ops.am_flow_backward, (torch.zeros(problem.flow_shape), *frames, *options, needed, impl, saved.detach())
    )


def matmul_problem(operator: str, subject: Subject) -> MatmulProblem:
    """Each operator with another lag (0: pairs) and other dtypes."""
    lag, dtype, x_dtype = {
        "M": (1, FP32, FP32), "M^T": (2, BF16, BF16), "P": (0, FP16, FP32), "P^T": (1, BF16, FP32),
    }[operator]  # fmt: skip
    dtype, x_dtype = dtype_for(subject, dtype), dtype_for(subject, x_dtype)
    groups = (2, 3) if lag == 1 and subject.fast else (2,)
    q, k = tt.make_qk(2 if subject.fast else 1, 4, groups, 5, 7, 6, dtype=dtype)
    frames = {"q": q, "k": k, "lag": lag} if lag else {
        "q": q[:, ::2], "k": k[:, ::2], "q_b": q[:, 1::2], "k_b": k[:, 1::2],
    }  # fmt: skip
    transpose, softmax = OPERATORS[operator]
    x = tt.make_features(frames["q"], frames["k"], 3, lag=lag, transpose=transpose, dtype=x_dtype)
    temperature = 0.5 if softmax else 1.0
    return MatmulProblem(**frames, x=x, scale=0.3, temperature=temperature, transpose=transpose, softmax=softmax)


@pytest.mark.operator
@pytest.mark.parametrize("requires_grad", [(False, False), (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_matmul_op_passes_opcheck(operator: str, requires_grad: tuple[bool, bool], subject: Subject) -> None:
    arguments = op_arguments(matmul_problem(operator, subject))
    needed = (*requires_grad, *requires_grad, requires_grad[1])
    arguments = (*require_grad(arguments[:5], needed), *arguments[5:])
    library.opcheck(ops.am_flow_matmul, (*arguments, subject.name))


@pytest.mark.operator
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_matmul_backward_op_passes_opcheck(operator: str, needs: tuple[bool, bool, bool], subject: Subject) -> None:
    problem = matmul_problem(operator, subject)
    arguments = op_arguments(problem)
    dy = torch.randn(problem.product_shape)
    needed = [n and t is not None for n, t in zip(needs[:2] * 2, problem.frames, strict=True)] + [needs[2]]
    library.opcheck(ops.am_flow_matmul_backward, (dy, *arguments, needed, subject.name))


# ---------------------------------------------------------------------------------------------------- compiled


def flow_loss(q: Tensor, k: Tensor, x: Tensor, impl: str) -> Tensor:
    """What a model makes of a flow: something before it, something after it, one number."""
    flow = am_flow(q * 1.5, k + 0.1, center=True, impl=impl)
    paired = am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], impl=impl)
    return (flow * 3).square().sum() + paired.square().mean() + 0 * x.sum()


def matmul_loss(q: Tensor, k: Tensor, x: Tensor, impl: str) -> Tensor:
    """The same of the operator: M^T of M x."""
    moved = am_flow_matmul(q * 1.5, k + 0.1, x, impl=impl)
    back = am_flow_matmul_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:], moved, transpose=True, softmax=True, impl=impl)
    return (back * 3).square().sum()


def loss_and_grads(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *args: Any) -> list[Tensor]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    loss = function(*inputs, *args)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


# B, T, Nq, Nk, C; no two of the first, 2 heads, T - 1 pairs and D = 6 are equal, or PyTorch compiles for equal ones
SHAPES = [(5, 9, 7, 11, 13), (2, 3, 6, 9, 3), (4, 5, 8, 11, 16), (5, 6, 17, 19, 5), (2, 7, 33, 21, 40)]


@pytest.mark.subjects("reference", "cpu")  # compiled code sees the op, whichever implementation runs in it
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
@pytest.mark.parametrize("loss", [flow_loss, matmul_loss])
def test_one_full_graph_serves_every_shape(
    loss: Callable[..., Tensor], dynamic: bool | None, graphs: int, impl: str
) -> None:
    """Forward and backward, no recompiles as B, T, N and C change.

    With dynamic=None PyTorch compiles the first shape as it is and generalises at the second.
    """
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, T, Nq, Nk, C in SHAPES:
        q, k = tt.make_qk(B, T, (2,), Nq, Nk, 6)
        inputs = q, k, tt.make_features(q, k, C, lag=1)
        for x, y in zip(loss_and_grads(compiled, inputs, impl), loss_and_grads(loss, inputs, impl), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.subjects("cpu")
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
def test_inductor_gives_the_eager_result(dtype: torch.dtype, impl: str) -> None:
    """On views of a fused qkv, with every option set."""

    def attention(qkv: Tensor, weight: Tensor) -> Tensor:
        q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = q.unflatten(0, (2, 4)), k.unflatten(0, (2, 4))
        flow = am_flow(q, k, scale=0.4, lag=2, temperature=0.5, head_reduction="mean", impl=impl)
        return (flow * weight).sum()

    inputs = torch.randn(8, 10, 48, dtype=dtype), torch.randn(10)
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(loss_and_grads(compiled, inputs), loss_and_grads(attention, inputs))


def test_bad_input_raises_in_compiled_code() -> None:
    """The checks work in traced code: a bad option raises, and names itself."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, temperature: float) -> Tensor:
        return am_flow(q, k, temperature=temperature, impl="reference")

    q, k = tt.make_qk(1, 3, (2,), 5, 7, 6)
    with pytest.raises(Exception, match="temperature: expected at least 1/64"):
        compiled(q, k, 0.001)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_inside_of_an_op_is_not_traced(requires_grad: bool) -> None:
    """Where a graph break leaves its call to Python, from which torch.compile traces what is called next."""

    def traced_frames(function: Callable[[Tensor, Tensor], Tensor]) -> int:
        torch._dynamo.reset()
        counters.clear()
        left_to_python = torch.compiler.disable(function, recursive=False)
        compiled = torch.compile(lambda q, k: left_to_python(q, k) * 2, backend="eager")
        q, k, _ = clip_and_features()
        compiled(q.requires_grad_(requires_grad), k)
        return counters["frames"]["total"]

    assert traced_frames(call_flow_op) == traced_frames(lambda q, k: torch.add(q[..., :5, :], k[..., :5, :]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_call_is_checked_once(requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the public function, which hands its problem to the op."""
    checks: list[int] = []
    check = MapPairs.__post_init__
    monkeypatch.setattr(MapPairs, "__post_init__", lambda self: (checks.append(1), check(self))[1])
    q, k, x = clip_and_features()
    for call in (lambda: am_flow(q, k), lambda: am_flow_pair(q, k, q, k), lambda: am_flow_matmul(q, k, x)):
        checks.clear()
        q.requires_grad_(requires_grad)
        call()
        assert len(checks) == 1


class ReplaceArgument(TorchDispatchMode):
    """Calls the flow's op with another argument than it was called with."""

    def __init__(self, position: int, value: Any) -> None:
        super().__init__()
        self.position, self.value = position, value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.am_flow:
            args = (*args[: self.position], self.value, *args[self.position + 1 :])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(1, 3, 2, 7, 5), "k: expected the shape of q"),
        (7, 3, "q: expected more frames"),
        (8, 0.0, "temp"),
    ],
    ids=["k", "lag", "temperature"],
)
def test_an_op_checks_what_the_public_function_has_not(position: int, value: Any, message: str) -> None:
    """Where a mode calls the op with something else than the public function did, whose checks do not count then."""
    q, k, _ = clip_and_features()
    with ReplaceArgument(position, value), pytest.raises(ValueError, match=message):
        am_flow(q, k)
    with ReplaceArgument(8, 2.0):
        flow = am_flow(q, k)
    assert torch.equal(flow, am_flow(q, k, temperature=2.0))


def test_eager_calls_do_not_import_the_compiler(cold_python: Callable[..., Any]) -> None:
    """torch._dynamo takes longer to import than the rest of a first call."""
    code = """
import sys, warnings
import torch
from amflow_kernels import am_flow, am_flow_matmul
warnings.simplefilter("ignore", RuntimeWarning)
q, k = (x.requires_grad_() for x in torch.randn(2, 1, 3, 2, 9, 8))
assert "torch._dynamo" not in sys.modules
(am_flow(q, k).square().sum() + am_flow_matmul(q, k, torch.randn(1, 2, 2, 9, 4)).sum()).backward()
assert "torch._dynamo" not in sys.modules
"""
    cold_python(code)


@pytest.mark.cpu
@pytest.mark.fallback
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_cold_process_may_begin_with_compiled_code(
    backend: str, cpu_kernels_run: bool, cold_python: Callable[..., Any]
) -> None:
    """With fullgraph, forward and backward."""
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
    assert ("ran cpu" if cpu_kernels_run else "ran chunked") in cold_python(code).stdout
