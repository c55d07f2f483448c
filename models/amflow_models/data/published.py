"""Readers of data sets as they are published."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amflow_models.data.formats import (
    VIDEO_SUFFIXES,
    ListPaths,
    is_macos_file,
    parse_int,
    read_classes,
    read_json,
    read_lines,
    read_text,
)
from amflow_models.data.videos import Video, VideoList
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
_SMARTHOME_PARTS: dict[str, Callable[[int, int], bool]] = {  # whether a person and a camera belong to the split
    "cross_subject/train": lambda person, camera: person in _TRAIN_PERSONS,
    "cross_subject/test": lambda person, camera: person not in _TRAIN_PERSONS,
    "cross_view1/train": lambda person, camera: camera == 1,
    "cross_view1/validation": lambda person, camera: camera == 5,
    "cross_view1/test": lambda person, camera: camera == 2,
    "cross_view2/train": lambda person, camera: camera in {1, 3, 4, 6, 7},
    "cross_view2/validation": lambda person, camera: camera == 5,
    "cross_view2/test": lambda person, camera: camera == 2,
}
SMARTHOME_SPLITS = tuple(_SMARTHOME_PARTS)
_HMDB51_PARTS = {"train": "1", "test": "2"}  # the number that a split's files give to a video; 0: in neither part
HMDB51_SPLITS = tuple(f"split{number}/{part}" for number in (1, 2, 3) for part in _HMDB51_PARTS)
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def read_kinetics(given: ListPaths) -> VideoList:
    """Kinetics' CSV: the videos are looked for by name in all folders below `root`."""
    rows = csv.DictReader(read_text(given.path).splitlines())
    columns = rows.fieldnames or ()
    if "label" not in columns and "youtube_id" in columns:
        raise ValueError(f"{given.path}: expected a column 'label', got none: test splits may come without labels")
    if not set(_KINETICS_COLUMNS) <= set(columns):
        raise ValueError(f"{given.path}: expected the columns {','.join(_KINETICS_COLUMNS)}, got {','.join(columns)}")
    clips = []
    for row in rows:
        where = f"{given.path}:{rows.line_num}"
        if None in row.values() or not row["label"]:
            raise ValueError(f"{where}: expected {','.join(columns)}, got {','.join(filter(None, row.values()))!r}")
        seconds = [parse_int(row[name], f"{where}: {name}") for name in _KINETICS_COLUMNS[2:]]
        clips.append((where, row["label"], row["youtube_id"], "{:06}_{:06}".format(*seconds)))
    labels = {label for _, label, *_ in clips}
    names = tuple(sorted(labels)) if given.classes is None else read_classes(given.classes)
    numbers = {name: label for label, name in enumerate(names)}
    files, ignored = _files_by_name(given.root)
    videos = []
    for where, label, identifier, times in clips:
        check_known(f"{where}: label", label, numbers)
        found = files.get(f"{identifier}_{times}") or files.get(identifier) or []
        if len(found) > 1:
            raise ValueError(f"{where}: expected one file of this video below {given.root}, found {_several(found)}")
        file = found[0] if found else given.root / label / f"{identifier}_{times}.mp4"
        videos.append(Video(file, numbers[label]))
    return VideoList(videos, names, str(given.path), ignored)


def _files_by_name(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The videos below a folder by their names without suffix, and the number of macOS's files among them."""
    if not folder.is_dir():
        raise ValueError(f"root: expected the folder of the videos, there is no {folder}")
    files: dict[str, list[Path]] = {}
    ignored = 0
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if is_macos_file(name):
                ignored += 1
            elif suffix.lower() in VIDEO_SUFFIXES:
                files.setdefault(stem, []).append(Path(parent, name))
    return files, ignored


def _several(files: list[Path]) -> str:
    return ", ".join(map(str, sorted(files)))


def read_ucf101(given: ListPaths) -> VideoList:
    """UCF-101's trainlist (``Class/v.avi 1``) or testlist (``Class/v.avi``); classInd.txt has ``1 Class``."""
    assert given.labels is not None  # it is required
    names: list[str] = []
    for where, line in read_lines(given.labels):
        number, _, name = line.partition(" ")
        if parse_int(number, where) != len(names) + 1 or not name:
            raise ValueError(f"{where}: expected '{len(names) + 1} name', got {line!r}")
        names.append(name.strip())
    numbers = {name: label for label, name in enumerate(names)}
    videos: list[Video] = []
    ignored = 0
    for where, line in read_lines(given.path):
        name, _, number = line.partition(" ")
        activity, _, file = name.partition("/")
        if not file:
            raise ValueError(f"{where}: expected 'class/video' or 'class/video number', got {line!r}")
        check_known(f"{where}: class", activity, numbers)
        label = numbers[activity]
        if number and parse_int(number.strip(), f"{where}: number") != label + 1:
            raise ValueError(f"{where}: expected the number {label + 1} of {given.labels}, got {number.strip()}")
        if is_macos_file(file):
            ignored += 1
        else:
            videos.append(Video(given.root / name, label))
    return VideoList(videos, tuple(names), str(given.path), ignored)


def read_hmdb51(given: ListPaths) -> VideoList:
    """The part of a split of HMDB-51, from a file for each class with ``video.avi 1`` in its lines."""
    split, _, part = str(given.split).partition("/")
    files = sorted(given.path.glob(f"*_test_{split}.txt"))
    ignored = sum(is_macos_file(file.name) for file in files)
    files = [file for file in files if not is_macos_file(file.name)]
    if not files:
        raise ValueError(f"{given.path}: expected a folder with files like brush_hair_test_{split}.txt, found none")
    names = tuple(file.name.removesuffix(f"_test_{split}.txt") for file in files)
    videos = []
    for label, (name, file) in enumerate(zip(names, files, strict=True)):
        for where, line in read_lines(file):
            video, _, number = line.rpartition(" ")
            if not video or number not in ("0", "1", "2"):
                raise ValueError(f"{where}: expected 'video 0', 'video 1' or 'video 2', got {line!r}")
            if number == _HMDB51_PARTS[part]:
                videos.append(Video(given.root / name / video.strip(), label))
    return VideoList(videos, names, f"{given.path} ({given.split})", ignored)


def read_ssv2(given: ListPaths) -> VideoList:
    """Something-Something v2's JSON: the videos are webm or mp4 files, or folders of frames."""
    path, labels = given.path, given.labels
    assert labels is not None  # it is required
    numbers: Any = read_json(labels)
    if not isinstance(numbers, dict) or not numbers:
        raise ValueError(f"{labels}: expected templates and their numbers, got {type(numbers).__name__}")
    numbers = {name: parse_int(str(label), f"{labels}: {name!r}") for name, label in numbers.items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ValueError(f"{labels}: expected each number from 0 to {len(numbers) - 1} once")
    entries: Any = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of videos, got {type(entries).__name__}")
    found, ignored = _ssv2_files(given.root)
    suffix = next((os.path.splitext(names[0])[1] for names in found.values()), ".webm")  # of videos that are missing
    videos = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f"{where}: expected an object with 'id' and 'template', got {entry!r}")
        where += f", id {entry['id']}"
        if "template" not in entry:
            raise ValueError(f"{where}: expected a 'template', got none: the test split comes without labels")
        text = str(entry["template"]).replace("[", "").replace("]", "")
        if text not in numbers:
            raise ValueError(f"{where}: expected a template of {labels}, got {text!r}{nearest(text, numbers)}")
        names = found.get(str(entry["id"]), [f"{entry['id']}{suffix}"])
        if len(names) > 1:
            files = _several([given.root / name for name in names])
            raise ValueError(f"{where}: expected one file or folder of this video, found {files}")
        file = given.root / names[0]
        template, first = (None, None) if file.suffix else (given.template, given.start_index)
        videos.append(Video(file, numbers[text], None, template, first))
    return VideoList(videos, tuple(sorted(numbers, key=numbers.__getitem__)), str(path), ignored)


def _ssv2_files(folder: Path) -> tuple[dict[str, list[str]], int]:
    """Names of videos and of folders of frames by the number of the video, and the number of macOS's files."""
    files: dict[str, list[str]] = {}
    ignored = 0
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if is_macos_file(entry.name):
                    ignored += 1
                elif stem.isdigit() and (suffix.lower() in VIDEO_SUFFIXES or (not suffix and entry.is_dir())):
                    files.setdefault(stem, []).append(entry.name)
    return files, ignored


def read_smarthome(given: ListPaths) -> VideoList:
    """The clips of a part of a protocol of Toyota Smarthome."""
    folder, split = given.path, str(given.split)
    names = SMARTHOME_CROSS_SUBJECT if split.startswith("cross_subject") else SMARTHOME_CROSS_VIEW
    numbers = {name: label for label, name in enumerate(names)}
    files = sorted(folder.glob("*.mp4"))
    ignored = sum(is_macos_file(file.name) for file in files)
    files = [file for file in files if not is_macos_file(file.name)]
    if not files:
        raise ValueError(f"{folder}: expected a folder with clips like Cook.Cut_p03_r00_v02_c03.mp4, found none")
    videos = []
    for file in files:
        match = _SMARTHOME_CLIP.fullmatch(file.stem)
        if not match:
            raise ValueError(f"{file}: expected a name like Cook.Cut_p03_r00_v02_c03.mp4")
        activity = match["activity"]
        check_known(f"{file}: activity", activity, _SMARTHOME_ACTIVITIES)
        if activity in numbers and _SMARTHOME_PARTS[split](int(match["person"]), int(match["camera"])):
            videos.append(Video(file, numbers[activity]))
    return VideoList(videos, names, f"{folder} ({split})", ignored)
