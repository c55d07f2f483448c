"""Draws the AM flow in a trained model for clips of the test list.

python -m examples.motion.draw --config examples/motion/config.yaml PNG
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from amflow_models import Gate
from amflow_models.files import written_whole
from amflow_models.training.build import build_model, dataset, image_size, normalisation, read_lists
from amflow_models.training.checkpoints import find_trained
from amflow_models.training.config import load_config
from amflow_models.weights import load_trained
from torch import Tensor
from torch.nn.functional import interpolate

CLIPS = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.motion.draw", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("picture", type=Path)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.changes)
    videos = read_lists(config, ("test",))["test"]
    model = build_model(config).eval()
    load_trained(model, find_trained(config.output))
    items = dataset(config, videos, image_size(config, model), train=False)
    clips = torch.stack([items[0, index]["clips"][0] for index in range(CLIPS)])
    labels = [videos.classes[items[0, index]["label"]] for index in range(CLIPS)]

    flows: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda _, given, __: flows.append(given[1]))
        for gate in model.modules()
        if isinstance(gate, Gate)
    ]
    with torch.no_grad():
        logits = model(normalisation(model, torch.device("cpu"))(clips))
    for hook in hooks:
        hook.remove()
    guesses = [videos.classes[label] for label in logits.argmax(1).tolist()]
    draw(clips, torch.stack(flows).mean(0), labels, guesses, args.picture)


def draw(clips: Tensor, flow: Tensor, labels: list[str], guesses: list[str], path: Path) -> None:
    """Draws a row for each clip: its frames, all but the last overlaid with the AM flow to the next frame.

    Args:
        clips: uint8 (n, T, 3, H, W).
        flow: (n, T - 1, tokens), the mean over blocks; patch tokens come last.
        labels, guesses: names of the true and the predicted classes.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    count, frames, _, height, width = clips.shape
    side = int(flow.shape[-1] ** 0.5)
    grid = flow[..., -side * side :].unflatten(-1, (side, side))
    smooth = interpolate(grid, (height, width), mode="bicubic")
    figure = Figure(figsize=(2 * frames, 2.1 * count), layout="constrained")
    panels: Any = figure.subplots(count, frames, squeeze=False)
    for row, clip in enumerate(clips):
        for t, frame in enumerate(clip):
            axes = panels[row][t]
            axes.imshow(frame.permute(1, 2, 0))
            if t < frames - 1:
                axes.imshow(smooth[row, t], cmap="inferno", alpha=0.55)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[row][0].set_ylabel(f"{labels[row]}\npredicted: {guesses[row]}")
    figure.suptitle("AM flow to the next frame, mean over blocks; the last frame as it is", fontsize=10)
    with written_whole(path) as part:
        figure.savefig(part, dpi=110)


if __name__ == "__main__":
    main()
