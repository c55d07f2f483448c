"""What was trained, in a file: adapters and head, without the frozen backbone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require a gradient, by name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, path: str | Path) -> None:
    """Writes the parameters of a model that require a gradient to a safetensors file."""
    save_file(trained_state(model), path)


def load_trained(model: nn.Module, path: str | Path) -> None:
    """Reads what `save_trained` wrote into a model made in the same way.

    Raises:
        ValueError: the file is not of this model: all missing and unexpected names and other shapes are listed; or it
            can't be read. The model is as it was then.
    """
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error})") from error
    own = trained_state(model)
    shapes = [
        f"{name} {tuple(loaded[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & loaded.keys()
        if loaded[name].shape != own[name].shape
    ]
    problems = {
        "missing": sorted(own.keys() - loaded.keys()),
        "unexpected": sorted(loaded.keys() - own.keys()),
        "of another shape": sorted(shapes),
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{path}: does not hold what trains in this {type(model).__name__}. {told}")
    model.load_state_dict(loaded, strict=False)
