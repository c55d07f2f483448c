"""Running code around the forward of a model's modules, for the thread that asked for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from threading import Lock, get_ident
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

# Called with a forward and that forward's arguments. Runs it and returns its result.
Around = Callable[..., Any]


@contextmanager
def wrapped_forwards(wrappers: Sequence[tuple[nn.Module, Around]]) -> Iterator[None]:
    """Wraps the forward of modules during the ``with`` block, and unwraps it however the block ends.

    A wrapper runs in forwards of the thread that entered the block. A module may be wrapped several times, by any
    threads, in ``with`` blocks that end in any order. Copies and replicas that are made of a wrapped module, and
    recomputation in a backward, run without the wrappers.

    Args:
        wrappers: (module, around); ``around(forward, *args, **kwargs)`` runs instead of ``forward(*args, **kwargs)``.
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


def own_forward(module: nn.Module) -> Any:
    """The attribute `forward` of a module's instance that is none of the wrappers here, or None."""
    forward = module.__dict__.get("forward")
    wrapped = getattr(forward, "__self__", None)
    return wrapped.own if isinstance(wrapped, _Forward) else forward


_WRAPPING = Lock()  # held while wrappers are added or removed


class _Wrapper(NamedTuple):
    thread: int
    around: Around


class _Forward:
    """Runs the forward of a module with wrappers around it: while there are some, this `forward` is the module's.

    It is set as an attribute of the instance, so that compiled code is compiled again: it would not notice new hooks.
    It is a bound method because torch.compile recognises methods by their code, so another recording needs no other
    graph, and because a copied method is bound to a copy of this object.
    """

    def __init__(self, module: Any, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own  # the attribute `forward` that the instance had before
        self.plain = MethodType(type(module).forward, module) if own is None else own
        self.wrappers: tuple[_Wrapper, ...] = ()
        self.several_threads = False

    @classmethod
    def of(cls, module: nn.Module) -> _Forward:
        """The one that the module has, or a new one."""
        own = module.__dict__.get("forward")
        present = getattr(own, "__self__", None)
        return present if isinstance(present, cls) and present.module is module else cls(module, own)

    def add(self, around: Around) -> None:
        if not self.wrappers:
            self.module.forward = self.forward
            self.module._replicate_for_data_parallel = _Replicate(self.module, self.own)
        self._set((*self.wrappers, _Wrapper(get_ident(), around)))

    def remove(self, around: Around) -> None:
        self._set(tuple(other for other in self.wrappers if other.around is not around))
        if self.wrappers:
            return
        self.module.__dict__.pop("_replicate_for_data_parallel", None)
        # If something else has replaced the forward in between, it may call this one, which now adds nothing.
        if self.module.__dict__.get("forward") == self.forward:
            if self.own is None:
                del self.module.forward
            else:
                self.module.forward = self.own

    def _set(self, wrappers: tuple[_Wrapper, ...]) -> None:
        self.wrappers = wrappers
        self.several_threads = len({wrapper.thread for wrapper in wrappers}) > 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wrappers = self.wrappers
        # torch.compile can trace neither question, so compiled code records in every thread and on recomputation.
        if torch.compiler.is_compiling():
            if self.several_threads:
                raise RuntimeError(
                    "model: is being recorded in several threads, which compiled code can't tell apart; record a "
                    "compiled model in one thread at a time, or record a copy (copy.deepcopy) in each"
                )
        elif _in_backward():
            wrappers = ()
        else:
            thread = get_ident()
            wrappers = tuple(wrapper for wrapper in wrappers if wrapper.thread == thread)
        forward = self.plain
        for wrapper in wrappers:
            forward = partial(wrapper.around, forward)
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(deepcopy(self.module, memo), deepcopy(self.own, memo))

    def __reduce__(self) -> Any:
        """Pickles as an object with the `forward` that the module had before, of which a pickled method asks its name.

        So the loaded module is a plain one, and loading it takes no amflow_kernels.
        """
        plain = self.module if self.own is None else SimpleNamespace(forward=self.own)
        return operator.getitem, ((plain,), 0)


class _Replicate:
    """Makes the replicas of a wrapped module, for `nn.DataParallel`: a copied `forward` would run the module itself."""

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own  # as in `_Forward`

    def __call__(self) -> nn.Module:
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        for name in ("forward", "_replicate_for_data_parallel"):
            replica.__dict__.pop(name, None)
        if self.own is not None:
            replica.forward = self.own
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[], nn.Module]:
        module = deepcopy(self.module, memo)
        return MethodType(type(module)._replicate_for_data_parallel, module)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "_replicate_for_data_parallel")


def _in_backward() -> bool:
    """Whether this thread runs a backward, whose forwards are the recomputation of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
