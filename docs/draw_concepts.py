"""Draws docs/concepts.png: from two attention maps to AM flow, in DINOv2. Run it from the root of the repository."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from amflow_models.cli.offline import IMAGENET_MEAN, IMAGENET_STD, clip_path, dinov2_vit_small, read_frames
from torch import Tensor

from amflow_kernels import am_flow, record_qk

SIZE, PATCH, LAYER = 448, 14, "blocks.6.attn"
QUERY = (12, 15)  # row and column of a patch on the moving arm


def main() -> None:
    frames = read_frames(clip_path("bigbuckbunny"), 2, every=2, size=SIZE, start=38)
    with torch.no_grad(), record_qk(model := dinov2_vit_small(SIZE), layers=[LAYER]) as qk:
        model(frames)
    q, k = qk[LAYER]  # (2, heads, N, D)
    side = SIZE // PATCH
    query = 1 + QUERY[0] * side + QUERY[1]  # after the class token
    maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, query].mean(1)  # (2, N): rows of the mean over heads
    flow = am_flow(q, k, num_frames=2, head_reduction="mean", center=True)[0, 0]
    first, second, change, all_queries = (on_grid(x, side) for x in (maps[0], maps[1], (maps[0] - maps[1]).abs(), flow))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pictures = (frames * std + mean).clamp(0, 1).permute(0, 2, 3, 1)

    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    panels = [
        ("frame t, and a query", pictures[0], None),
        ("A[t]: attention of that query", first, first.quantile(0.995)),
        ("M[t] = |A[t] - A[t+1]|", change, change.quantile(0.995)),
        ("frame t + 1", pictures[1], None),
        ("A[t+1]: the same query", second, first.quantile(0.995)),
        ("flow[t] - 1: all queries together", all_queries, all_queries.quantile(0.995)),
    ]
    for axis, (title, picture, largest) in zip(axes.flat, panels, strict=True):
        lowest = None if largest is None else 0
        axis.imshow(picture, cmap="inferno", vmin=lowest, vmax=largest, extent=(0, side, side, 0))
        if "flow" not in title:
            axis.add_patch(plt.Rectangle((QUERY[1], QUERY[0]), 1, 1, fill=False, edgecolor="cyan", linewidth=1.5))
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.savefig(Path(__file__).with_name("concepts.png"), dpi=100)


def on_grid(x: Tensor, side: int) -> Tensor:
    """The patches, without the class token, where they are in the image."""
    return x[1:].unflatten(0, (side, side))


if __name__ == "__main__":
    main()
