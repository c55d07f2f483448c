"""Small timm models with random weights, for tests of integrations and adapters."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

HEADS, HEAD_DIM = 3, 16
TINY: dict[str, Any] = {
    "pretrained": False, "num_classes": 0, "depth": 3, "embed_dim": 48, "num_heads": HEADS, "img_size": 56,
}  # fmt: skip
TINY_HIERA: dict[str, Any] = {
    "pretrained": False, "num_classes": 0, "img_size": 64, "embed_dim": 32, "stages": (1, 2, 2), "q_pool": 2,
    "mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False),
}  # fmt: skip
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_small_patch14_dinov2", TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", TINY),
    "qk_norm": ("vit_small_patch14_dinov2", {**TINY, "qk_norm": True}),
    "eva02": ("eva02_tiny_patch14_224", TINY),  # rotary embedding, separate biases
    "dinov3": ("vit_small_patch16_dinov3", {**TINY, "img_size": 64}),  # rotary embedding, registers
}
MODELS = {**VITS, "hiera": ("hiera_tiny_224", TINY_HIERA)}


def make(timm_name: str, noise: float = 0.2, **options: Any) -> Any:
    """A timm model in eval mode whose attention is uneven: that of freshly initialised layers is nearly uniform."""
    torch.manual_seed(0)
    model = timm.create_model(timm_name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def small(name: str, **options: Any) -> Any:
    """One of `MODELS`, perhaps with other options."""
    timm_name, own = MODELS[name]
    return make(timm_name, **{**own, **options})


def images(model: Any, count: int) -> Tensor:
    """Random images of the model's size, (count, 3, size, size); always the same ones."""
    size = 64 if hasattr(model, "reroll") else model.patch_embed.img_size[0]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def is_untouched(model: nn.Module) -> bool:
    """Whether no module has a forward of its own instance."""
    return not any("forward" in module.__dict__ for module in model.modules())
