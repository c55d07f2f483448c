"""The aligning encoder: for moving cameras, it re-expresses the next frame on the token grid of this one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class AligningEncoder(nn.Module):
    """Frame t+1, re-expressed on frame t's tokens: ``x[t+1] + g CrossAttention(query x[t], key and value x[t+1])``.

    When the camera moves, all tokens change. Here each token of frame t attends to frame t+1, and the attention map of
    the result is compared with frame t's. The paper says what its aligning encoder does but not how it is built: this
    is our reading. The scalar g starts at 0, which is plain AM flow.

    Args:
        width: channels C of the tokens.
        inner: channels of query, key and value.
    """

    HEADS = 2

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, this: Tensor, following: Tensor) -> Tensor:
        """Args: this, following: tokens (..., N, C) of frames t and t+1. Returns (..., N, C)."""
        batch = this.shape[:-2]
        q = self._heads(self.query(self.norm(this)))
        k, v = (self._heads(part) for part in self.key_value(self.norm(following)).chunk(2, -1))
        attended = rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return following + self.g * self.out(attended).unflatten(0, batch)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x.flatten(0, -3), "b n (h d) -> b h n d", h=self.HEADS)


def load_aligning_encoders(path: str | Path) -> dict[int, AligningEncoder]:
    """Loads the aligning encoders from a file of `save_trained`, by block index; other parameters are ignored.

    Raises:
        ValueError: the file can't be read, has no aligning encoder, or lacks a part of one.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error})") from error
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.search(r"\.(\d+)\.align\.(.+)$", name):
            states.setdefault(int(found[1]), {})[found[2]] = tensor
    if not states:
        raise ValueError(f"{path}: has no aligning encoder; models have them with align=True")
    encoders = {}
    for block, state in sorted(states.items()):
        try:
            inner, width = state["query.weight"].shape
            encoders[block] = AligningEncoder(width, inner).eval()
            encoders[block].load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: the aligning encoder of block {block} is not whole ({error})") from error
    return encoders
