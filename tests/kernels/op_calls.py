"""Calls of the bare ops, as programs that skip the public functions make them, and tensors of odd strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amflow_kernels import ops
from amflow_kernels import testing as tt

FLOW_OPTIONS = (0.3, 1, 1.0, "none")
PRODUCT_OPTIONS = (0.3, 1, 1.0, False, True)
NO_PAIR, NO_LSE = (None, None), (None, None)


def clip_and_features(T: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k = tt.make_qk(1, T, (2,), 5, 7, 6)
    return q, k, tt.make_features(q, k, 4, lag=1)


def call_flow_op(q: Tensor, k: Tensor, impl: str | None = None) -> Tensor:
    return ops.am_flow(q, k, *NO_PAIR, *NO_LSE, *FLOW_OPTIONS, False, impl)[0]


def call_flow_backward_op(q: Tensor, k: Tensor, impl: str, dflow: Tensor) -> tuple[Tensor, ...]:
    _, saved = ops.am_flow(q, k, *NO_PAIR, *NO_LSE, *FLOW_OPTIONS, False, impl)
    return ops.am_flow_backward(dflow, q, k, *NO_PAIR, *FLOW_OPTIONS, [True, True, False, False], impl, saved)


def call_matmul_op(q: Tensor, k: Tensor, x: Tensor, impl: str | None = None) -> Tensor:
    return ops.am_flow_matmul(q, k, *NO_PAIR, x, *PRODUCT_OPTIONS, impl)


def call_matmul_backward_op(q: Tensor, k: Tensor, x: Tensor, impl: str, dy: Tensor) -> tuple[Tensor, ...]:
    needs = [True, True, False, False, True]
    return ops.am_flow_matmul_backward(dy, q, k, *NO_PAIR, x, *PRODUCT_OPTIONS, needs, impl)


def call_op(name: str, inputs: dict[str, Tensor], impl: str) -> tuple[Tensor, ...]:
    """An op by its name, on q, k, x, and dflow or dy."""
    q, k, x = (inputs[n] for n in "qkx")
    if name == "flow":
        return (call_flow_op(q, k, impl),)
    if name == "flow backward":
        return call_flow_backward_op(q, k, impl, inputs["dflow"])
    if name == "matmul":
        return (call_matmul_op(q, k, x, impl),)
    return call_matmul_backward_op(q, k, x, impl, inputs["dy"])


def op_inputs() -> dict[str, Tensor]:
    q, k, x = clip_and_features()
    generator = torch.Generator().manual_seed(0)
    dflow, dy = (torch.randn(shape, generator=generator) for shape in ((1, 2, 2, 7), (1, 2, 2, 5, 4)))
    return {"q": q, "k": k, "x": x, "dflow": dflow, "dy": dy}


USES = {
    "flow": ("q", "k"),
    "flow backward": ("q", "k", "dflow"),
    "matmul": ("q", "k", "x"),
    "matmul backward": ("q", "k", "x", "dy"),
}


def overlapping(x: Tensor) -> Tensor:
    """Rows that share memory, as torch.Tensor.unfold makes them."""
    return torch.arange(x.numel() + 1.0).div(x.numel())[1:].as_strided(x.shape, (7, 5, 4, 3, 1)[-x.dim() :])


ODD_STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded last dimension": lambda x: x[..., :1].expand_as(x),
    "expanded": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "overlapping": overlapping,
    "storage offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "negated view": lambda x: torch.complex(x, x).conj().imag,
}
