"""Lists of videos and their labels, in the formats that other projects and data sets use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amflow_models.errors import check_known, nearest

ARGUMENTS = {  # of `read_list`, that a kind has a use for
    "mmaction": ("root", "classes"),
    "mmaction_frames": ("root", "classes"),
    "pyslowfast": ("root", "classes"),
    "ssv2": ("root", "labels"),
    "smarthome": ("root", "split"),
}
KINDS = tuple(ARGUMENTS)

# A path may hold spaces, so all that comes before the last fields is the path.
_LINES = {
    "mmaction": ("path label", re.compile(r"(?P<path>.+)\s(?P<label>\S+)")),
    "mmaction_frames": ("folder total_frames label", re.compile(r"(?P<path>.+)\s(?P<frames>\S+)\s+(?P<label>\S+)")),
    "pyslowfast": ("path label", re.compile(r"(?P<path>.+)[\s,](?P<label>[^\s,]+)")),
}

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
# There are clips of one more activity, which no protocol has as a class.
_SMARTHOME_ACTIVITIES = (*SMARTHOME_CROSS_SUBJECT, "Pour.Fromcup")
_SMARTHOME_CLIP = re.compile(r"(?P<activity>[A-Za-z.]+)_p(?P<person>\d+)_r\d+_v\d+_c(?P<camera>\d+)")
_TRAIN_PERSONS = {3, 4, 6, 7, 9, 12, 13, 15, 17, 19, 25}
_SMARTHOME_SPLITS: dict[str, Callable[[int, int], bool]] = {  # of person and camera
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
        label: number of the class, from 0.
        frames: of a folder: how many its list says.
    """

    path: Path
    label: int
    frames: int | None = None


@dataclass(frozen=True)
class VideoList:
    """The videos of a list.

    Attributes:
        videos: in the list's order.
        classes: their names by number; the numbers as strings where nothing names them.
        source: where it was read from.
    """

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    source: str


def read_list(
    kind: str,
    path: str | Path,
    *,
    root: str | Path | None = None,
    classes: str | Path | None = None,
    labels: str | Path | None = None,
    split: str | None = None,
) -> VideoList:
    """Reads a list of videos. No video is looked for or opened: `check_lists` does that.

    Args:
        kind: one of `KINDS`.

            - ``"mmaction"``, MMAction2's list of videos: ``path label`` in each line.
            - ``"mmaction_frames"``, its list of folders of frames: ``folder total_frames label``.
            - ``"pyslowfast"``, PySlowFast's CSV: ``path label`` or ``path,label``; the path may be in double quotes.
            - ``"ssv2"``, a split of Something-Something v2 in JSON, with `labels`. Videos are ``root/<id>.webm``.
            - ``"smarthome"``, the folder of Toyota Smarthome's clips, which are named like
              ``Cook.Cut_p03_r00_v02_c03.mp4``: activity, person, repetition, video, camera; with `split`.
        path: the list; for "smarthome" the folder.
        root: folder that all relative paths start from: those in the list, `path`, `classes` and `labels`. None: those
            in the list start from the list's own folder.
        classes: a file with one class name in each line, in the order of the labels. Not for "ssv2" and "smarthome".
        labels: of "ssv2": the JSON file that numbers the templates.
        split: of "smarthome": one of `SPLITS`. ``"cross_subject"`` has 31 classes, tests on the persons that it does
            not train on, and has no validation list; ``"cross_view1"`` trains on camera 1 and ``"cross_view2"`` on
            cameras 1, 3, 4, 6 and 7, both have 19 classes, validate on camera 5 and test on camera 2. Clips of other
            activities are left out.

    Raises:
        ValueError: an unknown kind or split (the nearest known one is named), an argument that the kind does not take
            or that is missing, a file that can't be read; what does not fit in a file, with its line or entry.
    """
    check_known("kind", kind, KINDS)
    given = {"root": root, "classes": classes, "labels": labels, "split": split}
    for name, value in given.items():
        if value is not None and name not in ARGUMENTS[kind]:
            raise ValueError(f"{name}: expected none for a list of kind {kind!r}, got {str(value)!r}")
    start = Path() if root is None else Path(root)
    path = start / path
    if kind == "smarthome":
        check_known("split", split, SPLITS)
        return _read_smarthome(path, str(split))
    root = path.parent if root is None else start
    if kind == "ssv2":
        if labels is None:
            raise ValueError("labels: expected the JSON file that numbers the templates, got None")
        return _read_ssv2(path, root, start / labels)
    return _read_lines(kind, path, root, None if classes is None else start / classes)


def _read_lines(kind: str, path: Path, root: Path, classes: Path | None) -> VideoList:
    expected, pattern = _LINES[kind]
    videos = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        found = pattern.fullmatch(line)
        if not found:
            raise ValueError(f"{path}:{number}: expected '{expected}', got {line!r}")
        fields = found.groupdict()
        name = fields["path"].rstrip(", \t").strip('"') if kind == "pyslowfast" else fields["path"].rstrip()
        label = _whole(fields["label"], f"{path}:{number}: label")
        frames = _whole(fields["frames"], f"{path}:{number}: total_frames") if "frames" in fields else None
        if frames is not None and frames < 1:
            raise ValueError(f"{path}:{number}: total_frames: expected at least 1, got {frames}")
        videos.append(Video(root / name, label, frames))
    highest = max((video.label for video in videos), default=-1)
    names = tuple(map(str, range(highest + 1))) if classes is None else _read_classes(classes)
    return VideoList(tuple(videos), names, str(path))


def _read_classes(path: Path) -> tuple[str, ...]:
    names = [line.strip() for line in _text(path).rstrip().split("\n")]
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"{path}:{number}: expected the name of class {number - 1}, got an empty line")
    return tuple(names)


def _read_ssv2(path: Path, root: Path, labels: Path) -> VideoList:
    numbers: Any = _json(labels)
    if not isinstance(numbers, dict) or not numbers:
        raise ValueError(f"{labels}: expected templates and their numbers, got {type(numbers).__name__}")
    numbers = {name: _whole(str(label), f"{labels}: {name!r}") for name, label in numbers.items()}
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
        videos.append(Video(root / f"{entry['id']}.webm", numbers[template]))
    return VideoList(tuple(videos), tuple(sorted(numbers, key=numbers.__getitem__)), str(path))


def _read_smarthome(folder: Path, split: str) -> VideoList:
    names = SMARTHOME_CROSS_SUBJECT if split.startswith("cross_subject") else SMARTHOME_CROSS_VIEW
    numbers = {name: label for label, name in enumerate(names)}
    files = sorted(folder.glob("*.mp4"))
    if not files:
        raise ValueError(f"{folder}: expected a folder with clips like Cook.Cut_p03_r00_v02_c03.mp4, found none")
    videos = []
    for file in files:
        found = _SMARTHOME_CLIP.fullmatch(file.stem)
        if not found:
            raise ValueError(f"{file}: expected a name like Cook.Cut_p03_r00_v02_c03.mp4")
        activity = found["activity"]
        check_known(f"{file}: activity", activity, _SMARTHOME_ACTIVITIES)
        if activity in numbers and _SMARTHOME_SPLITS[split](int(found["person"]), int(found["camera"])):
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


def _whole(text: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{where}: expected a whole number, got {text!r}")
    return int(text)
