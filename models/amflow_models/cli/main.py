"""The command ``amflow``: a demo on a real clip, pictures of any video, a report of what runs on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import amflow_kernels
from amflow_models.cli import demo, visualize
from amflow_models.cli.demo import DemoError
from amflow_models.cli.offline import CLIPS, clip_path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``amflow``; returns the exit status: 0, 1 for a failure (one line on stderr), 2 for wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if args.command == "doctor":
        print(_doctor())
        return 0
    try:
        video = Path(args.video)
        if args.video in CLIPS and not video.exists():
            video = clip_path(args.video)
        if args.command == "demo":
            demo.run(video, args.output, size=args.size, frames=args.frames, every=args.every, start=args.start)
        else:
            output = args.output or Path(f"amflow_{video.stem}")
            pairs = visualize.run(
                video, output, model=args.model, weights=args.weights, size=args.size, blocks=args.blocks,
                every=args.every, start=args.start, pairs=args.pairs, alignment=args.compare_alignment,
            )  # fmt: skip
            print(f"{pairs} pairs of frames: {output}")
    except (DemoError, ModuleNotFoundError) as error:  # anything else is a bug, whose traceback is wanted
        print(f"amflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("amflow: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow", description="AM flow: how attention maps change from one video frame to the next."
    )
    parser.add_argument("--version", action="version", version=f"amflow {amflow_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="AM flow of a real clip in a real DINOv2: timed, checked in float64, drawn",
        description="Runs DINOv2 ViT-S/14 over a video and computes AM flow in each of its 12 blocks. Prints times, "
        "errors against float64 and the size of the signal, and draws the flow of the two frames that differ most. "
        "Fails if an error exceeds the budget. Weights and clips come with pip install 'amflow-kernels[demo]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "video", nargs="?", default="bikes", metavar="VIDEO", help=f"a video file, or a clip: {', '.join(CLIPS)}"
    )
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("amflow_demo.png"), metavar="PNG", help="the picture to write"
    )
    demo.add_argument(
        "--size",
        type=int,
        choices=(224, 518),
        default=224,
        help="side of the square input in pixels: 257 or 1370 tokens",
    )
    demo.add_argument("--frames", type=_at_least(2), default=8, metavar="T", help="how many frames to take")
    demo.add_argument("--every", type=_at_least(1), default=2, metavar="K", help="take one frame in K")
    demo.add_argument("--start", type=_at_least(0), default=0, metavar="FRAME", help="the first frame to take")

    pictures = commands.add_parser(
        "visualize",
        help="pictures of AM flow and of what changes in the attention maps of a video",
        description="Draws, for every pair of frames and every block of a vision transformer: AM flow, how much "
        "attention to and from each patch changes, and the principal components of that change as colours. A PNG per "
        "pair, or an overlay video of the flow.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    pictures.add_argument("video", metavar="VIDEO", help=f"a video file, or a clip: {', '.join(CLIPS)}")
    pictures.add_argument(
        "-o", "--output", type=Path, default=None, metavar="OUT",
        help="a folder for PNG files (default: amflow_ and the video's name), or a video file that ends in .mp4",
    )  # fmt: skip
    pictures.add_argument("--model", default=visualize.OFFLINE_MODEL, metavar="NAME", help="a plain ViT of timm")
    pictures.add_argument(
        "--weights", default="offline", metavar="FILE|offline|hub",
        help="a file, those of DINOv2 ViT-S/14 that come with the demo extra, or timm's pretrained ones",
    )  # fmt: skip
    pictures.add_argument("--size", type=_at_least(14), default=224, metavar="PIXELS", help="side of the square input")
    pictures.add_argument("--blocks", type=_at_least(0), nargs="+", default=None, metavar="N", help="only these blocks")
    pictures.add_argument("--every", type=_at_least(1), default=2, metavar="K", help="take one frame in K")
    pictures.add_argument("--start", type=_at_least(0), default=0, metavar="FRAME", help="the first frame to take")
    pictures.add_argument("--pairs", type=_at_least(1), default=None, metavar="P", help="draw so many pairs at most")
    pictures.add_argument(
        "--compare-alignment", type=Path, default=None, metavar="FILE",
        help="draw the flow with and without aligning encoders too, those in a file of amflow_models.save_trained",
    )  # fmt: skip

    commands.add_parser(
        "doctor",
        help="versions, devices, and which kernels run here",
        description="Prints versions, devices and which kernels run here; builds the native library if it is missing.",
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def _doctor() -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    lines = [
        f"amflow_kernels {amflow_kernels.__version__}, {Path(amflow_kernels.__file__).parent}",
        f"python {platform.python_version()}, {platform.platform()}",
        f"triton {version('triton')}",
        f"timm {version('timm')}",
        *amflow_kernels.explain().lines,
        *(
            f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability "
            + ".".join(map(str, torch.cuda.get_device_capability(index)))
            for index in range(torch.cuda.device_count())
        ),
    ]
    if not torch.cuda.is_available():
        lines.append("devices: cpu only")
    return "\n".join(lines)
