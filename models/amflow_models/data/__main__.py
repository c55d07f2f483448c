"""``python -m amflow_models.data list`` makes lists of videos, ``check`` finds problems in them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from amflow_models.data.checks import Report, check_lists
from amflow_models.data.formats import ListFormat, read_classes
from amflow_models.data.lists import FORMATS, KINDS, read_list
from amflow_models.data.making import list_folder, split_videos, write_classes, write_list
from amflow_models.data.videos import VideoList
from amflow_models.files import write_text

_PROTOCOLS = tuple(
    dict.fromkeys(split.partition("/")[0] for list_format in FORMATS.values() for split in list_format.splits)
)
_PARTS = ("validation.txt", "test.txt")
_CHECKS = """\
Checks each list and all of them together: labels out of range or counted from 1, classes without a video (an error in
a list with 'train' in its name, a warning in others), files that are missing or can't be read, folders of frames
with fewer or more frames than a list says, videos with several labels or in several lists.
"""
_LIST = """\
Lists the videos of FOLDER, which holds a folder for each class: files that are videos by their suffixes, and folders of
pictures, anywhere below. The names of the classes are written beside the list, to classes.txt; lists beside each other
have the same classes.
"""
_LIST_EPILOG = """\
examples:
  amflow data list videos -o train.txt --split 0.2
  amflow data list k400/train -o train.txt && amflow data list k400/val -o validation.txt --classes classes.txt
"""
_EPILOG = """\
examples:
  amflow data check train.txt val.txt --kind mmaction --num-classes 400 --root /data/k400
  amflow data check train.txt --kind mmaction_frames --num-classes 174 --template 'img_{:05}.jpg' --root /data/frames
  amflow data check something-something-v2-train.json something-something-v2-validation.json \\
      --kind ssv2 --labels something-something-v2-labels.json --root /data/ssv2/20bn-something-something-v2
  amflow data check /data/smarthome/mp4 --kind smarthome --split cross_subject
  amflow data check train.csv val.csv --kind kinetics --root /data/k400/videos
  amflow data check splits --kind hmdb51 --split split1 --root /data/hmdb51
  amflow data check '/data/shards/train-{000..127}.tar' --kind tar --num-classes 400

exit status: 0 if there are no problems or only warnings, 1 if there are problems, 2 for wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if there are no problems or only warnings, 1 if there are problems. Wrong usage exits with 2.
    """
    parser, commands = _parser()
    options = parser.parse_args(arguments)
    command = options.command
    try:
        message = _list_usage(options) if command == "list" else _check_usage(options)
        if message:
            commands[command].error(message)
        return _list(options) if command == "list" else _check(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _list(options: argparse.Namespace) -> int:
    folder, target = options.folder, options.output
    given = None if options.classes is None else read_classes(options.classes)
    names = target.with_name("classes.txt")
    found = list_folder(folder, given)
    if names.exists() and read_classes(names) != found.classes:
        raise ValueError(
            f"{names}: names other classes than {folder} has; pass --classes {names} to number the videos by it, or "
            "write the lists to another folder"
        )
    parts = split_videos(found.videos, options.split or (), folder, options.seed)
    paths = [target, *(target.with_name(name) for name in _PARTS)][: len(parts)]
    if not names.exists():
        write_classes(names, found.classes)
    table = Table("list", "videos", "classes")
    for path, videos in zip(paths, parts, strict=True):
        write_list(path, videos)
        table.add_row(str(path), str(len(videos)), str(len({video.label for video in videos})))
    Console().print(table)
    if found.others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(found.others.items()))
        print(f"left out, as no videos: {kinds}", file=sys.stderr)
    words = " ".join(shlex.quote(str(path)) for path in paths)
    print(f"next: amflow data check {words} --kind mmaction --classes {shlex.quote(str(names))}")
    return 0


def _list_usage(options: argparse.Namespace) -> str | None:
    shares = options.split or ()
    if len(shares) > len(_PARTS):
        return f"--split: expected one share for validation and perhaps one for test, got {len(shares)}"
    if options.output.name in ("classes.txt", *_PARTS[: len(shares)]):
        return f"--output: {options.output.name} is another file that is written"
    if not options.output.parent.is_dir():
        return f"--output: there is no folder {options.output.parent}"
    return None


def _check(options: argparse.Namespace) -> int:
    list_format = FORMATS[options.kind]
    lists = _read_lists(options, list_format)
    num_classes = options.num_classes
    if num_classes is None:
        num_classes = len(next(iter(lists.values())).classes)
    report = check_lists(
        lists,
        num_classes,
        open_videos=not options.quick,
        subset=options.subset,
        several_labels=options.multi_label,
    )
    Console().print(report.table(examples=None) if options.all else report)
    if options.write_clean is not None:
        _write_clean(options, report)
    return int(any(not problem.warning for problem in report.problems))


def _write_clean(options: argparse.Namespace, report: Report) -> None:
    """Writes the good videos of the one list, and a file of the bad ones with reasons."""
    ((name, listed),) = report.lists.items()
    bad, clean = report.bad[name], options.write_clean
    good = [video for index, video in enumerate(listed.videos) if index not in bad]
    if not good:
        raise ValueError(f"--write-clean: {name} has no good videos")
    kind = write_list(clean, good, options.root)
    rejected = clean.with_name(f"{clean.stem}.bad{clean.suffix}")
    lines = (f"{listed.videos[index].path}\t{'; '.join(reasons)}\n" for index, reasons in bad.items())
    write_text(rejected, "".join(lines))
    print(f"{clean}: {len(good)} good videos, kind {kind}\n{rejected}: {len(bad)} bad videos and why")
    if options.classes is None and FORMATS[options.kind].names_classes:
        names = clean.with_name(f"{clean.stem}.classes{clean.suffix}")
        write_classes(names, listed.classes)
        print(f"{names}: the names of the classes, for data.classes")


def _check_usage(options: argparse.Namespace) -> str | None:
    """The first argument that is missing or does not fit the kind of list, as an error message."""
    list_format = FORMATS[options.kind]
    for path in options.lists:
        if not path.exists() and not list_format.patterns:
            return f"there is no {path}"
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
    if options.write_clean is not None and (len(options.lists) > 1 or list_format.splits):
        return "--write-clean: expected one list to clean"
    if options.write_clean is not None and list_format.patterns:
        return f"--write-clean: --kind {options.kind} has no lines to choose from"
    if options.write_clean is not None and not options.write_clean.parent.is_dir():
        return f"--write-clean: there is no folder {options.write_clean.parent}"
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    look: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("amflow data", description="Tools for lists of videos.", epilog=_EPILOG, **look)
    commands = parser.add_subparsers(required=True, metavar="{list,check}", dest="command")
    make = commands.add_parser(
        "list", help="make lists of a folder of videos", description=_LIST, epilog=_LIST_EPILOG, **look
    )
    make.add_argument("folder", type=Path, metavar="FOLDER", help="holds a folder of videos for each class")
    make.add_argument("-o", "--output", type=Path, required=True, metavar="LIST", help="the list to write")
    make.add_argument(
        "--split",
        type=_share,
        nargs="+",
        metavar="SHARE",
        help="put this share of each class into validation.txt beside LIST, and a second share into test.txt; a split "
        "is by file, so keep clips of one recording in one file or make their lists apart",
    )
    make.add_argument("--seed", type=int, default=0, metavar="N", help="chooses another split (default: 0)")
    make.add_argument("--classes", type=Path, metavar="FILE", help="number the classes by this file of names")
    check = commands.add_parser(
        "check",
        help="find problems in lists: labels, files, classes, shared videos",
        description=_CHECKS,
        epilog=_EPILOG,
        **look,
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
    check.add_argument("--subset", action="store_true", help="training lists may lack classes (data.subset)")
    check.add_argument("--multi-label", action="store_true", help="videos may have several labels (data.multi_label)")
    check.add_argument("--all", action="store_true", help="print every case of a problem, not only the first few")
    check.add_argument(
        "--write-clean",
        type=Path,
        metavar="LIST",
        help="write the list without its bad videos to LIST, and these with reasons to a file LIST.bad beside it",
    )
    return parser, {"list": make, "check": check}


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return share


if __name__ == "__main__":
    sys.exit(main())
