"""The layout of tokens on the image: where a model tells it, or as the caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from amflow_kernels.integrations.block_finder import unwrap
from amflow_kernels.integrations.layers import parts_around

# Called with a layer's name, its flow (..., [windows,] Nk), and the number of windows, of which flow has a dimension if
# there are several. Returns the flow on the grid, (..., height, width), and that of the prefix tokens, (..., prefix).
Place = Callable[[str, Tensor, int], tuple[Tensor, Tensor]]

# Number of tokens before the image tokens, by the `model_type` of a configuration of transformers.
TRANSFORMERS_PREFIX: dict[str, Callable[[Any], int]] = {
    "aimv2_vision_model": lambda config: 0,
    "clip_vision_model": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + int(config.num_register_tokens),
    "dinov3_vit": lambda config: 1 + int(config.num_register_tokens),
    "ijepa": lambda config: 0,
    "siglip_vision_model": lambda config: 0,
    "vit": lambda config: 1,
    "vit_msn": lambda config: 1,
}


class PatchGrid:
    """The grid of a ViT: prefix tokens first, then the patches by rows.

    Args:
        prefix: number of prefix tokens.
        watched: module that gets the images, (images, channels, height, width).
        size: rows and columns of patches, of the images' height and width; or the patches' height and width.
    """

    def __init__(self, prefix: int, watched: nn.Module, size: Any) -> None:
        self.prefix = prefix
        self.watched = watched
        self.size_of: Callable[[int, int], Sequence[int]] = size if callable(size) else _in_patches(size)
        self.images = 0
        self.size = (0, 0)

    def observe(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of `watched`, and notes the number and size of its images."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.dim() == 4:
                self.images = x.shape[0]
                rows, columns = self.size_of(x.shape[-2], x.shape[-1])
                self.size = (rows, columns)
                break
        return forward(*args, **kwargs)

    def __call__(self, name: str, flow: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        expected = self.prefix + self.size[0] * self.size[1]
        if windows > 1 or flow.shape[-1] != expected:
            raise RuntimeError(
                f"{name}: expected keys of {self.images} images of {expected} tokens each ({self.prefix} prefix tokens "
                f"and a grid of {self.size[0]} x {self.size[1]}), got keys of {windows} windows of {flow.shape[-1]} "
                "tokens: dropped or pooled tokens have no known place; pass `grid` to record_am_flow, or choose layers"
            )
        return on_grid(flow, self.prefix, self.size)


class HieraGrid:
    """The grid of Hiera, which orders tokens by place in the window, then by window, and pools them between stages."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, name: str, flow: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        # The block whose output has the token order of this block's input: the block itself may pool tokens.
        layout = max(int(name.rpartition("blocks.")[2].partition(".")[0]) - 1, 0)
        expected = prod(self.model.reroll.schedule[layout][1])
        if windows * flow.shape[-1] != expected:
            raise RuntimeError(
                f"{name}: expected keys of {expected} tokens in each image, got {windows} windows of {flow.shape[-1]}: "
                "dropped tokens can't be read"
            )
        if windows > 1:
            flow = flow.transpose(-1, -2).flatten(-2)
        grid = self.model.reroll(flow.reshape(-1, expected, 1), layout).squeeze(-1)
        return torch.unflatten(grid, 0, flow.shape[:-1]), flow[..., :0]


def on_grid(flow: Tensor, prefix: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Flow (..., prefix + height * width) as grid and prefix."""
    return torch.unflatten(flow[..., prefix:], -1, size), flow[..., :prefix]


def told_grid(grid: Any) -> Place:
    """What the argument `grid` of `record_am_flow` says.

    Raises:
        TypeError, ValueError: it is neither (prefix tokens, (height, width)) nor callable.
    """
    if callable(grid):
        return grid
    try:
        prefix, (height, width) = grid
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (prefix, height, width))
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise TypeError(f"grid: expected (prefix tokens, (height, width)), a callable or None, got {grid!r}")
    if prefix < 0 or height < 1 or width < 1:
        raise ValueError(f"grid: expected numbers of tokens, got {grid!r}")

    def place(name: str, flow: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        if windows > 1 or flow.shape[-1] != prefix + height * width:
            raise ValueError(
                f"grid: {name} has {windows} windows of {flow.shape[-1]} tokens, not {prefix} prefix tokens and "
                f"{height} x {width}; pass a callable, or choose layers"
            )
        return on_grid(flow, prefix, (height, width))

    return place


def find_grids(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """The grid of each named layer that lies in a model which tells it."""
    grids: dict[str, Place] = {}
    for part, inside in parts_around(model, names).values():
        grid = grid_of(part)
        if grid is not None:
            grids.update(dict.fromkeys([name for name in inside if name not in grids], grid))
    return grids


def grid_of(model: Any) -> PatchGrid | HieraGrid | None:
    """The grid that a model of one of these libraries tells by its attributes, else None."""
    if hasattr(model, "reroll") and hasattr(model, "unroll"):
        return HieraGrid(model)
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, nn.Module) and hasattr(model, "blocks"):  # without stages, which pool tokens
        embed = unwrap(embed)
        prefix_tokens = getattr(model, "num_prefix_tokens", None)
        if isinstance(prefix_tokens, int) and hasattr(embed, "grid_size"):  # timm
            return PatchGrid(prefix_tokens, embed, _timm_size(embed))
        if hasattr(model, "cls_token") and hasattr(embed, "patch_size"):  # the DINO repositories
            registers = getattr(model, "num_register_tokens", getattr(model, "n_storage_tokens", 0))
            return PatchGrid(1 + registers, embed, embed.patch_size)
    config: Any = getattr(model, "config", None)  # of transformers
    prefix = TRANSFORMERS_PREFIX.get(getattr(config, "model_type", ""))
    if prefix is not None:
        return PatchGrid(prefix(config), model, config.patch_size)
    for token, convolution in (("class_token", "conv_proj"), ("class_embedding", "conv1")):  # torchvision, open_clip
        conv = getattr(model, convolution, None)
        if isinstance(conv, nn.Module) and hasattr(model, token) and hasattr(model, "patch_size"):
            return PatchGrid(1, unwrap(conv), model.patch_size)
    return None


def _in_patches(size: Any) -> Callable[[int, int], Sequence[int]]:
    """Rows and columns of patches of a size, (height, width) or one number."""
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    return lambda height, width: (height // patch_height, width // patch_width)


def _timm_size(embed: Any) -> Callable[[int, int], Sequence[int]]:
    dynamic = getattr(embed, "dynamic_feat_size", None)
    return lambda height, width: embed.grid_size if dynamic is None else dynamic((height, width))
