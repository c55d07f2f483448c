"""Tests a trained video classifier: ``python -m amflow_models.evaluate --checkpoint RUN [key=value ...]``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from amflow_models.data import VideoList
from amflow_models.files import write_text, written_whole
from amflow_models.training.build import (
    SPLITS,
    build_model,
    class_names,
    dataset,
    image_size,
    normalisation,
    read_lists,
)
from amflow_models.training.checkpoints import AVERAGE, TRAINED, check_backbone, find_trained, read_about
from amflow_models.training.config import Config, change_config, load_config
from amflow_models.training.metrics import MultiLabelScores, Scores, draw_confusion, multi_label_scores, scores
from amflow_models.training.parallel import choose_precision, distribute, exit_process, make_accelerator
from amflow_models.training.prediction import Predictions, predict
from amflow_models.weights import load_trained


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 1 after an error, which is printed in a line."""
    args = _parser().parse_intermixed_args(argv)
    try:
        evaluate(
            _config(args),
            args.split,
            args.checkpoint,
            ema=args.ema,
            best=args.best,
            output=args.output,
            dump=args.scores,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(
    config: Config,
    split: str,
    checkpoint: Path | None = None,
    *,
    ema: bool = False,
    best: bool = False,
    output: Path | None = None,
    dump: Path | None = None,
) -> Scores | MultiLabelScores:
    """Tests a checkpoint on all views of every video of a split.

    Writes `SPLIT.json` (the scores), `SPLIT.csv` (a line for each video) and `SPLIT_confusion.png` (not with several
    labels). With several processes, each must call it.

    Args:
        config: the config.
        split: "train", "validation" or "test".
        checkpoint: a run, a checkpoint or a safetensors file; None takes the config's `output`.
        ema: test the exponential moving average instead of the weights.
        best: test the run's best checkpoint instead of its newest.
        output: folder to write to; None takes the config's `output`.
        dump: a safetensors file to write all probabilities to, for ensembles: `probabilities` float32
            (videos, classes), `labels` int64 (videos,), or with several labels float32 (videos, classes), and
            `indices`, the videos' places in the list; its metadata has their paths as JSON, `videos`, and the names of
            the classes, `classes`.

    Raises:
        ValueError: the config has no such split, the list is wrong, the checkpoint does not fit the model, or no video
            can be read.
    """
    if getattr(config.data, split) is None:
        raise ValueError(f"data.{split}: the config has none")
    file = find_trained(checkpoint or config.output, AVERAGE if ema else TRAINED, best=best)
    check_backbone(file, config)
    precision = choose_precision(config.training.precision)
    accelerator = make_accelerator(precision)
    videos = read_lists(config, (split,), check=accelerator.is_main_process)[split]
    names = _names(config, videos, file)
    model = build_model(config)
    load_trained(model, file)
    clips = dataset(config, videos, image_size(config, model), train=False, views=True)
    normalise = normalisation(model, accelerator.device)
    distributed = distribute(model, config.training, accelerator)
    predictions = predict(distributed, clips, config, normalise, accelerator, bar=True)
    score: Any = multi_label_scores if config.data.multi_label else scores
    result: Scores | MultiLabelScores = score(predictions.probabilities, predictions.labels)
    if accelerator.is_main_process:
        folder = config.output if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        _write_scores(folder / f"{split}.json", file, predictions, result, names, videos.missing)
        _write_table(folder / f"{split}.csv", videos, predictions, names)
        if isinstance(result, Scores):
            draw_confusion(result.confusion, names, folder / f"{split}_confusion.png")
        if dump is not None:
            _dump(dump, videos, predictions, names)
        print(f"{file}, precision {precision}\n{split}: {len(predictions.labels)} videos, {result}")
        for error in predictions.errors:
            print(f"not read: {error}", file=sys.stderr)
    accelerator.end_training()
    return result


def _config(args: argparse.Namespace) -> Config:
    """The config that the arguments name, or that of the checkpoint."""
    changes = [*args.changes, *(["data.strict=true"] if args.strict else [])]
    if args.config is not None:
        return load_config(args.config, changes)
    if args.checkpoint is None:
        raise ValueError("expected --config, or --checkpoint to take the config that it was trained by")
    file = find_trained(args.checkpoint, AVERAGE if args.ema else TRAINED, best=args.best)
    about = read_about(file)
    if about is None:
        raise ValueError(f"{file}: does not say how it was trained; pass --config")
    return change_config(about.config, changes, file)


def _names(config: Config, videos: VideoList, trained: Path) -> list[str]:
    """The names of the classes: those of the list and of the checkpoint, which must not differ; else their numbers."""
    listed, about = class_names(config, videos), read_about(trained)
    known = about and about.classes
    if listed and known and listed != known:
        number = next(n for n, (a, b) in enumerate(zip_longest(listed, known)) if a != b)
        a, b = (names[number] if number < len(names) else "none" for names in (listed, known))
        raise ValueError(
            f"data.classes: expected the classes that {trained} was trained on, in their order; class {number} is "
            f"{a!r}, and was {b!r}"
        )
    return listed or known or [str(number) for number in range(config.data.num_classes)]


def _write_scores(
    path: Path,
    checkpoint: Path,
    predictions: Predictions,
    result: Scores | MultiLabelScores,
    names: list[str],
    missing: Sequence[str],
) -> None:
    content: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "videos": len(predictions.labels),
        "missing": list(missing),
        "not_read": predictions.errors,
        "loss": predictions.loss,
    }
    if isinstance(result, Scores):
        content |= {"top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
    else:
        precision = zip(names, result.average_precision.tolist(), strict=True)
        content |= {"map": result.map, "average_precision": {name: x for name, x in precision if x == x}}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _write_table(path: Path, videos: VideoList, predictions: Predictions, names: list[str]) -> None:
    """A line for each video: its path, label or labels, most probable class and that class's probability."""
    several = predictions.labels.dim() == 2
    probabilities, guesses = predictions.probabilities.max(1)
    columns = (predictions.indices, predictions.labels, guesses, probabilities)
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "label", "prediction", "probability"])
        for index, label, guess, probability in zip(*(column.tolist() for column in columns), strict=True):
            label = [names[k] for k, there in enumerate(label) if there] if several else [names[label]]
            writer.writerow([videos.videos[index].path, ";".join(label), names[guess], f"{probability:.6f}"])


def _dump(path: Path, videos: VideoList, predictions: Predictions, names: list[str]) -> None:
    """Writes the probabilities of all classes, see `evaluate`."""
    tensors = {name: getattr(predictions, name).contiguous() for name in ("probabilities", "labels", "indices")}
    paths = [str(videos.videos[index].path) for index in predictions.indices.tolist()]
    with written_whole(path) as part:
        save_file(tensors, part, metadata={"videos": json.dumps(paths), "classes": json.dumps(names)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="amflow evaluate", description="Test a video classifier.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of a config of the package (default: that of the checkpoint's training)",
    )
    parser.add_argument("--checkpoint", type=Path, help="a run, checkpoint or file (default: the config's output)")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--ema", action="store_true", help="test the exponential moving average of the weights")
    parser.add_argument("--best", action="store_true", help="test the run's best checkpoint instead of its newest")
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="write the probabilities of all classes to a safetensors file"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the config's output)")
    parser.add_argument("--strict", action="store_true", help="stop at the first video that can't be read")
    parser.add_argument(
        "changes", nargs="*", metavar="key=value", help="change a value of the config, such as evaluation.clips=10"
    )
    return parser


if __name__ == "__main__":
    exit_process(main())
