"""What the integrations share: reading a layer's attention call in its own forward, and recording its AM flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from amflow_kernels.api import am_flow
from amflow_kernels.attention import attention, autocast
from amflow_kernels.dispatch import check_impl
from amflow_kernels.problem import Problem, check_options

UNREAD = "the model did not run inside the `with` block, or it ran without calling scaled_dot_product_attention there"
# Given q, k, v of the call; the attention's output if it has computed that, too, else None.
OnAttention = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class BlockFlow:
    """AM flow of one block, on the grid of the tokens that enter it.

    Attributes:
        grid: of the image's tokens, (B, T - lag, heads, height, width), float32; without heads if those are reduced.
        prefix: of the class token and registers, (B, T - lag, heads, prefix tokens); without heads if reduced.
        windows: in how many windows the block's attention runs. Each window's flow sums to its queries, and tells
            nothing of one window against another: no token attends to another window's.
    """

    grid: Tensor
    prefix: Tensor
    windows: int


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _kept_by_checkpoints() -> Any:
    """What is saved for a backward here is kept: activation checkpointing would look for it when it runs the layer
    again, which it may do after the ``with`` block."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class FlowRecorder:
    """The flows of the blocks of a model that runs, by block."""

    def __init__(
        self,
        num_frames: int,
        lag: int,
        temperature: float,
        head_reduction: str,
        center: bool,
        impl: str | None,
        replace_attention: bool,
    ) -> None:
        if not isinstance(num_frames, int) or isinstance(num_frames, bool):
            raise TypeError(f"num_frames: expected an int, got {type(num_frames).__name__}")
        if num_frames <= lag:
            raise ValueError(f"num_frames: expected more than lag = {lag}, got {num_frames}")
        check_options(lag=lag, temperature=temperature, head_reduction=head_reduction, center=center)
        check_impl(impl, None)
        self.num_frames = num_frames
        self.impl = impl
        self.options: dict[str, Any] = {"lag": lag, "temperature": temperature, "head_reduction": head_reduction}
        self.options |= {"center": center, "impl": impl}
        self.replace_attention = replace_attention
        self.flows: dict[int, BlockFlow] = {}

    def record(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, on_grid: Callable[[Tensor, Tensor], BlockFlow]
    ) -> Tensor | None:
        """Records the flow of a block's q, k (B * T, heads, [windows,] N, D); `on_grid` is given it and k.

        Returns the attention's output if that is to be replaced.
        """
        recompute = _in_backward()  # activation checkpointing runs the layer again
        # A layer run again after all this has its own attention, and must save for it what was saved here. With windows
        # ours differs from it, and there is nothing to be had from it.
        replaces = self.replace_attention and q.dim() == 4
        if recompute and not replaces:
            return None
        if len(q) % self.num_frames:
            raise ValueError(f"num_frames: expected a divisor of the {len(q)} images, got {self.num_frames}")
        q, k, v = autocast(q, k, v)
        q_frames, k_frames, v_frames = (x.unflatten(0, (-1, self.num_frames)) for x in (q, k, v))
        out = lse = None
        if replaces:
            problem = Problem(q_frames, k_frames, lag=self.options["lag"])
            out, lse = attention(problem, v_frames, self.impl)
            out = out.flatten(0, 1)
        if not recompute:
            with _kept_by_checkpoints():
                flow = am_flow(q_frames, k_frames, lse=lse, **self.options)
            self.flows[block] = on_grid(flow, k)
        return out

    def check_complete(self, blocks: Mapping[int, str]) -> None:
        """Raises unless each of the blocks (their names by index) was recorded."""
        missing = [name for block, name in blocks.items() if block not in self.flows]
        if missing:
            raise RuntimeError(f"no AM flow of {', '.join(missing)}: {UNREAD}")


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules another forward while the ``with`` block runs, whatever ends it.

    It is an attribute of the instance: compiled code, which does not notice new hooks, is compiled anew.
    """
    before = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            del module.forward
            if own is not None:  # an instance attribute that somebody else had put there
                module.forward = own


def reading(name: str, forward: Callable[..., Any], on_attention: OnAttention) -> Callable[..., Any]:
    """The forward of the layer `name`, with `on_attention` called where it calls the attention."""

    @wraps(forward)
    def reading_forward(*args: Any, **kwargs: Any) -> Any:
        with AttentionReader(name, on_attention):
            return forward(*args, **kwargs)

    return reading_forward


class AttentionReader(TorchFunctionMode):
    """Sees every torch call made while it is active, among them the one attention call.

    Args:
        name: of the layer or block, for messages.
        on_attention: called with q, k, v of that call; what it returns, unless None, takes the place of its output.

    Raises RuntimeError where softmax(D ** -0.5 q k^T) is not the layer's attention map, or there are several.
    """

    def __init__(self, name: str, on_attention: OnAttention) -> None:
        super().__init__()
        self.name = name
        self.on_attention = on_attention
        self.calls = 0
        self.dropout_p = 0.0  # of the call, once it is made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._read(*args, **kwargs) if func is scaled_dot_product_attention else None
        return func(*args, **kwargs) if out is None else out

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(f"{self.name}: calls the attention more than once; which q and k to take is unclear")
        if attn_mask is not None or is_causal:
            raise RuntimeError(
                f"{self.name}: adds a mask or bias to its logits, so softmax(q k^T) is not its attention map"
            )
        usual = query.shape[-1] ** -0.5  # 1 / sqrt(D) may differ in the last digit
        if scale is not None and abs(scale - usual) > 1e-6 * usual:
            raise RuntimeError(f"{self.name}: scales its logits by {scale}, not by D ** -0.5 = {usual}")
        if enable_gqa:
            raise RuntimeError(f"{self.name}: shares keys between heads (grouped queries)")
        self.dropout_p = dropout_p
        out = self.on_attention(query, key, value)
        if out is not None and dropout_p:
            raise RuntimeError(f"{self.name}: drops attention at random, which replace_attention=True would leave out")
        return out
