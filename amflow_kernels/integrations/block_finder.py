"""Where a model has its transformer blocks, and which of them are meant: shared by all that work on blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

NAMES = ("blocks", "layers", "layer", "resblocks")  # what timm, transformers, torchvision and CLIP call the list
# What torch.compile, the wrappers for data parallelism and averaging, FSDP and checkpointing call the model inside.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

HOLDERS = ("base_model", "model")  # what peft and timm's FeatureGetterNet call the model inside


def unwrap(model: nn.Module) -> Any:
    """The model inside of `torch.compile`, `DistributedDataParallel` and other wrappers, whose only child it is."""
    inner: Any = model
    while isinstance(inner, nn.Module) and len(inner._modules) == 1 and next(iter(inner._modules)) in WRAPPED:
        (inner,) = inner._modules.values()
    return inner


def look_through(model: nn.Module) -> Any:
    """The model inside of what `unwrap` looks through, and of wrappers of peft and timm's feature extraction."""
    inner: Any = unwrap(model)
    while isinstance(inner, nn.Module) and len(inner._modules) == 1 and next(iter(inner._modules)) in HOLDERS:
        inner = unwrap(*inner.children())
    return inner


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """All non-empty lists in a model that are named like lists of transformer blocks, by their path."""
    return {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in NAMES and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The path and the list of a model's transformer blocks: the outermost list with a usual name.

    Raises:
        TypeError: the model has no such list, or several of which none contains the others.
    """
    lists = block_lists(model)
    if not lists:
        raise TypeError(
            f"model: expected a list of transformer blocks (a ModuleList or Sequential called {', '.join(NAMES)}), "
            f"found none in {type(model).__name__}"
        )
    path = min(lists, key=lambda candidate: candidate.count("."))
    others = [other for other in lists if other != path and not other.startswith(f"{path}.")]
    if others:
        raise TypeError(
            f"model: expected one list of transformer blocks, found {path}, {', '.join(others)} in "
            f"{type(model).__name__}; pass the part that has the one meant"
        )
    return path, lists[path]


def select_blocks(blocks: Iterable[int] | None, count: int) -> list[int]:
    """Sorted, distinct indices of the selected blocks of `count`; None selects all.

    Raises:
        ValueError: an index is not in [0, count).
    """
    if blocks is None:
        return list(range(count))
    chosen = list(blocks)
    for index in chosen:
        if index not in range(count):
            raise ValueError(f"blocks: expected indices from 0 to {count - 1}, got {index!r}")
    return sorted(set(chosen))
