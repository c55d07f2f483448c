"""A vision transformer with the interfaces of the DINOv2 and DINOv3 repositories, which no package ships.

Written from the description of the models in the papers (arXiv 2304.07193, 2508.10104): pre-norm blocks with
LayerScale, a class token and registers before the patches. As there, blocks take a tensor or a list of tensors (crops
of several sizes), and the older form computes softmax(q k^T) v by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.is_fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.is_fused:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = torch.softmax(q.shape[-1] ** -0.5 * q @ k.mT, -1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, fused=fused)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        if isinstance(x, list):
            return [self.forward(crop) for crop in x]
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoViT(nn.Module):
    """The model; `in_lists` passes lists of tensors to the blocks, as DINOv3's does."""

    def __init__(
        self, width: int = 48, heads: int = 3, depth: int = 3, *, fused: bool = True, in_lists: bool = False
    ) -> None:
        super().__init__()
        self.num_register_tokens, self.in_lists = 4, in_lists
        self.patch_embed = PatchEmbed(width, 14)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.register_tokens = nn.Parameter(torch.randn(1, self.num_register_tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, fused=fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        prefix = torch.cat((self.cls_token, self.register_tokens), 1).expand(len(x), -1, -1)
        x = torch.cat((prefix, x), 1)
        for block in self.blocks:
            x = block([x])[0] if self.in_lists else block(x)
        return self.norm(x)[:, 0]
