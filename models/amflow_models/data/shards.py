"""Tar files of videos with their labels, in the layout of the library webdataset.

The headers of the files are read once, and make a list like any other: a clip is a function of seed, epoch and index,
however many processes and workers share the list, and none is lost or read twice. The library reads the files as a
stream instead: there, the order of the clips depends on the number of processes, and a run can't resume where it was.
A video is read in one piece, so that storage on a network sees one request for it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amflow_models.data.formats import VIDEO_SUFFIXES, ListPaths, is_macos_file, parse_int, read_classes
from amflow_models.data.videos import Video, VideoList

_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")


def read_shards(given: ListPaths) -> VideoList:
    """The videos of tar files, in the order of the files and of the videos in them."""
    files = list(_tar_files(given.path))
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(_read_headers, files))
    videos = [video for part, _ in parts for video in part]
    highest = max((video.label for video in videos), default=-1)
    names = tuple(map(str, range(highest + 1))) if given.classes is None else read_classes(given.classes)
    return VideoList(videos, names, str(given.path), sum(ignored for _, ignored in parts))


def _tar_files(path: Path) -> Iterator[Path]:
    """The files that a path means."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.tar") if not is_macos_file(file.name))
        if not files:
            raise ValueError(f"{path}: expected a folder with files like 000.tar, found none")
        yield from files
        return
    match = _RANGE.search(str(path))
    if not match:
        yield path
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{path}: expected a range that ascends, got {match[0]}")
    for number in range(int(first), int(last) + 1):
        yield from _tar_files(Path(str(path).replace(match[0], f"{number:0{len(first)}}", 1)))


def _read_headers(file: Path) -> tuple[list[Video], int]:
    """The videos of a tar file, and the number of macOS's files in it."""
    spans: dict[str, tuple[str, int, int]] = {}  # by key: the name before the first dot
    labels: dict[str, int] = {}
    ignored = 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                key = f"{folder}{slash}{stem}"
                if is_macos_file(member.name):
                    ignored += 1
                elif member.isreg() and dot + suffix.lower() in VIDEO_SUFFIXES:
                    if key in spans:
                        raise ValueError(f"{file}: expected one video {key}, found {spans[key][0]} and {member.name}")
                    spans[key] = member.name, member.offset_data, member.size
                elif member.isreg() and suffix in ("cls", "json"):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a regular file
                    labels[key] = _label(content.read(), suffix, f"{file}: {member.name}")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{file}: can't be read as an uncompressed tar file ({error})") from error
    for key, (name, *_) in spans.items():
        if key not in labels:
            raise ValueError(f"{file}: expected {key}.cls or {key}.json with the label of {name}, found none")
    return [Video(file / name, labels[key], span=(place, size)) for key, (name, place, size) in spans.items()], ignored


def _label(content: bytes, suffix: str, where: str) -> int:
    try:
        text = content.decode().strip()
        if suffix == "cls":
            return parse_int(text, where)
        return parse_int(str(json.loads(text)["label"]), where)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{where}: expected {{'label': number}}, got {content[:40]!r}") from None
