"""What readers of all formats of lists share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amflow_models.data.videos import VideoList

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")


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
        patterns: whether a path may stand for several files.
    """

    arguments: tuple[str, ...]
    read: Callable[[ListPaths], VideoList]
    names_classes: bool = False
    required: dict[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    patterns: bool = False


def is_macos_file(name: str) -> bool:
    """Whether a file's name is one that macOS gives to the metadata of another file: ``._clip.mp4``."""
    return name.rpartition("/")[2].startswith("._")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises ValueError, which names the file, if it can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error.reason} at byte {error.start})") from error


def read_lines(path: Path) -> Iterable[tuple[str, str]]:
    """Yields ("path:number", line) for each line that is not empty, without white space around it."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError, which names the line, if there is none."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON ({error.msg})") from error


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a file with one in each line. Raises ValueError for an empty line between them."""
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"{path}:{number}: expected the name of class {number - 1}, got an empty line")
    return tuple(names)


def parse_int(text: str, where: str) -> int:
    """A whole number. Raises ValueError, which begins with `where`, if the text is none."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{where}: expected a whole number, got {text!r}")
    return int(text)
