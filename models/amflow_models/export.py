"""``amflow export``: a trained classifier as one file of `torch.export`, with its preprocessing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from amflow_models.files import written_whole
from amflow_models.inference import load_classifier
from amflow_models.training.build import image_size, pretrained

PREPROCESSING = "preprocessing.json"  # name of the extra file in the exported one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 1 after an error, which is printed in a line."""
    args = _parser().parse_args(argv)
    try:
        found = export(args.checkpoint, args.output, ema=args.ema, best=args.best, weights=args.weights)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1))
    return 0


def export(
    checkpoint: Path, output: Path, *, ema: bool = False, best: bool = False, weights: str | None = None
) -> dict[str, Any]:
    """Exports a trained classifier, backbone and all, on the CPU in float32.

    The program takes normalised clips (B, T, 3, size, size), float32, with any B, and returns logits (B, classes).
    After ``import amflow_kernels``, which registers its ops, ``torch.export.load`` reads it.

    Args:
        checkpoint: a run, a checkpoint or its `model.safetensors`.
        output: the file to write.
        ema: take the exponential moving average of the weights.
        best: take the run's best checkpoint instead of its newest.
        weights: pretrained weights of the backbone, as for `load_classifier`.

    Returns:
        What the program's input is, as the file's `preprocessing.json` states it: size, mean, std (of values in [0, 1],
        red, green, blue), frames, sampling and stride (None for uniform sampling); the names of the classes.

    Raises:
        ValueError: as for `load_classifier`, or the output's name does not end in .pt2.
    """
    if output.suffix != ".pt2":
        raise ValueError(f"output: expected a name that ends in .pt2, got {output}")
    classifier = load_classifier(checkpoint, ema=ema, best=best, weights=weights, device="cpu")
    model, data = classifier.model, classifier.config.data
    size = image_size(classifier.config, model)
    found = {
        "size": size,
        "mean": list(pretrained(model.backbone, "mean")),
        "std": list(pretrained(model.backbone, "std")),
        "frames": data.frames,
        "sampling": data.sampling,
        "stride": data.stride if data.sampling == "dense" else None,
        "classes": list(classifier.classes),
    }
    clips = torch.zeros(2, data.frames, 3, size, size)
    with torch.no_grad():
        program = torch.export.export(model, (clips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with written_whole(output) as part:
        torch.export.save(program, part, extra_files={PREPROCESSING: json.dumps(found)})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow export",
        description="Export a trained video classifier with torch.export; prints its preprocessing.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run, checkpoint or file of weights")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.pt2", help="the file to write")
    parser.add_argument("--ema", action="store_true", help="take the exponential moving average of the weights")
    parser.add_argument("--best", action="store_true", help="take the run's best checkpoint instead of its newest")
    parser.add_argument(
        "--weights", metavar="WEIGHTS", help="pretrained weights of the backbone (default: those of the config)"
    )
    return parser
