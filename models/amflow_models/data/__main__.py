"""``python -m amflow_models.data check``: what is wrong with lists of videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from amflow_models.data.checks import check_lists
from amflow_models.data.lists import ARGUMENTS, KINDS, SPLITS, read_list

_PROTOCOLS = tuple(dict.fromkeys(split.partition("/")[0] for split in SPLITS))
_CHECKS = """\
Checks lists, each of its own and together: labels out of range or counted from 1, classes without a video (an error
in a list with 'train' in its name, a warning in others), files that are missing or can't be read, videos with several
labels or in several lists.
"""
_EPILOG = """\
examples:
  amflow data check train.txt val.txt --kind mmaction --num-classes 400 --root /data/k400
  amflow data check something-something-v2-train.json something-something-v2-validation.json \\
      --kind ssv2 --labels something-something-v2-labels.json --root /data/ssv2/20bn-something-something-v2
  amflow data check /data/smarthome/mp4 --kind smarthome --split cross_subject

exit status: 0 if all is well or there are warnings alone, 1 if there are problems, 2 for wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for path in options.lists:
        if not path.exists():
            parser.error(f"there is no {path}")
    for name in ("root", "classes", "labels", "split"):
        if getattr(options, name) is not None and name not in ARGUMENTS[options.kind]:
            parser.error(f"--{name}: --kind {options.kind} has no use for it")
    if options.kind == "smarthome" and (options.split is None or len(options.lists) > 1):
        parser.error("--kind smarthome: expected one folder, and --split")
    if options.kind == "ssv2" and options.labels is None:
        parser.error("--kind ssv2: expected --labels, the JSON file that numbers the templates")
    named = options.classes or options.kind in ("ssv2", "smarthome")
    if options.num_classes is None and not named:
        parser.error("expected --num-classes, or --classes with their names")
    here = Path.cwd()  # what is named on the command line starts from here, and what is in the lists from --root
    own = {"root": options.root, "classes": options.classes, "labels": options.labels}
    own = {name: path and here / path for name, path in own.items()}
    try:
        if options.kind == "smarthome":
            splits = [split for split in SPLITS if split.startswith(f"{options.split}/")]
            lists = {split: read_list("smarthome", here / options.lists[0], split=split) for split in splits}
        else:
            unique = len({path.name for path in options.lists}) == len(options.lists)
            names = [path.name if unique else str(path) for path in options.lists]
            read = [read_list(options.kind, here / path, **own) for path in options.lists]
            lists = dict(zip(names, read, strict=True))
        num_classes = options.num_classes
        if num_classes is None:
            num_classes = len(next(iter(lists.values())).classes)
        report = check_lists(lists, num_classes, open_videos=not options.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(report)
    return int(any(not problem.warning for problem in report.problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "amflow data",
        description="Looks at lists of videos before a model is trained on them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="labels, files, classes, and videos that lists share",
        description=_CHECKS,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="list files; for smarthome its folder")
    check.add_argument("--kind", required=True, choices=KINDS, help="format of the lists")
    check.add_argument("--num-classes", type=int, metavar="N", help="of the model; default: as many as have names")
    check.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that paths in lists start from; default: the list's own"
    )
    check.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one in each line")
    check.add_argument("--labels", type=Path, metavar="FILE", help="of ssv2: the JSON file that numbers templates")
    check.add_argument("--split", choices=_PROTOCOLS, help="of smarthome: all lists of a protocol are checked")
    check.add_argument("--quick", action="store_true", help="look whether files are there, and open none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
