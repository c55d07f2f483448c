"""What the integrations share: reading q and k in a layer's attention call, and recording the AM flow of blocks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from threading import Lock, get_ident
from types import MethodType, SimpleNamespace
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

NOT_RUN = (
    "the model did not run in the `with` block and its thread, or it ran there without calling "
    "scaled_dot_product_attention"
)
OPTIONS = ("lag", "temperature", "head_reduction", "center", "impl")  # of am_flow; the scale is the model's own
# Called with q, k, v of the attention call. Returns the attention's output to replace the call, or None to leave it.
OnAttention = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]
# Called with a forward and that forward's arguments. Runs it and returns its result.
Around = Callable[..., Any]


@dataclass(frozen=True)
class BlockFlow:
    """AM flow of one block, on the grid of the tokens that enter it.

    Attributes:
        grid: flow of the image tokens, (B, T - lag, heads, height, width), float32; without the heads dimension if
            heads are reduced.
        prefix: flow of the class token and registers, (B, T - lag, heads, prefix tokens), float32; without the heads
            dimension if heads are reduced.
        windows: number of windows that the block's attention runs in. Each window's flow sums to its number of queries,
            and flows of different windows can't be compared: no token attends to another window.
    """

    grid: Tensor
    prefix: Tensor
    windows: int


def _hidden_from_checkpoints() -> Any:
    """Keeps what is saved for the backward out of activation checkpointing.

    A checkpoint would expect the recomputation to save it again, but recomputation does not record.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class FlowRecorder:
    """Computes and keeps the flow of each block while a model runs.

    Args:
        num_frames: T; the batch of images is B clips of T frames.
        replace_attention: compute the attention's output together with its flow, where it has no windows.
        options: options of `am_flow`, but for the scale, which is the model's own.

    Attributes:
        flows: {block index: `BlockFlow`}.

    Raises:
        TypeError, ValueError: `num_frames` or an option is not as described.
    """

    def __init__(self, num_frames: int, replace_attention: bool, **options: Any) -> None:
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"record_am_flow() got an unexpected keyword argument {name!r}")
        impl = options.get("impl")
        check_options(**{name: value for name, value in options.items() if name != "impl"})
        check_impl(impl, None)
        if not isinstance(num_frames, int) or isinstance(num_frames, bool):
            raise TypeError(f"num_frames: expected an int, got {type(num_frames).__name__}")
        lag = options.get("lag", 1)
        if num_frames <= lag:
            raise ValueError(f"num_frames: expected more than lag = {lag}, got {num_frames}")
        self.num_frames = num_frames
        self.replace_attention = replace_attention
        self.options, self.lag, self.impl = options, lag, impl
        self.flows: dict[int, BlockFlow] = {}

    def record(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, on_grid: Callable[[Tensor, Tensor], BlockFlow]
    ) -> Tensor | None:
        """Records the flow of a block.

        Args:
            block: its index.
            q, k, v: of its attention call, (B * T, heads, [windows,] N, D).
            on_grid: puts the flow on the grid of tokens; called with the flow and k.

        Returns:
            The attention's output, (B * T, heads, N, D), if it is to be replaced, else None.
        """
        if len(q) % self.num_frames:
            raise ValueError(f"num_frames: expected a divisor of the {len(q)} images, got {self.num_frames}")
        q, k, v = autocast(q, k, v)
        # torch 2.11 can't trace the method `unflatten` where another TorchFunctionMode is active.
        q_frames, k_frames, v_frames = (torch.unflatten(x, 0, (-1, self.num_frames)) for x in (q, k, v))
        out = lse = None
        if self.replace_attention and q.dim() == 4:  # without windows
            # Recomputation runs the model's own attention call, which saves the same tensors as this one.
            out, lse = attention(Problem(q_frames, k_frames, lag=self.lag), v_frames, self.impl)
            out = out.flatten(0, 1)
        with _hidden_from_checkpoints():
            flow = am_flow(q_frames, k_frames, lse=lse, **self.options)
        self.flows[block] = on_grid(flow, k)
        return out

    def check_complete(self, blocks: Mapping[int, str]) -> None:
        """Raises RuntimeError unless every one of `blocks`, {index: name}, was recorded."""
        missing = [name for block, name in blocks.items() if block not in self.flows]
        if missing:
            raise RuntimeError(f"no AM flow of {', '.join(missing)}: {NOT_RUN}")


@contextmanager
def wrapped_forwards(wrappers: Sequence[tuple[nn.Module, Around]]) -> Iterator[None]:
    """Wraps the forward of modules during the ``with`` block, and unwraps it however the block ends.

    A module may be wrapped several times, in ``with`` blocks of one thread that end in any order. Copies that are made
    of a wrapped module, its forwards in other threads, and recomputation in a backward run without the wrappers.

    Args:
        wrappers: (module, around); ``around(forward, *args, **kwargs)`` runs instead of ``forward(*args, **kwargs)``.

    Raises:
        RuntimeError: another thread wraps one of the modules.
    """
    wrapped: list[tuple[_Forward, Around]] = []
    try:
        with _WRAPPING:
            for module, around in wrappers:
                forward = _Forward.of(module)
                forward.add(around)
                wrapped.append((forward, around))
        yield
    finally:
        with _WRAPPING:
            for forward, around in wrapped:
                forward.remove(around)


_WRAPPING = Lock()  # held while wrappers are added or removed


class _Forward:
    """Runs the forward of a module with wrappers around it: while there are some, this `forward` is the module's.

    It is set as an attribute of the instance, so that compiled code is compiled again: it would not notice new hooks.
    It is a bound method because torch.compile recognises methods by their code, so another recording needs no other
    graph, and because a copied method is bound to a copy of this object.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own  # the attribute `forward` that the instance had before
        self.plain = MethodType(type(module).forward, module) if own is None else own
        self.wrappers: tuple[Around, ...] = ()
        self.thread = get_ident()

    @classmethod
    def of(cls, module: nn.Module) -> _Forward:
        """The one that the module has, or a new one."""
        own = module.__dict__.get("forward")
        present = getattr(own, "__self__", None)
        return present if isinstance(present, cls) and present.module is module else cls(module, own)

    def add(self, around: Around) -> None:
        if not self.wrappers:
            self.thread = get_ident()
            self.module.forward = self.forward
        elif self.thread != get_ident():
            raise RuntimeError(
                "model: is being recorded in another thread; record it in one thread at a time, or record a copy "
                "(copy.deepcopy) in each"
            )
        self.wrappers = (*self.wrappers, around)

    def remove(self, around: Around) -> None:
        self.wrappers = tuple(other for other in self.wrappers if other is not around)
        # If something else has replaced the forward in between, it may call this one, which now adds nothing.
        if not self.wrappers and self.module.__dict__.get("forward") == self.forward:
            if self.own is None:
                del self.module.forward
            else:
                self.module.forward = self.own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.plain
        # torch.compile can trace neither question, so compiled code records in every thread and on recomputation.
        if torch.compiler.is_compiling() or (get_ident() == self.thread and not _in_backward()):
            for around in self.wrappers:
                forward = partial(around, forward)
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(deepcopy(self.module, memo), deepcopy(self.own, memo))

    def __reduce__(self) -> Any:
        """Pickles as an object with the `forward` that the module had before, of which a pickled method asks its name.

        So the loaded module is a plain one, and loading it takes no amflow_kernels.
        """
        plain = self.module if self.own is None else SimpleNamespace(forward=self.own)
        return operator.getitem, ((plain,), 0)


def _in_backward() -> bool:
    """Whether this thread runs a backward, whose forwards are the recomputation of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def reading_attention(name: str, on_attention: OnAttention) -> Around:
    """A wrapper of the layer `name` with which `on_attention` sees its attention call."""

    def read(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with AttentionReader(name, on_attention):
            return forward(*args, **kwargs)

    return read


class AttentionReader(TorchFunctionMode):
    """While active, sees every torch call and passes q, k, v of the one attention call to `on_attention`.

    Args:
        name: name of the layer or block, for messages.
        on_attention: called with q, k, v of the attention call; its result, unless None, replaces the call's output.

    Attributes:
        dropout_p: dropout probability of the attention call, once it was made.

    Raises:
        RuntimeError: softmax(D ** -0.5 q k^T) is not the layer's attention map, or there is more than one call.
    """

    def __init__(self, name: str, on_attention: OnAttention) -> None:
        super().__init__()
        self.name = name
        self.on_attention = on_attention
        self.calls = 0
        self.dropout_p = 0.0

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
            raise RuntimeError(
                f"{self.name}: drops attention at random, which attention computed together with its flow leaves out"
            )
        return out
