"""The one table of measured functions: this library and its peers. A new implementation is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from amflow_kernels import am_flow, am_flow_attention, am_flow_matmul
from benchmarks.shapes import Shape

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)

# Matrix products that are unavoidable if the maps are not kept: those of the size of q k^T, those of the size of M x.
# am_flow needs the map, and for the backward the map again, dq and dk. am_flow_attention adds A v, and dA and dv;
# am_flow_matmul adds M x, and dM and dx.
PRODUCTS = {
    ("am_flow", FORWARD): (1, 0),
    ("am_flow", FORWARD_BACKWARD): (4, 0),
    ("am_flow_attention", FORWARD): (2, 0),
    ("am_flow_attention", FORWARD_BACKWARD): (7, 0),
    ("am_flow_matmul", FORWARD): (1, 1),
    ("am_flow_matmul", FORWARD_BACKWARD): (4, 3),
}


class Inputs(NamedTuple):
    """One set of inputs: q, k, v (B, T, H, N, D), x (B, T - 1, H, N, C).

    dflow, dout and dy are the incoming gradients of the flow, of the attention output and of M x.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    dflow: Tensor
    dout: Tensor
    dy: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, direction: str) -> Inputs:
    """Random inputs; q, k, v and x require a gradient if the direction includes the backward."""
    grad = direction == FORWARD_BACKWARD
    clip, features = tuple(shape), shape.features()
    q, k, v, x = (
        torch.randn(size, dtype=dtype, device=device, requires_grad=grad) for size in (clip, clip, clip, features)
    )
    dflow, dy = (torch.randn(size, device=device) for size in (shape.flow(), features))
    return Inputs(q, k, v, x, dflow, torch.randn(clip, dtype=dtype, device=device), dy)


@dataclass(frozen=True)
class Provider:
    """One measured function."""

    name: str
    label: str
    build: Callable[[Shape], Callable[..., Tensor | tuple[Tensor, ...]]]  # the function for inputs of a shape
    baseline: str | None  # the provider that its time is compared with
    function: str = "am_flow"  # the public function whose table and rounds it belongs to
    ours: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    operands: tuple[str, ...] = ("q", "k")  # the inputs that it takes
    grads: tuple[str, ...] = ("dflow",)  # the incoming gradient of each result
    directions: tuple[str, ...] = DIRECTIONS
    compiles: bool = False  # it compiles again for each shape

    def prepare(self, shape: Shape, direction: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
        """The timed call: it returns the results, and with a backward also the gradient of each operand."""
        function = self.build(shape)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            operands = [getattr(inputs, name) for name in self.operands]
            result = function(*operands)
            results = result if isinstance(result, tuple) else (result,)
            grads: tuple[Tensor, ...] = ()
            if direction == FORWARD_BACKWARD:
                grads = torch.autograd.grad(results, operands, [getattr(inputs, name) for name in self.grads])
            if self.device != "cpu":
                torch.accelerator.synchronize(self.device)
            return (*results, *grads)

        return call


def motion(q: Tensor, k: Tensor) -> Tensor:
    """M = |A[t] - A[t + 1]| in eager PyTorch."""
    A = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return (A[:, :-1] - A[:, 1:]).abs()


def eager(q: Tensor, k: Tensor) -> Tensor:
    """The formula in eager PyTorch, differentiated by autograd."""
    return torch.softmax(motion(q, k), dim=-1).sum(dim=-2)


def eager_matmul(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """M x with M formed, differentiated by autograd."""
    return motion(q, k) @ x


def compiled(shape: Shape) -> Callable[..., Tensor]:
    """torch.compile of `eager` without the code of earlier shapes, which would lead to dynamic shapes or a fallback."""
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def product(shape: Shape) -> Callable[..., Tensor]:
    """q k^T only, into memory allocated once."""
    out = torch.empty(*shape[:4], shape.N)
    return lambda q, k: torch.matmul(q, k.mT, out=out)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention with frames folded into the batch: its fused kernels take only four dimensions."""
    return scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", "am_flow", lambda shape: am_flow, baseline=None, ours=True),
        Provider("eager", "eager", lambda shape: eager, baseline="ours"),
        Provider("chunked", 'impl="chunked"', lambda shape: partial(am_flow, impl="chunked"), baseline="ours"),
        Provider("compile", "torch.compile", compiled, baseline="ours", compiles=True),
        Provider("product", "q k^T", product, baseline="ours", directions=(FORWARD,)),
        Provider("sdpa", "SDPA", lambda shape: attention, baseline="ours", operands=("q", "k", "v"), grads=("dout",)),
        Provider("ours_bf16", "am_flow bf16", lambda shape: am_flow, baseline="ours", ours=True, dtype=torch.bfloat16),
        Provider(
            "sdpa_bf16", "SDPA bf16", lambda shape: attention, baseline="ours_bf16", operands=("q", "k", "v"),
            grads=("dout",), dtype=torch.bfloat16,
        ),
        Provider(
            "attention", "am_flow_attention", lambda shape: am_flow_attention, baseline="sdpa", ours=True,
            function="am_flow_attention", operands=("q", "k", "v"), grads=("dout", "dflow"),
        ),
        Provider(
            "matmul", "am_flow_matmul", lambda shape: am_flow_matmul, baseline="ours", ours=True,
            function="am_flow_matmul", operands=("q", "k", "x"), grads=("dy",),
        ),
        Provider(
            "eager_matmul", "eager", lambda shape: eager_matmul, baseline="matmul", function="am_flow_matmul",
            operands=("q", "k", "x"), grads=("dy",),
        ),
    )
}  # fmt: skip


def has_bf16_units(device: str = "cpu") -> bool:
    """Whether PyTorch multiplies bfloat16 matrices of a device in hardware."""
    from amflow_models.training.parallel import cpu_has_bf16  # slow to import, and only measurements need it

    return device != "cpu" or cpu_has_bf16()


def is_left_out(provider: Provider) -> bool:
    """Whether a peer is not measured here: PyTorch in bfloat16 on a CPU that emulates it takes minutes."""
    return not provider.ours and provider.dtype == torch.bfloat16 and not has_bf16_units(provider.device)


def names(function: str, direction: str) -> list[str]:
    """The providers measured in the same rounds: those of a function, then their baselines."""
    own = [p for p in PROVIDERS.values() if p.function == function and direction in p.directions and not is_left_out(p)]
    return list(dict.fromkeys([*(p.name for p in own), *(p.baseline for p in own if p.baseline)]))


def rows(direction: str) -> list[tuple[str, str]]:
    """Each function and each provider measured for it."""
    functions = dict.fromkeys(p.function for p in PROVIDERS.values())
    return [(function, name) for function in functions for name in names(function, direction)]
