"""Transforms of PyTorch on the ops: modes of differentiation that they lack raise, and torch.vmap works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from amflow_kernels import am_flow, am_flow_matmul, am_flow_pair
from tests.kernels.op_calls import call_flow_op, call_matmul_op, clip_and_features


def pair_flow(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return am_flow_pair(q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:])


DIFFERENTIABLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "am_flow": lambda q, k, x: am_flow(q, k),
    "am_flow_pair": pair_flow,
    "am_flow_matmul": lambda q, k, x: am_flow_matmul(q, k, x),
    "the flow op": lambda q, k, x: call_flow_op(q, k),
    "the matmul op": call_matmul_op,
}


def dual(f: Callable[..., Tensor], q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, torch.ones_like(q)), k, x)).primal


def loss_of(f: Callable[..., Tensor], k: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda q: f(q, k, x).square().sum()


def linear_model_gradient(f: Callable[..., Tensor], q: Tensor, k: Tensor, x: Tensor) -> Any:
    """A gradient with respect to parameters, as torch.func.functional_call is used."""
    model = torch.nn.Linear(6, 6)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return f(torch.func.functional_call(model, parameters, (q,)), k, x).square().sum()

    return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


MODES: dict[str, tuple[Callable[..., Any], str]] = {
    "jvp": (lambda f, q, k, x: torch.func.jvp(loss_of(f, k, x), (q,), (q,)), "forward-mode"),
    "dual numbers": (dual, "forward-mode"),
    "jacfwd": (lambda f, q, k, x: torch.func.jacfwd(loss_of(f, k, x))(q), "forward-mode"),
    "grad": (lambda f, q, k, x: torch.func.grad(loss_of(f, k, x))(q), "torch.func"),
    "vjp": (lambda f, q, k, x: torch.func.vjp(loss_of(f, k, x), q)[0], "torch.func"),
    "jacrev": (lambda f, q, k, x: torch.func.jacrev(loss_of(f, k, x))(q), "torch.func"),
    "functional_call": (linear_model_gradient, "torch.func"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("mode", MODES)
def test_other_modes_of_differentiation_raise(mode: str, function: str, compiled: bool) -> None:
    """None returns zeros: the message says which mode was asked for and which work."""
    differentiate, name = MODES[mode]
    if compiled:
        differentiate = torch.compile(differentiate, backend="aot_eager")
    with pytest.raises(Exception, match=rf"amflow_kernels: .*gradients by backward\(\).*{name}.* was requested"):
        differentiate(DIFFERENTIABLE[function], *clip_and_features())


def test_transforms_of_what_surrounds_a_flow_work() -> None:
    """Only a gradient through the flow is refused."""
    q, k, _ = clip_and_features()
    weight = torch.ones(7)
    grad = torch.func.grad(lambda weight: (am_flow(q, k) * weight).sum())(weight)
    torch.testing.assert_close(grad, am_flow(q, k).sum((0, 1, 2)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, 0), (None, 4, None)], ids=str)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...], function: str, compiled: bool) -> None:
    """With gradients by autograd around it."""
    base = clip_and_features()
    generator = torch.Generator().manual_seed(1)

    def stacked(x: Tensor, dim: int | None) -> Tensor:
        return x if dim is None else torch.stack([x + torch.randn(x.shape, generator=generator) for _ in range(3)], dim)

    inputs = tuple(stacked(x, dim).requires_grad_() for x, dim in zip(base, in_dims, strict=True))

    def looped(*inputs: Tensor) -> Tensor:
        calls = [
            [x if dim is None else x.select(dim, i).contiguous() for x, dim in zip(inputs, in_dims, strict=True)]
            for i in range(3)
        ]
        return torch.stack([DIFFERENTIABLE[function](*call) for call in calls])

    mapped = torch.vmap(DIFFERENTIABLE[function], in_dims=in_dims)
    if compiled:
        mapped = torch.compile(mapped, backend="aot_eager")
    found, expected = mapped(*inputs), looped(*inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=generator)
    grads, expected_grads = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (found, expected)
    )
    for x, y in zip(grads, expected_grads, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_batched_gradients_are_a_loop() -> None:
    """torch.autograd.grad(is_grads_batched=True) maps over the backward alone."""
    q, k, _ = clip_and_features()
    flow = am_flow(q.requires_grad_(), k)
    dflow = torch.randn(3, *flow.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(flow, q, dflow, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.autograd.grad(flow, q, dflow[i], retain_graph=True)[0])
