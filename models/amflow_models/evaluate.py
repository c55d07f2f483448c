"""Tests a trained video classifier: ``python -m amflow_models.evaluate --config FILE [key=value ...]``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from amflow_models.checkpoint import load_trained
from amflow_models.training.build import (
    SPLITS,
    build_model,
    class_names,
    dataset,
    image_size,
    normalisation,
    read_lists,
)
from amflow_models.training.checkpoints import AVERAGE, TRAINED, check_backbone, find_trained
from amflow_models.training.config import Config, load_config
from amflow_models.training.metrics import Scores, draw_confusion, scores
from amflow_models.training.parallel import distribute, leave, make_accelerator
from amflow_models.training.testing import predict


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 after an error, told in a line."""
    args = _parser().parse_intermixed_args(argv)
    try:
        evaluate(
            load_config(args.config, [*args.changes, *(["data.strict=true"] if args.strict else [])]),
            args.split,
            args.checkpoint,
            ema=args.ema,
            output=args.output,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(
    config: Config, split: str, checkpoint: Path | None = None, *, ema: bool = False, output: Path | None = None
) -> Scores:
    """Tests a checkpoint on all views of every video of a split.

    Writes `SPLIT.json` (the scores), `SPLIT.csv` (a line for each video) and `SPLIT_confusion.png`.

    Args:
        split: "train", "validation" or "test".
        checkpoint: a run, a checkpoint or a safetensors file; None is the config's `output`.
        ema: the exponential moving average in the place of the weights.
        output: folder to write to; None is the config's.

    Raises:
        ValueError: the config has no such split, the list is wrong, the checkpoint is none of this model, or no video
            can be read.
    """
    if getattr(config.data, split) is None:
        raise ValueError(f"data.{split}: the config has none")
    file = find_trained(checkpoint or config.output, AVERAGE if ema else TRAINED)
    check_backbone(file, config)
    accelerator = make_accelerator(config.training.precision)
    videos = read_lists(config, (split,), check=accelerator.is_main_process)[split]
    model = build_model(config)
    load_trained(model, file)
    clips = dataset(config, videos, image_size(config, model), train=False, views=True)
    normalise = normalisation(model, accelerator.device)
    found = predict(distribute(model, config.training, accelerator), clips, config, normalise, accelerator, bar=True)
    result = scores(found.probabilities, found.labels)
    if accelerator.is_main_process:
        names = class_names(config, videos)
        folder = config.output if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        told = {"checkpoint": str(file), "videos": len(found.labels), "not_read": found.errors, "loss": found.loss,
                "top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(told, indent=1) + "\n")
        with (folder / f"{split}.csv").open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["video", "label", "prediction", "probability"])
            sure, taken = found.probabilities.max(1)
            for place, label, guess, value in zip(
                found.places.tolist(), found.labels.tolist(), taken.tolist(), sure.tolist(), strict=True
            ):
                writer.writerow([videos.videos[place].path, names[label], names[guess], f"{value:.6f}"])
        draw_confusion(result.confusion, names, folder / f"{split}_confusion.png")
        print(f"{file}\n{split}: {len(found.labels)} videos, {result}")
        for error in found.errors:
            print(f"not read: {error}", file=sys.stderr)
    accelerator.end_training()
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="amflow evaluate", description="Test a video classifier.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a YAML file, or the name of one that comes along"
    )
    parser.add_argument("--checkpoint", type=Path, help="a run, checkpoint or file (default: the config's output)")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--ema", action="store_true", help="test the exponential moving average of the weights")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the config's output)")
    parser.add_argument("--strict", action="store_true", help="stop at the first video that can't be read")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the config, as evaluation.clips=10")
    return parser


if __name__ == "__main__":
    leave(main())
