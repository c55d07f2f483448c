"""Which layers of a model call attention, and which of them are meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention

from amflow_kernels.integrations.block_finder import unwrap
from amflow_kernels.integrations.wrapping import own_forward

# What chooses layers: their names, a pattern such as "blocks.1*.attn", or a predicate of name and module.
Layers = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


class Layer(NamedTuple):
    """A layer that calls attention, and its name for messages."""

    name: str
    module: nn.Module


CALLS = (scaled_dot_product_attention, multi_head_attention_forward)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
CALL_NAMES = {call.__name__ for call in CALLS}
IMAGE_TOWERS = ("vision_model", "visual", "vision_tower", "vision_encoder", "image_encoder")


def choose_layers(model: nn.Module, layers: Layers) -> dict[str, Layer]:
    """The attention layers of a model that are meant, by name, in the model's order.

    Names are those of `model.named_modules()`, without the parts that `unwrap` looks through.

    Args:
        model: the model, unwrapped.
        layers: names of any modules; a pattern for, or a predicate of, the names of attention layers; None for all.

    Raises:
        TypeError: the model has no attention layer; or it has a part for images and others, and `layers` is None.
        ValueError: no layer is chosen, or one that contains another, or a name is unknown.
    """
    parts = dict(named_parts(model))
    chosen = _choose(model, parts, layers)
    return {name: Layer(name or type(model).__name__, part) for name, part in chosen.items()}


def _choose(model: nn.Module, parts: dict[str, nn.Module], layers: Layers) -> dict[str, nn.Module]:
    if layers is not None and not isinstance(layers, str) and not callable(layers):
        return _named(parts, list(layers))
    known: dict[Any, bool] = {}  # by class and the instance's own forward
    for part in parts.values():
        kind = type(part), own_forward(part)
        if kind not in known:
            known[kind] = calls_attention(part)
    found = _innermost({name: part for name, part in parts.items() if known[type(part), own_forward(part)]})
    if not found:
        raise TypeError(_none_found(model, parts))
    if layers is None:
        _check_towers(model, found)
        return found
    if isinstance(layers, str):
        chosen = {name: part for name, part in found.items() if fnmatchcase(name, layers)}
    else:
        chosen = {name: part for name, part in found.items() if layers(name, part)}
    if not chosen:
        what = repr(layers) if isinstance(layers, str) else "a predicate"
        raise ValueError(f"layers: expected {what} to choose some attention layers, none of {_some(found)} is")
    return chosen


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model by name, each once, with wrappers of `torch.compile`, FSDP and others looked through."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def parts_around(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, list[str]]]:
    """The modules that contain some named layers, the outermost first: {path: (module, names of the layers)}."""
    inside: dict[str, list[str]] = {}
    for name in names:
        steps = name.split(".")
        for end in range(len(steps)):
            inside.setdefault(".".join(steps[:end]), []).append(name)
    return {path: (part, inside[path]) for path, part in named_parts(model) if path in inside}


def calls_attention(module: nn.Module) -> bool:
    """Whether a module is an `nn.MultiheadAttention`, or the code of its forward names an attention function.

    Functions and methods that the forward names are looked into, too, and what decorates them. A method of a container
    may so be found beside the layer itself.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    return _names_attention(own_forward(module) or type(module).forward, module, set())


def switch_of(module: Any) -> str:
    """What makes a layer call ``scaled_dot_product_attention``, for messages."""
    if hasattr(module, "fused_attn"):
        return "set its `fused_attn` to True"
    if getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") != "sdpa":
        return "call `set_attn_implementation('sdpa')` of the model"
    return "it computes its attention in another way, such as softmax(q k^T) v or xformers"


def _names_attention(function: Any, module: nn.Module, seen: set[Any]) -> bool:
    """Whether a function, or what it names, calls attention; `module` is its `self`."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if any(function is call for call in CALLS):
        return True
    if not isinstance(function, FunctionType) or function in seen or _of_torch(function):
        return False
    seen.add(function)
    names = set(_names(function.__code__))
    if names & CALL_NAMES:
        return True
    reached = [getattr(function, "__wrapped__", None)]
    reached += [_contents(cell) for cell in function.__closure__ or ()]
    reached += [function.__globals__.get(name) for name in names]
    reached += [_attribute(module, name) for name in names]
    return any(_names_attention(value, module, seen) for values in reached for value in _functions(values))


def _of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # of a nested function or comprehension
            yield from _names(constant)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _attribute(module: nn.Module, name: str) -> Any:
    """A method of a module, or a callable that it holds and that is no module."""
    value = next((part[name] for part in (vars(module), *map(vars, type(module).__mro__)) if name in part), None)
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, (type, nn.Module, *FUNCTIONS)) or not callable(value):
        return value
    return type(value).__call__


def _functions(value: Any) -> list[Any]:
    """A value if it is a function, or the functions of a table, of which a forward takes one."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    return [each for each in values if isinstance(each, FUNCTIONS)]


def _innermost(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those parts that contain no other one."""
    return {name: part for name, part in parts.items() if not _contained(name, parts)}


def _contained(name: str, names: Iterable[str]) -> list[str]:
    """Those of some names that lie inside of the module `name`."""
    return [other for other in names if other != name and (not name or other.startswith(f"{name}."))]


def _named(parts: dict[str, nn.Module], names: list[Any]) -> dict[str, nn.Module]:
    if not names:
        raise ValueError("layers: expected names of layers, got none")
    for name in names:
        if name not in parts:
            near = get_close_matches(str(name), parts, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"layers: expected names of modules of the model, got {name!r}{hint}")
        inside = _contained(name, names)
        if inside:
            raise ValueError(f"layers: expected layers of which none contains another, got {name!r} and {inside[0]!r}")
    return {name: part for name, part in parts.items() if name in names}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f", ... ({len(listed)} layers)" if len(listed) > 3 else "")


def _none_found(model: nn.Module, parts: dict[str, nn.Module]) -> str:
    message = (
        f"model: expected layers that call scaled_dot_product_attention or are nn.MultiheadAttention; "
        f"{type(model).__name__} has none"
    )
    attention = {name: part for name, part in parts.items() if "attention" in type(part).__name__.lower()}
    for name in _innermost(attention):
        return f"{message}. {name} ({type(parts[name]).__name__}): {switch_of(parts[name])}"
    return message


def _check_towers(model: nn.Module, found: Iterable[str]) -> None:
    """Raises TypeError if a model has one part for images and attention layers outside of it."""
    for tower in IMAGE_TOWERS:
        if hasattr(model, tower):
            others = [name for name in found if not name.startswith(f"{tower}.")]
            if others and len(others) < len(list(found)):
                raise TypeError(
                    f"model: {type(model).__name__} has attention layers outside of its image model ({others[0]}); "
                    f"record its `.{tower}`, or pass layers='{tower}.*' and run the image model only"
                )


def check_recordable(model: nn.Module) -> None:
    """Raises TypeError if the attention calls of a model can't be seen where it runs."""
    for part in (model, unwrap(model)):
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                "model: is TorchScript, whose attention calls can't be seen; record the module it is made of"
            )
        if isinstance(part, nn.DataParallel) and len(part.device_ids) > 1:
            raise TypeError(
                f"model: nn.DataParallel runs a replica on each of its {len(part.device_ids)} devices; use "
                "DistributedDataParallel, or record inside of the forward that is replicated"
            )
