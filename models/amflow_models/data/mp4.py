"""The index of an MP4 or QuickTime file, read without its packets.

Layout of the boxes: ISO/IEC 14496-12. Files whose index does not tell everything are left to the packets: fragments,
edits that hide frames, samples without a size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from amflow_models.data.tables import Samples


class BrokenIndexError(Exception):
    """The index places samples beyond the end of the file."""


def read_index(file: BinaryIO, track: int) -> Samples | None:
    """The samples of a track, with times that start anywhere; None if the index does not tell everything.

    Args:
        file: the file.
        track: identifier of the track.

    Raises:
        BrokenIndexError: the file lacks samples that the index places in it.
    """
    try:
        movie = _movie(file)
        boxes = dict(_boxes(movie))
        tracks = [dict(_boxes(content)) for name, content in _boxes(movie) if name == b"trak"]
        own = [boxes for boxes in tracks if _after_times(boxes[b"tkhd"]) == track]
        if len(own) != 1 or b"mvex" in boxes:  # mvex: fragments follow
            return None
        return _samples(own[0], _after_times(boxes[b"mvhd"]), file.seek(0, os.SEEK_END))
    except (KeyError, IndexError, ValueError):
        return None  # a box is missing, or is not as it should be


def _movie(file: BinaryIO) -> memoryview:
    """The content of the box that holds the index; empty if there is none."""
    place, end = 0, file.seek(0, os.SEEK_END)
    while place + 8 <= end:
        file.seek(place)
        head = memoryview(file.read(16))
        size, name, header = _integer(head, 0), bytes(head[4:8]), 8
        if size == 1:
            size, header = _integer(head, 8, 8), 16
        if size < header or name == b"moof":
            break
        if name == b"moov":
            file.seek(place + header)
            return memoryview(file.read(size - header))
        place += size
    return memoryview(b"")


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    place = 0
    while place + 8 <= len(content):
        size = _integer(content, place)
        if size < 8:  # 64-bit sizes are for boxes of media
            return
        yield bytes(content[place + 4 : place + 8]), content[place + 8 : place + size]
        place += size


def _samples(track: dict[bytes, memoryview], movie_scale: int, end: int) -> Samples | None:
    media = dict(_boxes(track[b"mdia"]))
    table = dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))
    sizes = _sizes(table)
    count = len(sizes)
    spans = _runs(table[b"stts"], count)
    offsets = _runs(table[b"ctts"], count) if b"ctts" in table else np.zeros(count, np.int64)
    keys = np.ones(count, bool)
    if b"stss" in table:
        keys[:] = False
        keys[_numbers(table[b"stss"], ">u4", 1).astype(np.int64) - 1] = True
    if not count or not sizes.all() or not keys.any():
        return None
    if (_ends_of_chunks(table, sizes) > end).any():
        raise BrokenIndexError
    times = np.cumsum(spans) - spans + offsets
    if len(np.unique(times)) < count or _hides(track, times, spans, _after_times(media[b"mdhd"]), movie_scale):
        return None
    return Samples(times, spans, keys, np.zeros(count, bool))


def _sizes(table: dict[bytes, memoryview]) -> np.ndarray:
    content = table[b"stsz"]
    size, count = _integer(content, 4), _integer(content, 8)
    if size:
        return np.full(count, size, np.int64)
    return np.frombuffer(content, ">u4", count, 12).astype(np.int64)


def _runs(content: memoryview, count: int) -> np.ndarray:
    """Values that a box stores as (repetitions, value), which must be as many as there are samples."""
    runs = _numbers(content, ">i4", 2).astype(np.int64).reshape(-1, 2)
    if (runs[:, 0] < 0).any() or runs[:, 0].sum() != count:
        raise ValueError("the runs do not cover the samples")
    return np.repeat(runs[:, 1], runs[:, 0])


def _ends_of_chunks(table: dict[bytes, memoryview], sizes: np.ndarray) -> np.ndarray:
    """Where in the file each chunk of samples ends."""
    wide = b"co64" in table
    starts = _numbers(table[b"co64" if wide else b"stco"], ">u8" if wide else ">u4", 1).astype(np.int64)
    runs = _numbers(table[b"stsc"], ">u4", 3).astype(np.int64).reshape(-1, 3)  # first chunk, samples in each, layout
    chunks = np.diff(np.append(runs[:, 0], len(starts) + 1))
    last = np.cumsum(np.repeat(runs[:, 1], chunks))
    if len(last) != len(starts) or not len(last) or last[-1] != len(sizes):
        raise ValueError("the chunks do not hold the samples")
    total = np.append(0, np.cumsum(sizes))
    return starts + np.diff(np.append(0, total[last]))


def _hides(track: dict[bytes, memoryview], times: np.ndarray, spans: np.ndarray, scale: int, movie_scale: int) -> bool:
    """Whether an edit list may hide samples, or show some twice."""
    if b"edts" not in track:
        return False
    content = dict(_boxes(track[b"edts"]))[b"elst"]
    layout = np.dtype([("span", ">u8"), ("start", ">i8"), ("rate", ">i4")] if content[0] else
                      [("span", ">u4"), ("start", ">i4"), ("rate", ">i4")])  # fmt: skip
    edits = np.frombuffer(content, layout, _integer(content, 4), 8)
    shown = edits[edits["start"] >= 0]  # others are pauses
    if len(shown) != 1 or len(edits) > 2 or edits[-1]["start"] < 0 or shown[0]["rate"] != 1 << 16:
        return True
    start, span = int(shown[0]["start"]), int(shown[0]["span"]) + 1  # in units of the movie: rounded
    return start > times.min() or (start + span * scale / movie_scale) < (times + spans).max()


def _numbers(content: memoryview, kind: str, width: int) -> np.ndarray:
    """The numbers of a box that stores their count, divided by `width`, before them."""
    return np.frombuffer(content, kind, width * _integer(content, 4), 8)


def _after_times(header: memoryview) -> int:
    """What a header has after the times of creation and change: the time scale, or a track's identifier."""
    return _integer(header, 20 if header[0] else 12)


def _integer(content: memoryview, place: int, size: int = 4) -> int:
    value = bytes(content[place : place + size])
    if len(value) < size:
        raise ValueError("the box is too short")
    return int.from_bytes(value, "big")
