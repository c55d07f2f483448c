"""Lists of videos and their labels, in the formats that other projects and data sets use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from amflow_models.data.formats import (
    ListFormat,
    ListPaths,
    is_macos_file,
    parse_int,
    read_classes,
    read_lines,
)
from amflow_models.data.frames import check_naming
from amflow_models.data.published import (
    HMDB51_SPLITS,
    SMARTHOME_SPLITS,
    read_hmdb51,
    read_kinetics,
    read_smarthome,
    read_ssv2,
    read_ucf101,
)
from amflow_models.data.shards import read_shards
from amflow_models.data.videos import Video, VideoList, Videos
from amflow_models.suggestions import check_known


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
    """Reads a list of videos. Videos are not opened, and looked for only where their names are incomplete or in a
    folder: `check_lists` does that.

    Args:
        kind: one of `KINDS`.

            - ``"mmaction"``, MMAction2's list of videos: ``path label`` in each line. VideoMAE's is the same.
            - ``"mmaction_frames"``, its list of folders of frames: ``folder total_frames label``.
            - ``"mmaction_frames_offset"``, the same for parts of folders: ``folder start total_frames label``, where
              `start` is the number of frames before the part: 0 is the folder's first frame, whatever its number.
            - ``"pyslowfast"``, PySlowFast's CSV: ``path label`` or ``path,label``; the path may be in double quotes.
            - ``"kinetics"``, the CSV of Kinetics with the header ``label,youtube_id,time_start,time_end,...``. Videos
              are found below `root` by their names: ``<youtube_id>_<time_start>_<time_end>`` with 6 digits each, or
              ``<youtube_id>``, in folders of classes or in any others.
            - ``"ucf101"``, a ``trainlist01.txt`` or ``testlist01.txt`` of UCF-101, with `labels`.
            - ``"hmdb51"``, the folder of HMDB-51's files ``<class>_test_split<n>.txt``, with `split`. Videos are
              ``root/<class>/<name>``.
            - ``"ssv2"``, a split of Something-Something v2 in JSON, with `labels`. Videos are ``root/<id>.webm`` or
              ``.mp4``, or the folders of frames ``root/<id>``.
            - ``"smarthome"``, the folder of Toyota Smarthome's clips, which are named like
              ``Cook.Cut_p03_r00_v02_c03.mp4``: activity, person, repetition, video, camera; with `split`.
            - ``"tar"``, tar files of videos with labels, as the library webdataset has them: ``a.mp4`` with ``a.cls``
              (a number) or ``a.json`` (an object with a number "label"). `path` is one file, a folder of them, or
              several like ``train-{000..127}.tar``.
        path: the list; for "hmdb51" and "smarthome" the folder; for "tar" see there.
        root: folder that all relative paths start from: those in the list, `path`, `classes` and `labels`. None: paths
            in the list start from the list's own folder, the others from the working directory.
        classes: a file with one class name in each line, in the order of the labels. For the kinds that are lists of
            lines, "kinetics" (without it, classes are numbered in alphabetical order) and "tar".
        labels: for "ssv2", the JSON file that numbers the templates; for "ucf101", ``classInd.txt``.
        split: for "smarthome" and "hmdb51": one of `SPLITS`, such as ``"cross_subject/train"``, ``"split1/test"``.
            ``"cross_subject"`` has 31 classes, tests on the persons that it does not train on, and has no validation
            list; ``"cross_view1"`` trains on camera 1 and ``"cross_view2"`` on cameras 1, 3, 4, 6 and 7; both have 19
            classes, validate on camera 5 and test on camera 2. Clips of other activities are left out.
        template: names of the frames in folders, such as ``"img_{:05}.jpg"``. None: a folder must have pictures of one
            series only. For the kinds that can have folders of frames.
        start_index: with a template, the number of a folder's first frame. None: the smallest one that the folder has.

    Files like ``._a.mp4``, in which macOS keeps metadata, are left out and counted in the result's `ignored`.

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
        pattern: a regular expression of the whole line, with the groups path, label and perhaps start and frames. A
            path may contain spaces, so it is everything before the other fields.
        strip: characters that are stripped from the end of the path; None strips white space.
        quote: a character that may enclose the path.
    """
    compiled = re.compile(pattern)

    def read(given: ListPaths) -> VideoList:
        ignored, highest = 0, -1

        def videos() -> Iterator[Video]:
            nonlocal ignored, highest
            for where, line in read_lines(given.path):
                match = compiled.fullmatch(line)
                if not match:
                    raise ValueError(f"{where}: expected '{expected}', got {line!r}")
                fields = match.groupdict()
                name = fields["path"].rstrip(strip)
                name = name.strip(quote) if quote else name
                labels = [parse_int(label, f"{where}: label") for label in fields["label"].split(",")]
                frames = _number(fields, "frames", 1, f"{where}: total_frames")
                start = _number(fields, "start", 0, f"{where}: start")
                if is_macos_file(name):
                    ignored += 1
                    continue
                highest = max(highest, *labels)
                for label in labels:
                    yield Video(given.root / name, label, frames, given.template, given.start_index, start)

        read = Videos(videos())
        names = tuple(map(str, range(highest + 1))) if given.classes is None else read_classes(given.classes)
        return VideoList(read, names, str(given.path), ignored)

    return read


def _number(fields: dict[str, str], name: str, least: int, where: str) -> int | None:
    if name not in fields:
        return None
    number = parse_int(fields[name], where)
    if number < least:
        raise ValueError(f"{where}: expected at least {least}, got {number}")
    return number


_LINES = ("root", "classes", "template", "start_index")
FORMATS = {
    "mmaction": ListFormat(_LINES, _line_reader("path label", r"(?P<path>.+)\s(?P<label>\S+)")),
    "mmaction_frames": ListFormat(
        _LINES,
        _line_reader("folder total_frames label", r"(?P<path>.+)\s(?P<frames>\S+)\s+(?P<label>\S+)"),
    ),
    "mmaction_frames_offset": ListFormat(
        _LINES,
        _line_reader(
            "folder start total_frames label", r"(?P<path>.+)\s(?P<start>\S+)\s+(?P<frames>\S+)\s+(?P<label>\S+)"
        ),
    ),
    "pyslowfast": ListFormat(
        _LINES,
        _line_reader("path label", r"(?P<path>.+)[\s,](?P<label>[^\s,]+)", strip=", \t", quote='"'),
    ),
    "kinetics": ListFormat(("root", "classes"), read_kinetics, names_classes=True),
    "ucf101": ListFormat(
        ("root", "labels"),
        read_ucf101,
        names_classes=True,
        required={"labels": "the file that numbers the classes, classInd.txt"},
    ),
    "hmdb51": ListFormat(("root", "split"), read_hmdb51, names_classes=True, splits=HMDB51_SPLITS),
    "ssv2": ListFormat(
        ("root", "labels", "template", "start_index"),
        read_ssv2,
        names_classes=True,
        required={"labels": "the JSON file that numbers the templates"},
    ),
    "smarthome": ListFormat(("root", "split"), read_smarthome, names_classes=True, splits=SMARTHOME_SPLITS),
    "tar": ListFormat(("root", "classes"), read_shards, patterns=True),
}
KINDS = tuple(FORMATS)
SPLITS = tuple(split for list_format in FORMATS.values() for split in list_format.splits)
