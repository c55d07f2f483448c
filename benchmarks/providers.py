"""The one table of what is measured: this library and its peers. A new implementation is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from amflow_kernels import am_flow
from benchmarks.shapes import Shape

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)

# Products of the size of q k^T that can't be avoided if the maps are not kept: the map; in the backward the map again,
# dq and dk.
PRODUCTS = {FORWARD: 1, FORWARD_BACKWARD: 4}


class Inputs(NamedTuple):
    """One set of inputs: q, k, v (B, T, H, N, D), and the incoming gradients of a flow and of an attention output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dflow: Tensor
    dout: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, direction: str) -> Inputs:
    """Random inputs; q, k, v require a gradient if the direction has a backward."""
    grad = direction == FORWARD_BACKWARD
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=grad) for _ in range(3))
    return Inputs(q, k, v, torch.randn(shape.flow(), device=device), torch.randn(shape, dtype=dtype, device=device))


@dataclass(frozen=True)
class Provider:
    """One thing that is measured."""

    name: str
    label: str
    build: Callable[[Shape], Callable[..., Tensor]]  # the function of (q, k) or (q, k, v) for inputs of a shape
    baseline: str | None  # the provider its time is divided by
    ours: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    operands: int = 2  # how many of q, k, v it takes
    directions: tuple[str, ...] = DIRECTIONS
    compiles: bool = False  # it is compiled anew for each shape

    def prepare(self, shape: Shape, direction: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
        """What is timed: one call that gives the result, and in a backward the gradient of each operand."""
        function = self.build(shape)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            operands = inputs[: self.operands]
            result = function(*operands)
            grads: tuple[Tensor, ...] = ()
            if direction == FORWARD_BACKWARD:
                grads = torch.autograd.grad(result, operands, inputs.dout if self.operands == 3 else inputs.dflow)
            if self.device != "cpu":
                torch.accelerator.synchronize(self.device)
            return (result, *grads)

        return call


def eager(q: Tensor, k: Tensor) -> Tensor:
    """The formula as one writes it in eager PyTorch, differentiated by autograd."""
    A = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return torch.softmax((A[:, :-1] - A[:, 1:]).abs(), dim=-1).sum(dim=-2)


def compiled(shape: Shape) -> Callable[..., Tensor]:
    """torch.compile of `eager`, forgetting earlier shapes so that none is generalised or falls back."""
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def product(shape: Shape) -> Callable[..., Tensor]:
    """q k^T alone, into memory that is there already."""
    out = torch.empty(*shape[:4], shape.N)
    return lambda q, k: torch.matmul(q, k.mT, out=out)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention, frames folded into the batch: it is fused for four dimensions only."""
    return scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", "am_flow", lambda shape: am_flow, baseline=None, ours=True),
        Provider("eager", "eager", lambda shape: eager, baseline="ours"),
        Provider("compile", "torch.compile", compiled, baseline="ours", compiles=True),
        Provider("product", "q k^T alone", product, baseline="ours", directions=(FORWARD,)),
        Provider("sdpa", "SDPA", lambda shape: attention, baseline="ours", operands=3),
        Provider("ours_bf16", "am_flow bf16", lambda shape: am_flow, baseline="ours", ours=True, dtype=torch.bfloat16),
        Provider(
            "sdpa_bf16", "SDPA bf16", lambda shape: attention, baseline="ours_bf16", operands=3, dtype=torch.bfloat16
        ),
    )
}


def names(direction: str) -> list[str]:
    """The providers measured in this direction, in the table's order."""
    return [name for name, provider in PROVIDERS.items() if direction in provider.directions]
