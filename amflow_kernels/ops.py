"""The ops ``amflow::am_flow`` and ``amflow::am_flow_matmul`` with their backwards: schemas, fakes, autograd.

They are opaque to torch.compile. Which implementation runs is decided inside them, never in traced code, so that a
process whose very first call is compiled works as any other. One schema serves both public forms: with q_b and k_b
the pairs are ((q, k)[p], (q_b, k_b)[p]), without them ((q, k)[t], (q, k)[t + lag]).
"""

# No `from __future__ import annotations`: the schemas are inferred from the real types.
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, library
from torch._ops import OpOverload
from torch.autograd import forward_ad

from amflow_kernels.dispatch import IMPLEMENTATIONS, backward, check_backward, implementation, saved_size
from amflow_kernels.impl.base import Implementation, empty_gradients
from amflow_kernels.plain import below_autograd, needs_gradients, untraced
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

_LIBRARY = library.Library("amflow", "FRAGMENT")


def flow(problem: Problem, impl: str | None, chosen: Implementation | None) -> Tensor:
    """The flow of a checked problem: by the op, or if nothing would see it by what it does with `chosen`."""
    recorded = needs_gradients(*problem.frames)
    if chosen is not None and not recorded:
        return chosen.forward(problem)[0]
    lse = problem.lse, problem.lse_b
    arguments = *problem.frames, *lse, *_numbers(problem), problem.head_reduction, problem.center, impl
    if chosen is not None and lse == (None, None) and not below_autograd():
        run = partial(_flow_and_saved, problem, impl, chosen)
        return _RECORDED_FLOW.apply(run, *_arguments_with_gradients(*arguments))[0]
    return am_flow(*arguments)[0]


def product(problem: MatmulProblem, impl: str | None, chosen: Implementation | None) -> Tensor:
    """The motion operator of a checked problem times its features, likewise."""
    recorded = needs_gradients(*problem.frames, problem.x)
    if chosen is not None and not recorded:
        return chosen.matmul(problem)
    arguments = *problem.frames, problem.x, *_numbers(problem), problem.transpose, problem.softmax, impl
    if chosen is not None and not below_autograd():
        return _RECORDED_PRODUCT.apply(partial(_matmul, problem, chosen), *arguments)
    return am_flow_matmul(*arguments)


def _numbers(problem: MapPairs) -> tuple[float, int, float]:
    return problem.logit_scale, problem.shift, float(problem.temperature)


def _flow_and_saved(problem: Problem, impl: str | None, chosen: Implementation, *_: Any) -> tuple[Tensor, Tensor]:
    """The flow, and as much saved as traced code expects, which can't know what will run."""
    result, saved = chosen.forward(problem)
    size = saved_size(problem, impl)
    return result, saved if saved is not None and saved.numel() == size else _no_saved(problem, size)


def _matmul(problem: MatmulProblem, chosen: Implementation, *_: Any) -> Tensor:
    return chosen.matmul(problem)


def _op(function: Callable[..., Any]) -> OpOverload:
    """Makes a function the op ``amflow::<its name>``; the function's types are its schema.

    PyTorch's `custom_op` does the same, and lets each call pass through more Python. Like it, this one keeps
    torch.compile out of the kernels.
    """
    name = function.__name__
    schema = library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, untraced(function), "CompositeExplicitAutograd")
    op: OpOverload = getattr(torch.ops.amflow, name).default
    return op


@_op
def am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    lse: Tensor | None,
    lse_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """The flow, and what the implementation saves for its backward (possibly nothing).

    lse, lse_b: row log-sum-exps of the maps of q and of q_b; only some kernels use them, and only without gradients.
    """
    q, k, q_b, k_b = _readable(q, k, q_b, k_b)
    problem = Problem(
        q, k, q_b=q_b, k_b=k_b, lse=lse, lse_b=lse_b, scale=scale, lag=lag, temperature=temperature,
        head_reduction=head_reduction, center=center,
    )  # fmt: skip
    if _is_empty(problem):
        return _empty_flow(problem, impl)
    return _flow_and_saved(problem, impl, implementation(problem, impl))


@library.register_fake("amflow::am_flow", lib=_LIBRARY)
def _fake_am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    lse: Tensor | None,
    lse_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    return _empty_flow(Problem(q, k, q_b=q_b, k_b=k_b, lag=lag, head_reduction=head_reduction), impl)


@_op
def am_flow_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
    impl: str | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_b, k_b, contiguous and in their dtype; an empty tensor where `needs` is False."""
    q, k, q_b, k_b = _readable(q, k, q_b, k_b)
    problem = Problem(
        q, k, q_b=q_b, k_b=k_b, scale=scale, lag=lag, temperature=temperature, head_reduction=head_reduction
    )
    _check_gradient("dflow", dflow, problem, problem.flow_shape)
    _check_saved(saved, problem, impl)
    if _is_empty(problem):
        dq, dk, dq_b, dk_b = empty_gradients(problem.frames, needs)
    else:
        dq, dk, dq_b, dk_b = backward(problem, impl, dflow, saved, needs)
    return dq, dk, dq_b, dk_b


@library.register_fake("amflow::am_flow_backward", lib=_LIBRARY)
def _fake_am_flow_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
    impl: str | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b = empty_gradients((q, k, q_b, k_b), needs)
    return dq, dk, dq_b, dk_b


@_op
def am_flow_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    impl: str | None,
) -> Tensor:
    """op x of every pair, with op = M or P, or its transpose: (B, P, *G, Nq, C), or (B, P, *G, Nk, C) transposed."""
    q, k, q_b, k_b, x = _readable(q, k, q_b, k_b, x)
    problem = MatmulProblem(
        q, k, q_b=q_b, k_b=k_b, x=x, scale=scale, lag=lag, temperature=temperature, transpose=transpose,
        softmax=softmax,
    )  # fmt: skip
    return _empty_product(problem) if _is_empty(problem) else implementation(problem, impl).matmul(problem)


@library.register_fake("amflow::am_flow_matmul", lib=_LIBRARY)
def _fake_am_flow_matmul(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    impl: str | None,
) -> Tensor:
    return _empty_product(MatmulProblem(q, k, q_b=q_b, k_b=k_b, x=x, lag=lag, transpose=transpose))


@_op
def am_flow_matmul_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    needs: Sequence[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_b, k_b, x, contiguous and in their dtype; an empty tensor where `needs` is False."""
    q, k, q_b, k_b, x = _readable(q, k, q_b, k_b, x)
    problem = MatmulProblem(
        q, k, q_b=q_b, k_b=k_b, x=x, scale=scale, lag=lag, temperature=temperature, transpose=transpose,
        softmax=softmax,
    )  # fmt: skip
    _check_gradient("dy", dy, problem, problem.product_shape)
    if _is_empty(problem):
        dq, dk, dq_b, dk_b, dx = empty_gradients((*problem.frames, x), needs)
    else:
        dq, dk, dq_b, dk_b, dx = implementation(problem, impl).matmul_backward(problem, dy, needs)
    return dq, dk, dq_b, dk_b, dx


@library.register_fake("amflow::am_flow_matmul_backward", lib=_LIBRARY)
def _fake_am_flow_matmul_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    x: Tensor,
    scale: float,
    lag: int,
    temperature: float,
    transpose: bool,
    softmax: bool,
    needs: Sequence[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dq_b, dk_b, dx = empty_gradients((q, k, q_b, k_b, x), needs)
    return dq, dk, dq_b, dk_b, dx


def _readable(*tensors: Any) -> list[Any]:
    """The tensors, copied where the elements of the last dimension do not lie side by side.

    The public functions refuse such a tensor. But exported and traced programs do not call them, and may be given other
    strides than the example that they were made from.
    """

    return [
        x if x is None or x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors
    ]


def _check_gradient(name: str, value: Tensor, problem: MapPairs, shape: tuple[int, ...]) -> None:
    """Raises unless `value` can be the gradient of a result of this shape."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected the shape of the result, {shape}, got {tuple(value.shape)}")
    if value.dtype != problem.result_dtype:
        raise TypeError(f"{name}: expected the dtype of the result, {problem.result_dtype}, got {value.dtype}")
    if value.device != problem.q.device:
        raise ValueError(f"{name}: expected the device of q, {problem.q.device}, got {value.device}")


def _check_saved(saved: Tensor, problem: Problem, impl: str | None) -> None:
    """Raises unless `saved` can be what the forward returned beside the flow."""
    size = saved_size(problem, impl)
    if saved.shape != (size,) or saved.dtype != torch.float32 or saved.device != problem.q.device:
        raise ValueError(
            f"saved: expected what the forward returned, float32 ({size},) on {problem.q.device}, "
            f"got {saved.dtype} {tuple(saved.shape)} on {saved.device}"
        )


def _is_empty(problem: MapPairs) -> bool:
    """Whether there are no pairs of maps; implementations need not handle that."""
    return problem.B == 0 or problem.P == 0


def _empty_flow(problem: Problem, impl: str | None) -> tuple[Tensor, Tensor]:
    flow = problem.q.new_empty(problem.flow_shape, dtype=problem.result_dtype)
    return flow, _no_saved(problem, saved_size(problem, impl))


def _empty_product(problem: MatmulProblem) -> Tensor:
    return problem.q.new_empty(problem.product_shape, dtype=problem.result_dtype)


def _no_saved(problem: Problem, size: int) -> Tensor:
    """Stands for what a forward did not save: traced code expects a tensor of this size."""
    return problem.q.new_zeros(size, dtype=torch.float32)


# Of the autograd functions.


def _setup_am_flow(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, q_b, k_b, _, _, ctx.scale, ctx.lag, ctx.temperature, ctx.head_reduction, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, q_b, k_b, output[1])


def _differentiate_am_flow(ctx: Any, dflow: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:5])
    *frames, saved = ctx.saved_tensors
    options = (ctx.scale, ctx.lag, ctx.temperature, ctx.head_reduction)
    grads = am_flow_backward(dflow, *frames, *options, needs, ctx.impl, saved)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 8)


def _setup_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, q_b, k_b, x, ctx.scale, ctx.lag, ctx.temperature, ctx.transpose, ctx.softmax, ctx.impl = inputs
    ctx.save_for_backward(q, k, q_b, k_b, x)


def _differentiate_matmul(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:6])
    options = (ctx.scale, ctx.lag, ctx.temperature, ctx.transpose, ctx.softmax)
    grads = am_flow_matmul_backward(dy, *ctx.saved_tensors, *options, needs, ctx.impl)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 6)


def _no_second_order(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("amflow_kernels: AM flow has first-order gradients only; a second-order gradient was requested")


def _fold(batch_size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Tensors of a vmapped call, (B, ...) and a dimension of the map, as (batch_size * B, ...)."""
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if tensor is None:
            yield None
        else:
            mapped = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            yield mapped.flatten(0, 1)


def _vmap_am_flow(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """torch.vmap: the mapped dimension becomes a part of B. Nothing reads what is saved: the gradient is that of B."""
    flow, saved = am_flow(*_fold(info.batch_size, in_dims[:6], args[:6]), *args[6:])
    return (flow.unflatten(0, (info.batch_size, -1)), saved), (0, None)


def _vmap_matmul(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    y = am_flow_matmul(*_fold(info.batch_size, in_dims[:5], args[:5]), *args[5:])
    return y.unflatten(0, (info.batch_size, -1)), 0


def _arguments_with_gradients(
    q: Tensor, k: Tensor, q_b: Tensor | None, k_b: Tensor | None, _: Tensor | None, __: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    """The arguments of a flow whose gradients are needed: no log-sum-exps, whose rounding errors gradients can't take.

    Raises where the forward can run, but another implementation makes its backward, and can't.
    """
    lag, impl = options[1], options[-1]
    if impl is not None and IMPLEMENTATIONS[impl].backward_by is not None:
        with torch.no_grad():
            readable = _readable(q, k, q_b, k_b)
        check_backward(MapPairs(*readable[:2], q_b=readable[2], k_b=readable[3], lag=lag), impl)
    return q, k, q_b, k_b, None, None, *options


def _register_autograd(
    op: OpOverload,
    differentiate: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Any:
    """Registers a backward, which is the only kind of differentiation.

    The op raises in forward mode, where it would return zero tangents, and in the transforms of torch.func. Where an
    input needs a gradient, `arguments` checks the op's arguments before the forward, and may replace them. All this is
    a part of the autograd kernel: eager, compiled and exported code pass it, and the bare op, too.

    PyTorch's `register_autograd` does the rest as well, but reads the schema in every call that needs gradients.

    Returns:
        The `torch.autograd.Function`. Its first argument makes the result of the others, the arguments of the op.
    """

    def forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        result = run(*args)
        if setup_context is not None:
            setup_context(ctx, args, result)
        return result

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, *differentiate(ctx, *grads))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op._opname, (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        def below_autograd(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        tensors = [x for x in args if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(f"{_GRADIENTS}; forward-mode differentiation was requested (a tangent came in)")
        if not needs_gradients(*tensors):
            return below_autograd(*args)
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None:
            raise RuntimeError(f"{_GRADIENTS}; torch.func's {transform.key().name} was requested")
        return function.apply(below_autograd, *(args if arguments is None else arguments(*args)))

    _LIBRARY.impl(op._opname, untraced(kernel), "Autograd", with_keyset=True)
    return function


_GRADIENTS = (
    "amflow_kernels: AM flow has first-order gradients by backward() and torch.autograd.grad, also through torch.vmap"
)

_RECORDED_FLOW = _register_autograd(am_flow, _differentiate_am_flow, _setup_am_flow, _arguments_with_gradients)
_RECORDED_PRODUCT = _register_autograd(am_flow_matmul, _differentiate_matmul, _setup_matmul)
_register_autograd(am_flow_backward, _no_second_order)
_register_autograd(am_flow_matmul_backward, _no_second_order)
library.register_vmap("amflow::am_flow", _vmap_am_flow, lib=_LIBRARY)
library.register_vmap("amflow::am_flow_matmul", _vmap_matmul, lib=_LIBRARY)
