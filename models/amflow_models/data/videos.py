"""Videos and their labels, in lists that loader processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

_PART = 4096  # videos that are unpacked at a time


@dataclass(frozen=True)
class Video:
    """One line of a list.

    Attributes:
        path: a video file, a folder of frames, or a tar file and the name of a video in it: ``shard.tar/clip.mp4``.
        label: index of the class, from 0.
        frames: number of frames that the list gives for a folder; None for a file.
        template, start_index: names of a folder's frames, as for `FrameFolder`.
        start: where the list says it: the number of the folder's frames before those of the video.
        span: of a video in a tar file: where in that file its bytes begin, and their number.
    """

    path: Path
    label: int
    frames: int | None = None
    template: str | None = None
    start_index: int | None = None
    start: int | None = None
    span: tuple[int, int] | None = None

    @property
    def file(self) -> Path:
        """The file or folder on disk: the path, or the tar file that the video is in."""
        return self.path if self.span is None else archive_of(self.path)


class Videos(Sequence[Video]):
    """Videos in a few tensors, from which they are made when they are asked for.

    Loader processes share the tensors, however they are started. Objects of Python would be copied into each process:
    in a forked one by and by, since counting the references to an object changes its memory.

    Args:
        videos: the videos.
    """

    def __init__(self, videos: Iterable[Video]) -> None:
        text, ends = bytearray(), [0]
        rows: list[tuple[int, ...]] = []
        numbers: list[torch.Tensor] = []
        namings: dict[tuple[str | None, int | None], int] = {}
        for video in videos:
            text += os.fsencode(video.path)
            ends.append(len(text))
            naming = namings.setdefault((video.template, video.start_index), len(namings))
            frames, start = (-1 if number is None else number for number in (video.frames, video.start))
            rows.append((video.label, frames, start, *(video.span or (-1, -1)), naming))
            if len(rows) == _PART:
                numbers.append(torch.tensor(rows))
                rows = []
        self._text = torch.frombuffer(text or bytearray(1), dtype=torch.uint8)
        self._ends = torch.tensor(ends)
        self._numbers = torch.cat([*numbers, torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)])
        self._namings = tuple(namings)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Video: ...
    @overload
    def __getitem__(self, index: slice) -> Videos: ...
    def __getitem__(self, index: int | slice) -> Video | Videos:
        if isinstance(index, slice):
            return Videos(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]  # raises IndexError
        return next(self._unpack(place, place + 1))

    def __iter__(self) -> Iterator[Video]:
        for first in range(0, len(self), _PART):
            yield from self._unpack(first, min(first + _PART, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Videos({list(self)})"

    def _unpack(self, first: int, stop: int) -> Iterator[Video]:
        ends = self._ends[first : stop + 1].tolist()
        text = self._text[ends[0] : ends[-1]].numpy().tobytes()
        rows: Any = self._numbers[first:stop].tolist()
        for (label, frames, start, place, size, naming), a, b in zip(rows, ends[:-1], ends[1:], strict=True):
            yield Video(
                Path(os.fsdecode(text[a - ends[0] : b - ends[0]])),
                label,
                None if frames < 0 else frames,
                self._namings[naming][0],
                self._namings[naming][1],
                None if start < 0 else start,
                None if place < 0 else (place, size),
            )


@dataclass(frozen=True)
class VideoList:
    """The videos of a list.

    Attributes:
        videos: the videos in the list's order; stored as `Videos`.
        classes: class names by label; the labels as strings if the classes have no names.
        source: the file or folder that the list was read from.
        ignored: number of macOS's files ``._*``, which look like videos and are none, that were left out.
        missing: paths of videos that were left out, as they do not exist.
    """

    videos: Sequence[Video]
    classes: tuple[str, ...]
    source: str
    ignored: int = 0
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.videos, Videos):
            object.__setattr__(self, "videos", Videos(self.videos))


def archive_of(path: Path) -> Path:
    """The tar file of a video in it.

    Raises:
        ValueError: the path has no such part.
    """
    for parent in path.parents:
        if parent.suffix == ".tar":
            return parent
    raise ValueError(f"path: expected a video in a tar file, like shard.tar/clip.mp4, got {str(path)!r}")
