"""Inserting adapters into a model: which block gets which kind, and more AM flow later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from inspect import signature
from operator import index
from typing import Any

from torch import nn

from amflow_kernels.integrations.block_finder import find_blocks, select_blocks
from amflow_models.blocks import AdaptedBlock, AdapterOptions
from amflow_models.suggestions import check_known

PLACEMENTS = ("none", "first_last", "all", "third_stage")


@dataclass(frozen=True)
class AdapterReport:
    """The adapters of a model and its trainable parameters.

    Attributes:
        temporal: indices of the blocks with a temporal processing adapter, from 0.
        ordinary: indices of the blocks with an ordinary adapter.
        trainable: {name: number of elements} of the trainable parameters.
        total: number of elements of all parameters.
    """

    temporal: tuple[int, ...]
    ordinary: tuple[int, ...]
    trainable: dict[str, int]
    total: int

    def __str__(self) -> str:
        parts: dict[str, int] = {}
        for name, count in self.trainable.items():
            part = next((p for p in ("unit", "gate", "align", "adapter") if f".{p}." in f".{name}"), name)
            parts[part] = parts.get(part, 0) + count
        trainable = sum(parts.values())
        return "\n".join([
            f"temporal adapters in blocks {_ranges(self.temporal)}, ordinary in {_ranges(self.ordinary)}",
            f"trainable: {trainable:,} of {self.total:,} parameters ({trainable / self.total:.1%})",
            *(f"  {part:<10}{count:>12,}" for part, count in parts.items()),
        ])  # fmt: skip


def placement(model: nn.Module, blocks: str | Iterable[int]) -> tuple[int, ...]:
    """The sorted indices of the blocks in a placement, from 0.

    Args:
        model: the model, as `add_adapters` takes it.
        blocks: ``"none"``; ``"first_last"`` (the paper's placement for Toyota Smarthome); ``"all"`` (AM/12 on a ViT-B);
            ``"third_stage"``, for hierarchical backbones (our reading of AM/16 on Hiera-B: blocks 5 to 20); or indices.

    Raises:
        TypeError: `blocks` is neither a name nor whole numbers, or the model has no list of blocks.
        ValueError: an unknown placement, an index out of range, or ``"third_stage"`` of a model without stages.
    """
    path, block_list = find_blocks(model)
    count = len(block_list)
    if isinstance(blocks, str):
        check_known("blocks", blocks, PLACEMENTS)
        if blocks == "third_stage":
            ends: Any = getattr(model.get_submodule(path.rpartition(".")[0]), "stage_ends", ())
            if len(ends) < 3:
                raise ValueError(f"blocks: 'third_stage' is for models of stages, {type(model).__name__} has none")
            return tuple(range(ends[1] + 1, ends[2] + 1))
        return {"none": (), "all": tuple(range(count)), "first_last": tuple(sorted({0, count - 1}))}[blocks]
    try:
        chosen = [index(block) for block in iter(blocks)]
    except TypeError:
        raise TypeError(f"blocks: expected the name of a placement or whole numbers, got {blocks!r}") from None
    return tuple(select_blocks(chosen, count))


def add_adapters(
    model: nn.Module,
    *,
    num_frames: int,
    blocks: str | Iterable[int] = "first_last",
    others: bool = True,
    verbose: bool = True,
    **options: Any,
) -> AdapterReport:
    """Freezes a model and puts an adapter into each of its transformer blocks, in place.

    Until the adapters are trained, not a bit of the model's output changes; but in blocks with AM flow an
    `nn.MultiheadAttention` in eval mode does not run in PyTorch's fused inference kernel, which may differ in the last
    digits. The model takes frames folded into the batch, (B * T, ...), the frames of a clip side by side.

    Args:
        model: any model with a list of transformer blocks (called blocks, layers, layer or resblocks). Blocks with AM
            flow must call ``scaled_dot_product_attention`` or an `nn.MultiheadAttention` once, without a mask.
        num_frames: T, frames of a clip.
        blocks: the blocks that get AM flow and a temporal unit, see `placement`.
        others: whether the other blocks get an ordinary adapter.
        verbose: print the report.
        options: the other attributes of `AdapterOptions`.

    Returns:
        The report, whose text lists the trainable parameters.

    Raises:
        TypeError: the model has no list of blocks or several, or blocks without a LayerNorm or linear layers.
        ValueError: an unknown placement or option (the nearest known one is named), or the model has adapters already.
    """
    check_options(options)
    settings = AdapterOptions(num_frames, **options)
    chosen = placement(model, blocks)
    path, block_list = find_blocks(model)
    if any(isinstance(block, AdaptedBlock) for block in block_list):
        raise ValueError("model: has adapters already; grow_am_flow gives more blocks AM flow")
    adapted = {
        number: AdaptedBlock(block, settings, temporal=number in chosen, name=f"{path}.{number}")
        for number, block in enumerate(block_list)
        if others or number in chosen
    }
    model.requires_grad_(False)
    for number, block in adapted.items():
        block_list[number] = block.train(block.block.training)
    report = report_of(model)
    if verbose:
        print(report)
    return report


def check_options(options: Iterable[str], *others: str) -> None:
    """Raises unless all names are those of options of `add_adapters`. Suggests the nearest, or one of `others`.

    Raises:
        ValueError: an unknown option.
    """
    own = [p.name for p in signature(add_adapters).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = dict.fromkeys([*own, *(field.name for field in fields(AdapterOptions)), *others])
    for option in options:
        check_known("option", option, known)


def grow_am_flow(model: nn.Module, blocks: str | Iterable[int] = "all", *, verbose: bool = True) -> AdapterReport:
    """Gives more blocks of an adapted model AM flow and a temporal unit, in place, for staged training.

    Some backbones do not converge with AM flow in all blocks at once (supplement E of the paper): train with a few
    first and last blocks, then grow. Trained parameters do not change by a bit, and new parts start as the identity, so
    the output does not change.

    Args:
        model: a model with adapters, trained or not.
        blocks: the blocks that get AM flow, besides those that have it; see `placement`.
        verbose: print the report.

    Returns:
        The report of the grown model.

    Raises:
        ValueError: the model has no adapters, or an unknown placement or block.
    """
    path, block_list = find_blocks(model)
    adapted = [block for block in block_list if isinstance(block, AdaptedBlock)]
    if not adapted:
        raise ValueError("model: expected one that add_adapters was called on, found no adapters")
    for number in placement(model, blocks):
        block: Any = block_list[number]
        if not isinstance(block, AdaptedBlock):
            block = AdaptedBlock(block, adapted[0].options, temporal=False, name=f"{path}.{number}")
            block_list[number] = block.train(block.block.training)
        if not block.temporal:
            block.make_temporal(at_identity=True)
    report = report_of(model)
    if verbose:
        print(report)
    return report


def report_of(model: nn.Module) -> AdapterReport:
    """The report of a model with adapters."""
    adapted = [(i, b.temporal) for i, b in enumerate(find_blocks(model)[1]) if isinstance(b, AdaptedBlock)]
    return AdapterReport(
        tuple(number for number, temporal in adapted if temporal),
        tuple(number for number, temporal in adapted if not temporal),
        {name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
        sum(p.numel() for p in model.parameters()),
    )


def _ranges(numbers: tuple[int, ...]) -> str:
    """0, 1, 2, 5 as '0-2, 5'."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"
