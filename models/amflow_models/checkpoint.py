"""What was trained, in a file: adapters and head, without the frozen backbone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from amflow_models.blocks import AdaptedBlock

WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel, in names


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require a gradient, by the name they have in the model itself.

    Those that processes hold a part of each are put together: all of these must call this.

    Raises:
        ValueError: there are none.
    """
    state = {own_name(name): _whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if not state:
        raise ValueError(f"model: expected one with parameters that train, found none in {type(model).__name__}")
    return state


def save_trained(model: nn.Module, path: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the parameters of a model that require a gradient to a safetensors file, and what its adapters are like.

    Args:
        state: what `trained_state` gave; None calls it.

    Raises:
        ValueError: nothing in the model trains.
    """
    save_file(
        trained_state(model) if state is None else state, path, metadata={"adapters": json.dumps(_options(model))}
    )


def load_trained(model: nn.Module, path: str | Path) -> None:
    """Reads what `save_trained` wrote into a model made in the same way.

    Raises:
        ValueError: the file is not of this model: all missing and unexpected names, other shapes and other options are
            listed; or it can't be read. The model is as it was then.
    """
    own = {own_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with safe_open(path, "pt") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
            options = json.loads((file.metadata() or {}).get("adapters", "null"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error})") from error
    expected = _options(model)
    problems = {
        "missing": sorted(own.keys() - loaded.keys()),
        "unexpected": sorted(loaded.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(loaded[name].shape)}, expected {tuple(own[name].shape)}"
            for name in sorted(own.keys() & loaded.keys())
            if loaded[name].shape != own[name].shape
        ],
        "of other options": [
            f"{name} {options[name]!r}, expected {value!r}"
            for name, value in expected.items()
            if options is not None and options.get(name) != value
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{path}: does not hold what trains in this {type(model).__name__}. {told}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(loaded[name])


def _whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).contiguous()


def own_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _options(model: nn.Module) -> dict[str, Any]:
    """What the results depend on besides parameters and their names."""
    options = next((block.options for block in model.modules() if isinstance(block, AdaptedBlock)), None)
    if options is None:
        return {}
    named = asdict(options) | {"activation": options.activation.__name__}
    del named["impl"]
    return named
