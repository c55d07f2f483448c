"""DTensors: each rank computes the flow of its own clips and heads, and nothing is communicated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from math import prod
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PAIR_HEADS, IMAGE_HEADS = 2, 1  # the heads' dimension in (B, T, heads, ...) and in (B * T, heads, ...)
_TENSORS = ("q", "k", "v", "x", "q_a", "k_a", "q_b", "k_b", "lse", "lse_a", "lse_b")
_EXPECTED = "expected DTensors that are replicated or sharded by batch or heads, all in the same way"


def on_shards(
    *, like_q: tuple[int, ...] = ()
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Makes a public function take DTensors: it runs on their local parts, and its results are DTensors like them.

    Args:
        like_q: the numbers of those results that have the dimensions of q; the others begin with (B, pairs, heads).
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        names = tuple(signature(function).parameters)

        @wraps(function)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if not _has_dtensor(args) and not (kwargs and _has_dtensor(kwargs.values())):
                return function(*args, **kwargs)
            return _on_local_parts(function, {**dict(zip(names, args, strict=False)), **kwargs}, like_q)

        return run

    return decorate


def check_plain(name: str, value: object) -> None:
    """Raises if a tensor is a DTensor."""
    if _has_dtensor((value,)):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass {name}.to_local()")


def _has_dtensor(values: Iterable[object]) -> bool:
    for value in values:
        if type(value) not in _COMMON and isinstance(value, Tensor):
            module = getattr(torch.distributed, "tensor", None)  # imported wherever there is a DTensor
            if module is not None and isinstance(value, module.DTensor):
                return True
    return False


_COMMON = (Tensor, NoneType, int, float, str, bool)  # spares the question of what else a value is


def _on_local_parts(function: Callable[..., Any], arguments: dict[str, Any], like_q: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    q_heads = PAIR_HEADS if arguments.get("num_frames") is None else IMAGE_HEADS
    tensors = {name: arguments[name] for name in _TENSORS if isinstance(arguments.get(name), Tensor)}
    kinds = {name: _kinds(name, x, PAIR_HEADS if name == "x" else q_heads) for name, x in tensors.items()}
    first, *others = tensors
    mesh = tensors[first].device_mesh
    for name in others:
        if kinds[name] != kinds[first] or tensors[name].device_mesh != mesh:
            raise ValueError(
                f"{name}: {_EXPECTED}, got {_placed(tensors[name])}, and {first} is {_placed(tensors[first])}"
            )
    reduction = arguments.get("head_reduction", "none")
    if "heads" in kinds[first] and reduction != "none":
        raise ValueError(
            f"head_reduction: expected 'none' where the heads are sharded, got {reduction!r}; the mean of the heads' "
            "flows is .mean(2) of the result"
        )
    local = {name: x.to_local() for name, x in tensors.items()}
    results = function(**{**arguments, **local})

    def placed(number: int, result: Tensor) -> Tensor:
        heads = Shard(q_heads if number in like_q else PAIR_HEADS)
        placements = [{"batch": Shard(0), "heads": heads, "all": Replicate()}[kind] for kind in kinds[first]]
        return DTensor.from_local(result, mesh, placements, run_check=False)

    if isinstance(results, Tensor):
        return placed(0, results)
    parts = [placed(number, result) for number, result in enumerate(results)]
    return results._make(parts) if hasattr(results, "_make") else tuple(parts)


def _kinds(name: str, x: Any, heads: int) -> list[str]:
    """How each dimension of the mesh splits a tensor: by "batch" or "heads", or not, "all"."""
    if not _has_dtensor((x,)):
        raise TypeError(f"{name}: {_EXPECTED}, got a plain tensor beside DTensors")
    kinds = []
    for placement in x.placements:
        if placement.is_shard(0):
            kinds.append("batch")
        elif placement.is_shard(heads):
            kinds.append("heads")
        elif placement.is_replicate():
            kinds.append("all")
        else:
            raise ValueError(f"{name}: {_EXPECTED} (dimensions 0 and {heads}), got {_placed(x)}; redistribute it")
    for kind, dim in (("batch", 0), ("heads", heads)):
        ranks = prod([x.device_mesh.size(i) for i, own in enumerate(kinds) if own == kind])
        if x.shape[dim] % ranks:
            raise ValueError(
                f"{name}: expected a {kind} dimension ({dim}) that {ranks} ranks share evenly, got {_placed(x)}"
            )
    return kinds


def _placed(x: Any) -> str:
    return f"{tuple(x.shape)} placed as {tuple(x.placements)} on {x.device_mesh}"
