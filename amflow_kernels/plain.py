"""Whether nothing watches a call: then it may go straight to a kernel.

Modes, transforms, compilers and profilers see an op because PyTorch's dispatcher leads every call past them. Where
there are none it only takes time, more than all checks of a call. All private names of PyTorch that tell are in this
file; where a PyTorch lacks one of them, every call goes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        get_eval_frame_callback,
        set_code_exec_strategy,
    )
    from torch._compile import _disable_dynamo

    # What the dispatcher includes in every call; modes, transforms and tracers add their keys.
    _ALWAYS = int((DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr())
    _AUTOGRAD = int(DispatchKeySet(DispatchKey.AutogradFunctionality).raw_repr())
    _COMPLETE = True
except (ImportError, AttributeError):  # another PyTorch
    _COMPLETE = False


def unwatched() -> bool:
    """Whether an op called now would be seen by nothing but autograd, if its tensors are plain."""
    return (
        _COMPLETE
        and not is_dynamo_compiling()  # other tracers have modes or keys
        and get_eval_frame_callback() is None
        and not _len_torch_function_stack()
        and not _profiler_enabled()
        and forward_ad._current_level < 0
        and not _dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS
    )


def is_plain(x: Any) -> bool:
    """Whether a value is a tensor of dense memory of a CPU or a GPU, and no more."""
    kind = type(x)
    return (
        (kind is Tensor or kind is Parameter)
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()
        and (x.is_cpu or x.is_cuda)
    )


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op with these tensors."""
    if is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def below_autograd() -> bool:
    """Whether the dispatcher leaves out autograd, even for tensors that need gradients."""
    return not _COMPLETE or bool(_dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile out of a kernel, which it would trace where a graph break leaves a call to Python.

    PyTorch's own means imports torch._dynamo, and costs each call as much as all checks. It is needed only while
    torch.compile watches this thread.
    """
    if not _COMPLETE:
        return torch.compiler.disable(function)
    disabled = _disable_dynamo(function)

    def kernel(*args: Any) -> Any:
        return function(*args) if get_eval_frame_callback() is None else disabled(*args)

    set_code_exec_strategy(kernel.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return kernel
