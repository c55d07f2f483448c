"""Tables of a video file's frames: when each is shown, and at which of them decoding can begin.

A table comes from the index of an MP4 file, or from one pass over the packets of any file, without decoding. Tables are
kept in memory, so that a file is indexed once by a process and not once for every clip that is read from it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_KEPT = 8 << 20  # bytes of tables in a thread: a million frames, or 10 hours of video


@dataclass(frozen=True)
class Samples:
    """The encoded frames of a video, in decoding order.

    Attributes:
        times: int64 (n,), when each is shown, in units of the stream's time base; all differ.
        spans: int64 (n,), for how long, or 0 if unknown.
        keys: bool (n,), whether decoding can begin there.
        hidden: bool (n,), whether it is decoded but not shown.
    """

    times: np.ndarray
    spans: np.ndarray
    keys: np.ndarray
    hidden: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, bool, bool]]) -> Samples:
        """Samples of rows (time, span, key, hidden)."""
        times, spans, keys, hidden = np.array(rows, np.int64).T
        return cls(times, spans, keys.astype(bool), hidden.astype(bool))


@dataclass(frozen=True)
class FrameTable:
    """The frames of a video by number, in the order in which they are shown.

    Attributes:
        total: number of frames.
        times: int64 (total,), ascending: when each is shown; None if that is unknown and frames must be counted.
        keys: int64 (k,), ascending numbers of frames. Decoding for frame i begins at the last one that is not above i;
            the first is 0.
        seeks: int64 (k,), the times to seek to.
    """

    total: int
    times: np.ndarray | None
    keys: np.ndarray
    seeks: np.ndarray

    @classmethod
    def counted(cls, total: int) -> FrameTable:
        """The table of a file that is decoded from its beginning."""
        return cls(total, None, np.zeros(1, np.int64), np.zeros(1, np.int64))

    @classmethod
    def of(cls, samples: Samples) -> FrameTable:
        """The table of encoded frames, of which one or more is a key.

        Frames that are shown before the first key can't be decoded and do not count; hidden ones neither.
        """
        keys = samples.times[samples.keys]
        shown = np.sort(samples.times[visible(samples)])
        if not len(shown):
            return cls.counted(0)
        # The first visible frame may depend on a key that is hidden.
        first = keys[keys <= shown[0]].max()
        later = np.intersect1d(keys[keys > shown[0]], shown)
        numbers = np.concatenate([[0], np.searchsorted(shown, later)])
        return cls(len(shown), shown, numbers, np.concatenate([[first], later]))

    def number(self, time: int | None) -> int | None:
        """The number of the frame that is shown at a time; None if there is none."""
        assert self.times is not None
        if time is None:
            return None
        times = self.times.data  # a lookup takes a tenth of the time of `searchsorted`, and each frame needs one
        place = bisect_left(times, time)
        return place if place < self.total and times[place] == time else None

    def key(self, number: int) -> int:
        """The number of the frame to begin at, to decode frame `number`."""
        return int(self.keys[np.searchsorted(self.keys, number, side="right") - 1])

    def seek(self, key: int) -> int:
        """The time of a frame of `keys`."""
        return int(self.seeks[np.searchsorted(self.keys, key)])

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return sum(array.nbytes for array in (self.times, self.keys, self.seeks) if array is not None)


def visible(samples: Samples) -> np.ndarray:
    """bool (n,): which of the encoded frames are shown and can be decoded."""
    return ~samples.hidden & (samples.times >= samples.times[samples.keys.argmax()])


class _Kept(threading.local):
    """The tables that were used last. Each thread has its own, so that no lock can be held while a process forks."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.tables: dict[Hashable, FrameTable] = {}
        self.size = 0


_kept = _Kept()


def kept_table(file: Hashable, make: Callable[[], FrameTable]) -> FrameTable:
    """The table of a file: the one that is kept, or a new one.

    Args:
        file: what identifies the file and its content.
        make: makes the table.
    """
    table = _kept.tables.pop(file, None)
    if table is None:
        table = make()
        _kept.size += table.nbytes
    _kept.tables[file] = table  # the last one
    while _kept.size > _KEPT and len(_kept.tables) > 1:
        _kept.size -= _kept.tables.pop(next(iter(_kept.tables))).nbytes
    return table


def forget() -> None:
    """Drops the tables that this thread keeps."""
    _kept.clear()
