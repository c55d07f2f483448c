"""An exponential moving average of the trainable parameters."""

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
    """``average = decay * average + (1 - decay) * parameter`` after each step, for each trainable parameter.

    Args:
        model: the model; the average starts at its parameters.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {unwrapped_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average after a step."""
        for name, p in self.parameters.items():
            self.values[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` block the model's parameters have the average's values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Loads a file that `save_trained` wrote while the average was `applied`.

        Raises:
            ValueError: the file can't be read or has other names.
        """
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
            value = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name] = value


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """Shards a whole tensor like `own`."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
