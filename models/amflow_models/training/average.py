"""An exponential moving average of what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from amflow_models.weights import unwrapped_name


class Average:
    """``average = decay * average + (1 - decay) * parameter`` after each step, of each parameter that trains.

    Args:
        model: what the average starts from.
        decay: from 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {unwrapped_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, p in self.parameters.items():
            self.values[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average's values, for testing or saving it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """What `save_trained` wrote while it was `applied`. ValueError if it can't be read or has other names."""
        try:
            loaded = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: can't be read as safetensors ({error})") from error
        if loaded.keys() != self.values.keys():
            raise ValueError(f"{path}: does not hold what trains in this model")
        for name, value in loaded.items():
            self.values[name].copy_(_like(self.values[name], value))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            kept = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name] = kept


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """The part of a tensor that this process holds of `own`."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
