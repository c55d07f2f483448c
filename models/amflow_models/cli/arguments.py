"""Arguments that subcommands share, and their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from amflow_models.cli.offline import CLIPS, clip_path

DEFAULT = "(default: %(default)s)"  # completed by argparse
VIDEO_HELP = f"a video file, a folder of frames, or a clip: {', '.join(CLIPS)}"


def add_frame_arguments(parser: argparse.ArgumentParser, start: int | None = 0, start_default: str = DEFAULT) -> None:
    """Adds ``--every`` and ``--start``, which select frames of a video.

    Args:
        parser: takes them.
        start: the default of ``--start``.
        start_default: the end of its help, which says so.
    """
    parser.add_argument("--every", type=at_least(1), default=2, metavar="K", help=f"take one frame in K {DEFAULT}")
    parser.add_argument(
        "--start", type=at_least(0), default=start, metavar="FRAME", help=f"the first frame to take {start_default}"
    )


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number not below `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def video_path(video: str) -> Path:
    """What the argument VIDEO stands for: a file or folder of that name, or else a clip of that name.

    Raises:
        CommandError: it is a clip that can't be downloaded.
    """
    path = Path(video)
    return clip_path(video) if video in CLIPS and not path.exists() else path
