"""Lists of videos and their labels, in the formats that other projects and data sets use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amflow_models.data.frames import check_naming
from amflow_models.suggestions import check_known, nearest

# fmt: off
SMARTHOME_CROSS_SUBJECT = (
    "Cook.Cleandishes", "Cook.Cleanup", "Cook.Cut", "Cook.Stir", "Cook.Usestove", "Cutbread", "Drink.Frombottle",
    "Drink.Fromcan", "Drink.Fromcup", "Drink.Fromglass", "Eat.Attable", "Eat.Snack", "Enter", "Getup", "Laydown",
    "Leave", "Makecoffee.Pourgrains", "Makecoffee.Pourwater", "Maketea.Boilwater", "Maketea.Insertteabag",
    "Pour.Frombottle", "Pour.Fromcan", "Pour.Fromkettle", "Readbook", "Sitdown", "Takepills", "Uselaptop", "Usetablet",
    "Usetelephone", "Walk", "WatchTV",
)
SMARTHOME_CROSS_VIEW = (
    "Cutbread", "Drink.Frombottle", "Drink.Fromcan", "Drink.Fromcup", "Drink.Fromglass", "Eat.Attable", "Eat.Snack",
    "Enter", "Getup", "Leave", "Pour.Frombottle", "Pour.Fromcan", "Readbook", "Sitdown", "Takepills", "Uselaptop",
    "Usetablet", "Usetelephone", "Walk",
)
# fmt: on
# The data set has clips of one more activity, which is a class of no protocol.
_SMARTHOME_ACTIVITIES = (*SMARTHOME_CROSS_SUBJECT, "Pour.Fromcup")
_SMARTHOME_CLIP = re.compile(r"(?P<activity>[A-Za-z.]+)_p(?P<person>\d+)_r\d+_v\d+_c(?P<camera>\d+)")
_TRAIN_PERSONS = {3, 4, 6, 7, 9, 12, 13, 15, 17, 19, 25}
_SMARTHOME_SPLITS: dict[str, Callable[[int, int], bool]] = {  # whether a person and a camera belong to the split
    "cross_subject/train": lambda person, camera: person in _TRAIN_PERSONS,
    "cross_subject/test": lambda person, camera: person not in _TRAIN_PERSONS,
    "cross_view1/train": lambda person, camera: camera == 1,
    "cross_view1/validation": lambda person, camera: camera == 5,
    "cross_view1/test": lambda person, camera: camera == 2,
    "cross_view2/train": lambda person, camera: camera in {1, 3, 4, 6, 7},
    "cross_view2/validation": lambda person, camera: camera == 5,
    "cross_view2/test": lambda person, camera: camera == 2,
}
SPLITS = tuple(_SMARTHOME_SPLITS)


@dataclass(frozen=True)
class Video:
    """One line of a list.

    Attributes:
        path: a video file, or a folder of frames.
        label: index of the class, from 0.
        frames: number of frames that the list gives for a folder; None for a file.
        template, start_index: names of a folder's frames, as for `FrameFolder`.
    """

    path: Path
    label: int
    frames: int | None = None
    template: str | None = None
    start_index: int | None = None


@dataclass(frozen=True)
class VideoList:
    """The videos of a list.

    Attributes:
        videos: the videos in the list's order.
        classes: class names by label; the labels as strings if the classes have no names.
        source: the file or folder that the list was read from.
        missing: paths of videos that were left out, as they do not exist.
    """

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    source: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListPaths:
    """The arguments of a reader, with all paths resolved.

    Attributes:
        path: the list, or the folder of videos.
        root: folder that relative paths in the list start from.
        classes, labels, split, template, start_index: as for `read_list`, or None.
    """

    path: Path
    root: Path
    classes: Path | None
    labels: Path | None
    split: str | None
    template: str | None
    start_index: int | None


@dataclass(frozen=True)
class ListFormat:
    """A format of lists.

    Attributes:
        arguments: the optional arguments of `read_list` that the format takes.
        read: reads a list.
        names_classes: whether the format itself names the classes, so that their number is known.
        required: {argument: meaning} of the arguments that must be given.
        splits: where one folder holds all splits: the values of `split`, ``"protocol/part"``. Otherwise each split is
            a list of its own.
    """

    arguments: tuple[str, ...]
    read: Callable[[ListPaths], VideoList]
    names_classes: bool = False
    required: dict[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ()


def read_list(
    kind: str,
    path: str | Path,
    *,
    root: str | Path | None = None,
    classes: str | Path | None = None,
    labels: str | Path | None = None,
    split: str | None = None,
    template: str | None = None,
    start_index: int | None = None,
) -> VideoList:
    """Reads a list of videos. Videos are neither looked for nor opened: `check_lists` does that.

    Args:
        kind: one of `KINDS`.

            - ``"mmaction"``, MMAction2's list of videos: ``path label`` in each line.
            - ``"mmaction_frames"``, its list of folders of frames: ``folder total_frames label``.
            - ``"pyslowfast"``, PySlowFast's CSV: ``path label`` or ``path,label``; the path may be in double quotes.
            - ``"ssv2"``, a split of Something-Something v2 in JSON, with `labels`. Videos are ``root/<id>.webm``.
            - ``"smarthome"``, the folder of Toyota Smarthome's clips, which are named like
              ``Cook.Cut_p03_r00_v02_c03.mp4``: activity, person, repetition, video, camera; with `split`.
        path: the list; for "smarthome" the folder.
        root: folder that all relative paths start from: those in the list, `path`, `classes` and `labels`. None: paths
            in the list start from the list's own folder, the others from the working directory.
        classes: a file with one class name in each line, in the order of the labels. Not for "ssv2" and "smarthome".
        labels: only for "ssv2": the JSON file that numbers the templates.
        split: only for "smarthome": one of `SPLITS`. ``"cross_subject"`` has 31 classes, tests on the persons that it
            does not train on, and has no validation list; ``"cross_view1"`` trains on camera 1 and ``"cross_view2"`` on
            cameras 1, 3, 4, 6 and 7; both have 19 classes, validate on camera 5 and test on camera 2. Clips of other
            activities are left out.
        template: names of the frames in folders, such as ``"img_{:05}.jpg"``. None: a folder must have pictures of one
            series only. Not for "ssv2" and "smarthome".
        start_index: with a template, the number of a folder's first frame. None: the smallest one that the folder has.

    Raises:
        ValueError: an unknown kind or split (the nearest known one is named), an argument that is missing, out of range
            or that the kind does not take, a file that can't be read, or a wrong line or entry of a file, which is
            named.
    """
    list_format = format_of(kind)
    given = {
        "root": root, "classes": classes, "labels": labels, "split": split, "template": template,
        "start_index": start_index,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and name not in list_format.arguments:
            raise ValueError(f"{name}: expected none for a list of kind {kind!r}, got {str(value)!r}")
    if list_format.splits:
        check_known("split", split, list_format.splits)
    for name, meaning in list_format.required.items():
        if given[name] is None:
            raise ValueError(f"{name}: expected {meaning}, got None")
    check_naming(template, start_index)
    start = Path() if root is None else Path(root)
    path = start / path
    return list_format.read(
        ListPaths(
            path,
            root=path.parent if root is None else start,
            classes=None if classes is None else start / classes,
            labels=None if labels is None else start / labels,
            split=split,
            template=template,
            start_index=start_index,
        )
    )


def format_of(kind: str) -> ListFormat:
    """The format of a kind of lists. Raises ValueError, which names the nearest known kind, if there is none."""
    check_known("kind", kind, KINDS)
    return FORMATS[kind]


def _line_reader(
    expected: str, pattern: str, strip: str | None = None, quote: str = ""
) -> Callable[[ListPaths], VideoList]:
    """A reader of files with a video in each line.

    Args:
        expected: the fields of a line, for messages.
        pattern: a regular expression of the whole line, with the groups path, label and perhaps frames. A path may
            contain spaces, so it is everything before the other fields.
        strip: characters that are stripped from the end of the path; None strips white space.
        quote: a character that may enclose the path.
    """
    compiled = re.compile(pattern)

    def read(given: ListPaths) -> VideoList:
        videos = []
        for number, line in enumerate(_text(given.path).split("\n"), 1):
            line = line.strip()
            if not line:
                continue
            where = f"{given.path}:{number}"
            match = compiled.fullmatch(line)
            if not match:
                raise ValueError(f"{where}: expected '{expected}', got {line!r}")
            fields = match.groupdict()
            name = fields["path"].rstrip(strip)
            label = _parse_int(fields["label"], f"{where}: label")
            frames = _parse_int(fields["frames"], f"{where}: total_frames") if "frames" in fields else None
            if frames is not None and frames < 1:
                raise ValueError(f"{where}: total_frames: expected at least 1, got {frames}")
            path = given.root / (name.strip(quote) if quote else name)
            videos.append(Video(path, label, frames, given.template, given.start_index))
        highest = max((video.label for video in videos), default=-1)
        names = tuple(map(str, range(highest + 1))) if given.classes is None else read_classes(given.classes)
        return VideoList(tuple(videos), names, str(given.path))

    return read


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a file with one in each line. Raises ValueError for an empty line between them."""
    names = [line.strip() for line in _text(path).rstrip().split("\n")]
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"{path}:{number}: expected the name of class {number - 1}, got an empty line")
    return tuple(names)


def _read_ssv2(given: ListPaths) -> VideoList:
    path, labels = given.path, given.labels
    assert labels is not None  # it is required
    numbers: Any = _json(labels)
    if not isinstance(numbers, dict) or not numbers:
        raise ValueError(f"{labels}: expected templates and their numbers, got {type(numbers).__name__}")
    numbers = {name: _parse_int(str(label), f"{labels}: {name!r}") for name, label in numbers.items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ValueError(f"{labels}: expected each number from 0 to {len(numbers) - 1} once")
    entries: Any = _json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of videos, got {type(entries).__name__}")
    videos = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f"{where}: expected an object with 'id' and 'template', got {entry!r}")
        where += f", id {entry['id']}"
        if "template" not in entry:
            raise ValueError(f"{where}: expected a 'template', got none: the test split comes without labels")
        template = str(entry["template"]).replace("[", "").replace("]", "")
        if template not in numbers:
            raise ValueError(f"{where}: expected a template of {labels}, got {template!r}{nearest(template, numbers)}")
        videos.append(Video(given.root / f"{entry['id']}.webm", numbers[template]))
    return VideoList(tuple(videos), tuple(sorted(numbers, key=numbers.__getitem__)), str(path))


def _read_smarthome(given: ListPaths) -> VideoList:
    folder, split = given.path, str(given.split)
    names = SMARTHOME_CROSS_SUBJECT if split.startswith("cross_subject") else SMARTHOME_CROSS_VIEW
    numbers = {name: label for label, name in enumerate(names)}
    files = sorted(folder.glob("*.mp4"))
    if not files:
        raise ValueError(f"{folder}: expected a folder with clips like Cook.Cut_p03_r00_v02_c03.mp4, found none")
    videos = []
    for file in files:
        match = _SMARTHOME_CLIP.fullmatch(file.stem)
        if not match:
            raise ValueError(f"{file}: expected a name like Cook.Cut_p03_r00_v02_c03.mp4")
        activity = match["activity"]
        check_known(f"{file}: activity", activity, _SMARTHOME_ACTIVITIES)
        if activity in numbers and _SMARTHOME_SPLITS[split](int(match["person"]), int(match["camera"])):
            videos.append(Video(file, numbers[activity]))
    return VideoList(tuple(videos), names, f"{folder} ({split})")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error.reason} at byte {error.start})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON ({error.msg})") from error


def _parse_int(text: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{where}: expected a whole number, got {text!r}")
    return int(text)


_LINES = ("root", "classes", "template", "start_index")
FORMATS = {
    "mmaction": ListFormat(_LINES, _line_reader("path label", r"(?P<path>.+)\s(?P<label>\S+)")),
    "mmaction_frames": ListFormat(
        _LINES,
        _line_reader("folder total_frames label", r"(?P<path>.+)\s(?P<frames>\S+)\s+(?P<label>\S+)"),
    ),
    "pyslowfast": ListFormat(
        _LINES,
        _line_reader("path label", r"(?P<path>.+)[\s,](?P<label>[^\s,]+)", strip=", \t", quote='"'),
    ),
    "ssv2": ListFormat(
        ("root", "labels"),
        _read_ssv2,
        names_classes=True,
        required={"labels": "the JSON file that numbers the templates"},
    ),
    "smarthome": ListFormat(("root", "split"), _read_smarthome, names_classes=True, splits=SPLITS),
}
KINDS = tuple(FORMATS)
