"""``amflow visualize``: pictures of AM flow, motion maps and their principal components for every pair of frames.

Running it needs ``pip install 'amflow-kernels[demo]'``; importing this module needs only torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from amflow_models.cli.arguments import DEFAULT, VIDEO_HELP, add_frame_arguments, at_least, video_path
from amflow_models.cli.backbone import OFFLINE_MODEL, WEIGHTS_HELP, check_model, choose_weights, load
from amflow_models.cli.demo import check_output
from amflow_models.cli.errors import CommandError, needs_extra
from amflow_models.cli.figure import FORMATS, save_figure
from amflow_models.cli.offline import input_size
from amflow_models.cli.overlay import write_flows
from amflow_models.cli.pictures import Flows, flows, pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status 0. Failures raise what `run` raises."""
    args = _parser().parse_args(arguments)
    video = video_path(args.video)
    output = args.output or Path(f"amflow_{video.stem}")
    pairs = run(
        video,
        output,
        model=args.model,
        weights=args.weights,
        size=args.size,
        crop=args.crop,
        blocks=args.blocks,
        every=args.every,
        start=args.start,
        pairs=args.pairs,
        alignment=args.compare_alignment,
        shared_scale=args.scale == "shared",
        dpi=args.dpi,
    )
    print(f"{pairs} {'pair' if pairs == 1 else 'pairs'} of frames: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow visualize",
        description="Draws, for every pair of frames and every block of a vision transformer: AM flow, how much "
        "attention to and from each patch changes, and the principal components of that change as colours. Writes a "
        "picture of each pair, or an overlay video of the flow.",
    )
    parser.add_argument("video", metavar="VIDEO", help=VIDEO_HELP)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="a folder for a PNG of each pair (default: amflow_ and the video's name), a picture of the first pair "
        f"({', '.join(FORMATS)}), or an overlay video (.mp4)",
    )
    parser.add_argument(
        "--model", default=OFFLINE_MODEL, metavar="NAME", help=f"a plain vision transformer of timm {DEFAULT}"
    )
    parser.add_argument("--weights", metavar="hub|offline|FILE", help=WEIGHTS_HELP)
    parser.add_argument(
        "--size", type=at_least(14), default=224, metavar="PIXELS", help=f"shorter side of the input {DEFAULT}"
    )
    parser.add_argument("--crop", action="store_true", help="draw only the square in the middle of the frames")
    parser.add_argument("--blocks", type=at_least(0), nargs="+", metavar="N", help="draw only these blocks")
    add_frame_arguments(parser)
    parser.add_argument("--pairs", type=at_least(1), metavar="P", help="draw at most this many pairs")
    parser.add_argument(
        "--scale",
        choices=("block", "shared"),
        default="block",
        help=f"the colour scale of each quantity in a picture: of each block, or shared by all of them {DEFAULT}",
    )
    parser.add_argument("--dpi", type=at_least(30), default=150, metavar="N", help=f"dots per inch of a PNG {DEFAULT}")
    parser.add_argument(
        "--compare-alignment",
        type=Path,
        metavar="FILE",
        help="draw the flow with and without aligning encoders, from a file written by amflow_models.save_trained",
    )
    return parser


def run(
    video: Path,
    output: Path,
    *,
    model: str = OFFLINE_MODEL,
    weights: str | None = None,
    size: int = 224,
    crop: bool = False,
    blocks: Sequence[int] | None = None,
    every: int = 2,
    start: int = 0,
    pairs: int | None = None,
    alignment: Path | None = None,
    shared_scale: bool = False,
    dpi: int = 150,
) -> int:
    """Draws the pairs of neighbouring frames of a video, with only two frames in memory at a time.

    Args:
        video: any file that FFmpeg reads, or a folder of frames.
        output: a folder for one PNG per pair, created if it does not exist; a picture of the first pair, if it ends in
            .png, .svg or .pdf; or an overlay video, if it ends in .mp4.
        model: name of a plain vision transformer of timm.
        weights: ``"hub"`` (timm's pretrained weights), ``"offline"`` (only for DINOv2 ViT-S/14) or a file; None is as
            in `choose_weights`.
        size: shorter side of the model's input in pixels, a multiple of the patch size. The longer side is the multiple
            that comes nearest to the aspect of the frames.
        crop: the input is a square, the middle of the frames.
        blocks: indices of the blocks to draw, from 0; None draws all.
        every: step between the frames taken, at least 1.
        start: index of the first frame taken, from 0.
        pairs: the largest number of pairs to draw; None draws all.
        alignment: a file of trained aligning encoders. The flow is drawn with and without them, in the blocks that have
            an encoder, of which `blocks` may select some. The encoders run on the tokens of the model without the
            adapters that were trained beside them.
        shared_scale: in pictures, one colour scale for all blocks; otherwise each block has its own.
        dpi: dots per inch of a PNG.

    Returns:
        The number of pairs drawn.

    Raises:
        CommandError: the video, the model or the output can't be used.
        MissingPackageError: a package of the demo extra is missing; the message says how to install it.
    """
    kind = _kind(output, video)
    if kind in FORMATS:
        if pairs not in (None, 1):
            raise CommandError(f"--pairs {pairs}: {output} is a picture of one pair; expected a folder or an .mp4 file")
        pairs = 1
    with needs_extra("demo"):
        import matplotlib  # noqa: F401 -- reports a missing package before the work, not after it
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    clip = _probe(video, every, start)
    outline = check_model(model, size)
    if blocks is not None and not all(0 <= block < outline.depth for block in blocks):
        raise CommandError(f"blocks: expected numbers from 0 to {outline.depth - 1}, got {list(blocks)}")
    sides = (size, size) if crop else input_size(clip.height, clip.width, size, outline.patch)
    vit: Any = load(model, choose_weights(model, weights), sides)
    encoders = {} if alignment is None else _load_encoders(alignment, vit)
    if blocks is not None and encoders and not set(blocks) <= set(encoders):
        raise CommandError(f"blocks: {alignment} has aligning encoders of {sorted(encoders)}, got {list(blocks)}")
    chosen = sorted(encoders) or list(range(outline.depth)) if blocks is None else sorted(set(blocks))
    if not kind:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{output}: can't be made ({error.strerror})") from error
    subject = f"{model}, {sides[1]} x {sides[0]} px, mean over heads"
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    found: list[Flows] = []
    done = 0
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("load")
        for pair in (flows if kind == ".mp4" else pictures)(vit, chosen, video, sides, every, start, encoders):
            if isinstance(pair, Flows):
                found.append(pair)
            else:
                path = output if kind else output / f"pair_{pair.numbers[0]:05d}_{pair.numbers[1]:05d}.png"
                title = f"{video.name}, frames {pair.numbers[0]} and {pair.numbers[1]}\n{subject}"
                save_figure(pair, path, title, dpi=dpi, shared=shared_scale)
            done += 1
            progress.update(task, description=f"{done} pairs of frames")
            if done == pairs:
                break
        if kind == ".mp4":
            progress.update(task, description="write the video")
            title = f"{video.name}, 1000 (flow - 1) in {subject}"
            write_flows(found, output, video, size=sides, every=every, rate=clip.frame_rate, title=title)
    return done


def _kind(output: Path, video: Path) -> str:
    """The suffix of the file `output`, or "" for a folder."""
    kind = output.suffix.lower()
    if kind in (".mp4", *FORMATS):
        check_output(output, video)
        return kind
    if output.exists() and not output.is_dir():
        raise CommandError(f"{output}: expected a folder, or a name that ends in .mp4, {', '.join(FORMATS)}")
    if kind and not output.is_dir():
        raise CommandError(f"{output}: expected a name that ends in .mp4, {', '.join(FORMATS)}, or that of a folder")
    return ""


class _Clip(NamedTuple):
    """What is known of a video before its frames are read."""

    height: int
    width: int
    frame_rate: Fraction | None


def _probe(video: Path, every: int, start: int) -> _Clip:
    """Checks that a video can be read and has a pair of frames."""
    with needs_extra("demo"):
        from amflow_models.data.video import open_video
    try:
        with open_video(video) as opened:
            if len(opened) <= start + every:
                raise CommandError(
                    f"{video}: has {len(opened)} frames, and no two of them, 1 in {every} from frame {start}"
                )
            height, width = next(iter(opened.iterate([start]))).shape[1:]
            return _Clip(height, width, opened.frame_rate)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _load_encoders(path: Path, vit: Any) -> dict[int, nn.Module]:
    """The aligning encoders of a file, by block."""
    with needs_extra("demo"):
        from amflow_models import load_aligning_encoders

    try:
        encoders: dict[int, Any] = dict(load_aligning_encoders(path))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CommandError(f"--compare-alignment: {str(error).splitlines()[0]}") from error
    for block, encoder in encoders.items():
        if block >= len(vit.blocks) or encoder.query.in_features != vit.embed_dim:
            raise CommandError(
                f"--compare-alignment: {path} is of block {block} and {encoder.query.in_features} channels; "
                f"the model has {len(vit.blocks)} blocks and {vit.embed_dim} channels"
            )
    return encoders
