"""``amflow predict``: the most probable classes of videos, by a classifier that ``amflow train`` trained.

Running it needs ``pip install 'amflow-kernels[train]'``; importing this module needs only torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amflow_models.cli.arguments import DEFAULT, VIDEO_HELP, at_least, video_path
from amflow_models.cli.demo import check_output
from amflow_models.cli.drawing import CUT, overlay, side_by_side, video_writer
from amflow_models.cli.errors import CommandError

if TYPE_CHECKING:
    from amflow_models.inference import Prediction, TrainedClassifier, Window

_TILE = 256  # least side of a picture in the overlay video, so that the text is legible


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0, or 1 if a video could not be read; the others are predicted all the same.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    videos = [video_path(video) for video in args.videos]
    outputs = _outputs(args.output, videos)
    classifier = _load(args.checkpoint, args.best, args.ema, args.weights)
    failed = False
    for video, output in zip(videos, outputs, strict=True):
        try:
            prediction = _predict(classifier, video, output, args.window)
        except CommandError:
            raise
        except ValueError as error:  # also UnreadableVideo
            failed = True
            if args.json:
                print(json.dumps({"video": str(video), "error": str(error)}), flush=True)
            print(f"amflow: {error}", file=sys.stderr)
            continue
        if args.json:
            print(json.dumps(_as_json(video, prediction, args.top)), flush=True)
        else:
            _print_table(video, prediction, args.top)
            if output is not None:
                print(f"overlay: {output}")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow predict",
        description="Classifies videos of any length: each is divided into windows, and the probabilities of the "
        "windows are averaged. Prints the most probable classes of each video.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint or a file of weights")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help=VIDEO_HELP)
    parser.add_argument("--top", type=at_least(1), default=5, metavar="K", help=f"number of classes to print {DEFAULT}")
    parser.add_argument(
        "--window",
        type=at_least(1),
        metavar="FRAMES",
        help="least length of a window (default: that of a training clip; the whole video for uniform sampling)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object in a line for each video, also with each window"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="write an overlay video with the prediction and the AM flow: a file that ends in .mp4, or for several "
        "videos a folder",
    )
    parser.add_argument("--best", action="store_true", help="take the run's best checkpoint instead of its newest")
    parser.add_argument("--ema", action="store_true", help="take the exponential moving average of the weights")
    parser.add_argument(
        "--weights",
        metavar="FILE|offline|hub",
        help="pretrained weights of the frozen backbone (default: those that the checkpoint's config names)",
    )
    return parser


def _outputs(output: Path | None, videos: Sequence[Path]) -> list[Path | None]:
    """The overlay video of each video."""
    if output is None:
        return [None] * len(videos)
    if output.suffix.lower() == ".mp4":
        if len(videos) > 1:
            raise CommandError(f"--output: expected a folder for {len(videos)} videos, got {output}")
        check_output(output, videos[0])
        return [output]
    names = [f"{video.stem}.mp4" for video in videos]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CommandError(f"--output: several of the videos would be written to {output / twice}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {output}: expected a folder, or a name that ends in .mp4 ({error})") from error
    outputs: list[Path | None] = [output / name for name in names]
    for video, path in zip(videos, outputs, strict=True):
        assert path is not None
        check_output(path, video)
    return outputs


def _load(checkpoint: Path, best: bool, ema: bool, weights: str | None) -> TrainedClassifier:
    from amflow_models import load_classifier

    try:
        return load_classifier(checkpoint, best=best, ema=ema, weights=weights)
    except ValueError as error:
        raise CommandError(" ".join(str(error).split())) from error


def _predict(classifier: TrainedClassifier, video: Path, output: Path | None, window: int | None) -> Prediction:
    """The prediction for a video; writes its overlay video unless `output` is None."""
    if output is None:
        return classifier(video, window=window)
    with _overlay_video(output, classifier.classes) as draw:
        return classifier.average(_drawn(classifier.windows(video, window=window, flow=True), draw))


def _drawn(windows: Iterator[Window], draw: Callable[[Window], None]) -> Iterator[Window]:
    for window in windows:
        draw(window)
        yield window


@contextmanager
def _overlay_video(output: Path, classes: Sequence[str]) -> Iterator[Callable[[Window], None]]:
    """Gives a function that adds the frames of a window to a video, beside the same frames under their AM flow.

    The last frame of a window has no flow; it is drawn under that of the frame before.
    """
    from amflow_models.inference import top

    largest = 1e-12

    def draw(window: Window) -> None:
        nonlocal largest
        assert window.flow is not None
        largest = max(largest, window.flow.quantile(CUT).item())
        lines = [f"{name}  {value:.0%}" for name, value in top(window.probabilities, classes, 3)]
        for t, (number, picture) in enumerate(zip(window.frames, window.images, strict=True)):
            image = _enlarged(picture)
            flow = overlay(image, window.flow[min(t, len(window.flow) - 1)], largest)
            write(side_by_side([_labelled(image, [f"frame {number}", *lines]), flow]))

    with video_writer(output) as write:
        yield draw


def _enlarged(picture: Tensor) -> Tensor:
    """A picture, uint8 (3, size, size), as float32 in [0, 1] with sides of at least `_TILE` pixels."""
    factor = -(-_TILE // picture.shape[-1])
    return (picture.float() / 255).repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _labelled(image: Tensor, lines: Sequence[str]) -> Tensor:
    """The picture (3, size, size) with lines of text on a dark ground at its top."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    height = picture.height // 16
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, picture.width, (len(lines) + 0.5) * height), fill=(0, 0, 0))
    font = ImageFont.load_default(0.75 * height)
    for number, line in enumerate(lines):
        draw.text((height // 3, (number + 0.25) * height), line, fill=(255, 255, 255), font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _as_json(video: Path, prediction: Prediction, k: int) -> dict[str, Any]:
    from amflow_models.inference import top

    def classes(probabilities: Tensor) -> list[dict[str, Any]]:
        return [{"class": name, "probability": value} for name, value in top(probabilities, prediction.classes, k)]

    windows = [
        {"first_frame": w.frames[0], "last_frame": w.frames[-1], "top": classes(w.probabilities)}
        for w in prediction.windows
    ]
    return {"video": str(video), "top": classes(prediction.probabilities), "windows": windows}


def _print_table(video: Path, prediction: Prediction, k: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, count = Console(), len(prediction.windows)
    table = Table("class")
    table.add_column("probability", justify="right")
    for name, value in prediction.top(k):
        table.add_row(escape(name), f"{value:.1%}")
    heading = f"{video}, {count} window{'s' if count > 1 else ''}"
    console.print(heading, markup=False, highlight=False, soft_wrap=True)  # as a title it would be wrapped
    console.print(table)
