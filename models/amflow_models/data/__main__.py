"""``python -m amflow_models.data check``: finds problems in lists of videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from amflow_models.data.checks import check_lists
from amflow_models.data.formats import ListFormat
from amflow_models.data.lists import FORMATS, KINDS, read_list
from amflow_models.data.videos import VideoList

_PROTOCOLS = tuple(
    dict.fromkeys(split.partition("/")[0] for list_format in FORMATS.values() for split in list_format.splits)
)
_CHECKS = """\
Checks each list and all of them together: labels out of range or counted from 1, classes without a video (an error in
a list with 'train' in its name, a warning in others), files that are missing or can't be read, folders of frames
with fewer or more frames than a list says, videos with several labels or in several lists.
"""
_EPILOG = """\
examples:
  amflow data check train.txt val.txt --kind mmaction --num-classes 400 --root /data/k400
  amflow data check train.txt --kind mmaction_frames --num-classes 174 --template 'img_{:05}.jpg' --root /data/frames
  amflow data check something-something-v2-train.json something-something-v2-validation.json \\
      --kind ssv2 --labels something-something-v2-labels.json --root /data/ssv2/20bn-something-something-v2
  amflow data check /data/smarthome/mp4 --kind smarthome --split cross_subject

exit status: 0 if there are no problems or only warnings, 1 if there are problems, 2 for wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if there are no problems or only warnings, 1 if there are problems. Wrong usage exits with 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    list_format = FORMATS[options.kind]
    for path in options.lists:
        if not path.exists() and not list_format.patterns:
            parser.error(f"there is no {path}")
    message = _wrong_usage(options, list_format)
    if message:
        parser.error(message)
    try:
        lists = _read_lists(options, list_format)
        num_classes = options.num_classes
        if num_classes is None:
            num_classes = len(next(iter(lists.values())).classes)
        report = check_lists(lists, num_classes, open_videos=not options.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(report)
    return int(any(not problem.warning for problem in report.problems))


def _wrong_usage(options: argparse.Namespace, list_format: ListFormat) -> str | None:
    """The first argument that is missing or does not fit the kind of list, as an error message."""
    for name in ("root", "classes", "labels", "split", "template", "start_index"):
        if getattr(options, name) is not None and name not in list_format.arguments:
            return f"--{name.replace('_', '-')}: --kind {options.kind} has no use for it"
    if list_format.splits and (options.split is None or len(options.lists) > 1):
        return f"--kind {options.kind}: expected one folder, and --split"
    protocols = {split.partition("/")[0] for split in list_format.splits}
    if protocols and options.split not in protocols:
        return f"--split: expected one of {', '.join(sorted(protocols))} for --kind {options.kind}, got {options.split}"
    for name, meaning in list_format.required.items():
        if getattr(options, name) is None:
            return f"--kind {options.kind}: expected --{name}, {meaning}"
    if options.num_classes is None and not (options.classes or list_format.names_classes):
        return "expected --num-classes, or --classes with their names"
    return None


def _read_lists(options: argparse.Namespace, list_format: ListFormat) -> dict[str, VideoList]:
    """The lists by name: by file name, by path if two files share a name, or by split of the one folder."""
    here = Path.cwd()  # paths on the command line start from here, those inside lists from --root
    if list_format.splits:
        splits = [split for split in list_format.splits if split.startswith(f"{options.split}/")]
        root = options.root and here / options.root
        return {split: read_list(options.kind, here / options.lists[0], root=root, split=split) for split in splits}
    given = {"root": options.root, "classes": options.classes, "labels": options.labels}
    given = {name: path and here / path for name, path in given.items()}
    naming = {"template": options.template, "start_index": options.start_index}
    unique = len({path.name for path in options.lists}) == len(options.lists)
    names = [path.name if unique else str(path) for path in options.lists]
    lists = [read_list(options.kind, here / path, **given, **naming) for path in options.lists]
    return dict(zip(names, lists, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "amflow data",
        description="Tools for lists of videos.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="find problems in lists: labels, files, classes, shared videos",
        description=_CHECKS,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "lists", nargs="+", type=Path, metavar="LIST", help="list files; for smarthome and hmdb51 the folder"
    )
    check.add_argument("--kind", required=True, choices=KINDS, help="format of the lists")
    check.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="number of classes of the model; default: the number of class names",
    )
    check.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that paths in lists start from; default: the list's own folder"
    )
    check.add_argument("--classes", type=Path, metavar="FILE", help="file with one class name in each line")
    check.add_argument(
        "--labels", type=Path, metavar="FILE", help="for ssv2 and ucf101: the file that numbers the classes"
    )
    check.add_argument("--split", choices=_PROTOCOLS, help="for smarthome and hmdb51: check all splits of a protocol")
    check.add_argument(
        "--template", metavar="NAME", help="names of the frames in folders that hold other pictures, too: img_{:05}.jpg"
    )
    check.add_argument(
        "--start-index", type=int, metavar="N", help="with --template: number of the first frame; default: the smallest"
    )
    check.add_argument("--quick", action="store_true", help="only check that files exist, without opening them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
