"""Lists of one's own videos: from a folder for each class, divided into training, validation and test lists."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from amflow_models.data.formats import VIDEO_SUFFIXES, is_macos_file
from amflow_models.data.videos import Video
from amflow_models.files import write_text
from amflow_models.suggestions import nearest

_PICTURES = (".jpg", ".jpeg", ".png")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class ClassFolders:
    """What `list_folder` found.

    Attributes:
        videos: the videos, by class and path.
        classes: names of the classes, by label.
        others: numbers of files that are no videos, by suffix; ``._*`` counts those of macOS.
    """

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    others: Counter[str]


def list_folder(folder: Path, classes: Sequence[str] | None = None) -> ClassFolders:
    """Lists the videos of a folder that holds a folder for each class.

    Videos are the video files, known by their suffixes, and the folders that hold pictures and neither videos nor
    folders, anywhere below a class's folder. Names that begin with a dot are left out.

    Args:
        folder: the folder.
        classes: names of the classes, by label, of which `folder` may lack some; None: its folders, sorted by name.

    Raises:
        ValueError: there is no such folder, its folders are not classes (there are none, they are called train and
            test, or `classes` lacks one), or a class has no videos.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a folder for each class, there is none")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in "._")
    if not names:
        raise ValueError(f"{folder}: expected a folder for each class in it, found no folders")
    if all(name.lower() in _SPLITS for name in names):
        raise ValueError(
            f"{folder}: expected folders of classes, found {', '.join(names)}: list each of these, with --classes for "
            "all but the first"
        )
    known = names if classes is None else list(classes)
    for name in names:
        if name not in known:
            raise ValueError(f"{folder / name}: the given classes have no {name!r}{nearest(name, known)}")
    others: Counter[str] = Counter()
    videos = []
    for name in names:
        found = sorted(_videos(folder / name, others))
        if not found:
            raise ValueError(f"{folder / name}: expected videos of this class, found none; remove an empty folder")
        videos += [Video(path, known.index(name)) for path in found]
    for entry in os.scandir(folder):
        if entry.is_file():
            others[f"in no folder of a class, {_kind(entry.name)}"] += 1
    return ClassFolders(tuple(videos), tuple(known), others)


def _videos(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Yields the videos anywhere below a folder, and counts other files."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:  # links may lead in a circle
            continue
        seen.add(real)
        kinds = [_kind(name) for name in files]
        if not folders and any(kind in _PICTURES for kind in kinds) and not set(kinds) & set(VIDEO_SUFFIXES):
            yield Path(parent)  # a folder of frames
            continue
        for name, kind in zip(files, kinds, strict=True):
            if kind in VIDEO_SUFFIXES:
                yield Path(parent, name)
            else:
                others[kind] += 1


def _kind(name: str) -> str:
    """A file's suffix, or how its name begins where it is hidden."""
    if name.startswith("."):
        return "._*" if is_macos_file(name) else ".*"
    return os.path.splitext(name)[1].lower() or "without suffix"


def split_videos(videos: Iterable[Video], shares: Sequence[float], folder: Path, seed: int) -> list[list[Video]]:
    """Divides videos at random, in each class alike.

    Where a video goes depends only on its path below `folder`, the seed and the other videos of its class, so the same
    folder is divided in the same way on every machine.

    Args:
        videos: the videos.
        shares: the parts' shares of each class, rounded, but at least one video where the class has enough of them;
            what remains, at least one video, is the first part of the result.
        folder: where paths start.
        seed: chooses another division.

    Returns:
        1 + len(shares) lists, each in the order of `videos`.

    Raises:
        ValueError: a share is not above 0, or together they are not below 1.
    """
    if not all(share > 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"shares: expected shares above 0, below 1 together, got {', '.join(map(str, shares))}")
    by_class: dict[int, list[Video]] = {}
    videos = list(videos)
    for video in videos:
        by_class.setdefault(video.label, []).append(video)
    part_of: dict[Video, int] = {}
    for own in by_class.values():
        counts = [max(1, round(share * len(own))) for share in shares]
        while sum(counts) >= len(own):
            counts[counts.index(max(counts))] -= 1
        order = sorted(own, key=lambda video: _hash(f"{seed} {video.path.relative_to(folder).as_posix()}"))
        parts = [number for number, count in enumerate(counts, 1) for _ in range(count)]
        part_of |= dict(zip(order, parts, strict=False))
    return [[video for video in videos if part_of.get(video, 0) == part] for part in range(1 + len(shares))]


def _hash(text: str) -> bytes:
    return hashlib.sha256(os.fsencode(text)).digest()


def write_list(path: Path, videos: Iterable[Video], root: Path | None = None) -> str:
    """Writes a list of videos, whole or not at all.

    Args:
        path: the list to write.
        videos: the videos.
        root: folder that paths in the list start from; None: the list's own folder. Paths that lead elsewhere are
            written as absolute ones.

    Returns:
        The kind of the list: "mmaction", or where numbers of frames are known "mmaction_frames" or
        "mmaction_frames_offset".

    Raises:
        ValueError: a name can't stand in a list; nothing is written.
        OSError: the file can't be written.
    """
    start = Path(os.path.abspath(path.parent if root is None else root))
    videos = list(videos)
    kind = "mmaction"
    if any(video.frames is not None for video in videos):
        kind = "mmaction_frames_offset" if any(video.start for video in videos) else "mmaction_frames"
    lines = []
    for video in videos:
        place = Path(os.path.abspath(video.path))
        name = check_line(str(place.relative_to(start) if place.is_relative_to(start) else place))
        numbers = {
            "mmaction": f"{video.label}",
            "mmaction_frames": f"{video.frames} {video.label}",
            "mmaction_frames_offset": f"{video.start} {video.frames} {video.label}",
        }
        lines.append(f"{name} {numbers[kind]}\n")
    write_text(path, "".join(lines))
    return kind


def write_classes(path: Path, classes: Iterable[str]) -> None:
    """Writes the names of classes, one in each line, whole or not at all.

    Raises:
        ValueError: a name can't stand in a line; nothing is written.
        OSError: the file can't be written.
    """
    write_text(path, "".join(f"{check_line(name)}\n" for name in classes))


def check_line(name: str) -> str:
    """Returns a name, or raises ValueError if readers would not find the same name in a line of a file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r}: this name is not UTF-8, and can't stand in a list; rename it") from None
    if name.splitlines() != [name] or name != name.strip():
        raise ValueError(f"{name!r}: a name with line breaks, or spaces at its ends, can't stand in a list; rename it")
    return name
