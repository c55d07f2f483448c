"""Reading frames of a video file or of a folder of frames by number, exactly.

Frames are numbered from 0 in display order, as in decoding the whole file. The frame count in a container may be
missing or wrong, so one pass over the packets, without decoding, collects the times of all frames. Frames before the
first keyframe, which can't be decoded, do not count, nor do frames that an edit list hides. How long a frame is shown
makes no difference, so variable rates need no special case. Where packets have no usable times (AVI, raw streams) the
file is decoded from its beginning and frames are counted.

Rotation in a file's metadata (phones) is not applied.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

_IMAGES = (".jpg", ".jpeg", ".png")


class UnreadableVideo(ValueError):  # noqa: N818 -- named for the video
    """A video that can't be read. Its message is ``path: reason``.

    Attributes:
        path: path of the video.
        reason: why it can't be read.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # with both arguments it survives pickling
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _MissingFrameError(Exception):
    """The decoder skipped a frame or returned a damaged one."""


class VideoFile:
    """An open video file; ``len()`` is its number of frames.

    It decodes in one thread, since data loading runs many processes. Close it, or use it in a ``with`` statement.

    Raises:
        UnreadableVideo: the file does not exist, is not a video, has no frames, or is truncated. Truncation can't
            always
            be detected: a truncated transport stream is a shorter video, and so is a Matroska file that is cut within
            its last half second. The last frame before such a cut may be incomplete, or a later one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UnreadableVideo(path, "there is no such file")
        with self._errors():
            self._open()
            self._times = self._read_times()
            self._numbers = {time: number for number, time in enumerate(self._times or ())}
            self._total = sum(1 for _ in self._decode_from(None)) if self._times is None else len(self._times)
        if not self._total:
            raise UnreadableVideo(self.path, "holds no frames that can be decoded")

    def __len__(self) -> int:
        return self._total

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def read(self, indices: Iterable[int]) -> Tensor:
        """Reads frames by number, in any order, with repetitions.

        Returns:
            uint8 RGB (len(indices), 3, H, W).

        Raises:
            IndexError: an index is not in [0, len).
            UnreadableVideo: a frame can't be decoded, is damaged, or differs in size from the others. Only damage that
                the decoder reports is noticed: noise within a frame may decode to a wrong picture.
        """
        indices = _check_indices(indices, len(self))
        wanted = sorted(set(indices))
        with self._errors():
            try:
                frames = self._decode(wanted, seek=self._times is not None)
            except (_MissingFrameError, av.error.FFmpegError):
                # Some packets flagged as keyframes are not decodable on their own, and some containers seek to the
                # wrong position: read from the start.
                try:
                    frames = self._decode(wanted, seek=False)
                except _MissingFrameError as error:
                    raise UnreadableVideo(self.path, str(error)) from None
        return _stack(self.path, [frames[index] for index in indices])

    def _open(self) -> None:
        self._container: Any = av.open(str(self.path))
        if not self._container.streams.video:
            raise UnreadableVideo(self.path, "holds no video stream")
        self._stream: Any = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise UnreadableVideo(self.path, "FFmpeg has no decoder for it")
        self._stream.codec_context.thread_count = 1

    def _read_times(self) -> list[int] | None:
        """The display times of the frames, ascending; None if they are unknown. Also sets the keyframes."""
        packets: list[tuple[Any, ...]] = []
        keys: dict[int, None] = {}  # times of keyframes in decoding order
        for packet in self._container.demux(self._stream):
            if not packet.size:  # end of the stream
                continue
            if packet.is_corrupt:
                raise UnreadableVideo(self.path, "breaks off, or is damaged")
            packets.append((packet.pts, packet.duration or 0, packet.is_discard))
            if packet.is_keyframe:
                keys[packet.pts] = None
        times = {time for time, *_ in packets}
        # AVI does not store the display order.
        if None in times or len(times) < len(packets) or not keys or self._container.format.name == "avi":
            return None
        visible = [(time, span) for time, span, hidden in packets if not hidden and time >= next(iter(keys))]
        if not visible:
            return []
        shown = sorted(time for time, _ in visible)
        self._check_end(min(shown[0], 0), max(time + span for time, span in visible), len(shown))
        # The first visible frame may depend on a keyframe that an edit list hides.
        self._keys = {0: max(key for key in keys if key <= shown[0])}
        self._keys |= {number: time for number, time in enumerate(shown) if time in keys}
        return shown

    def _check_end(self, start: int, end: int, count: int) -> None:
        """Raises if the frames end half a second, or two frames, before the header's duration.

        Args:
            start, end: in units of the stream's time base.
            count: number of frames.
        """
        actual = (end - start) * self._stream.time_base
        stated = self._stream.duration and self._stream.duration * self._stream.time_base
        if stated is None and len(self._container.streams) == 1:  # with several, it may be the duration of the audio
            stated = self._container.duration and Fraction(self._container.duration, av.time_base)
        if stated is not None and stated - actual > max(0.5, 2 * actual / count):
            raise UnreadableVideo(self.path, f"breaks off: {float(actual):.1f} of {float(stated):.1f} s are there")

    def _decode(self, wanted: Sequence[int], *, seek: bool) -> dict[int, Tensor]:
        """Decodes the frames `wanted`, ascending numbers. Seeks only forward, over parts that are not wanted."""
        images: dict[int, Tensor] = {}
        keys = sorted(self._keys) if seek else [0]
        frames: Iterator[tuple[int, Any]] | None = None
        last = -1  # number of the frame decoded last
        for index in wanted:
            key = keys[bisect_right(keys, index) - 1]
            if frames is None or key > last + 1:
                frames, last = self._decode_from(key if seek else None), key - 1
            while last < index:
                step = next(frames, None)
                if step is None:
                    raise _MissingFrameError(f"frame {index} of {len(self)} can't be decoded")
                number, frame = step
                if number <= last:  # displayed before the keyframe: belongs to the part that was skipped
                    continue
                if frame.is_corrupt:
                    raise _MissingFrameError(f"is damaged: frame {number} of {len(self)} is incomplete")
                last = number
            if last > index:
                raise _MissingFrameError(f"frame {index} of {len(self)} can't be decoded")
            images[index] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        return images

    def _decode_from(self, key: int | None) -> Iterator[tuple[int, Any]]:
        """Yields (number, frame) from keyframe number `key`, or from the beginning of the file if it is None."""
        if key is None:
            self.close()  # not every container can seek to its beginning
            self._open()
        else:
            self._container.seek(self._keys[key], stream=self._stream)
        for count, frame in enumerate(self._container.decode(self._stream)):
            number = count if self._times is None else self._numbers.get(frame.pts)  # None: not shown
            if number is not None:
                yield number, frame

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            empty = self.path.is_file() and not self.path.stat().st_size
            reason = "it is empty" if empty else error.strerror or str(error)
            raise UnreadableVideo(self.path, f"can't be read as a video ({reason})") from error


class FrameFolder:
    """A folder of frames, jpg and png, in the natural order of their names (``img_2`` comes before ``img_10``).

    ``len()`` is the number of frames.

    Raises:
        UnreadableVideo: the folder does not exist or has no image in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UnreadableVideo(path, "there is no such folder")
        self.files = sorted((file for file in self.path.iterdir() if _is_image(file.name)), key=_natural)
        if not self.files:
            raise UnreadableVideo(path, f"expected a folder with {', '.join(sorted(_IMAGES))} files, found none")

    def __len__(self) -> int:
        return len(self.files)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, indices: Iterable[int]) -> Tensor:
        """Reads frames like `VideoFile.read`."""
        indices = _check_indices(indices, len(self))
        frames = {index: self._read(self.files[index]) for index in set(indices)}
        return _stack(self.path, [frames[index] for index in indices])

    def _read(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises for bad files
            raise UnreadableVideo(self.path, f"{file.name} can't be read as an image ({error})") from error


def open_video(path: str | Path) -> VideoFile | FrameFolder:
    """Opens a video file or a folder of frames, whichever the path leads to.

    Raises:
        UnreadableVideo: for the reasons of `VideoFile` and `FrameFolder`.
    """
    try:
        return FrameFolder(path) if Path(path).is_dir() else VideoFile(path)
    except OSError as error:  # no permission, a network file system that is gone
        raise UnreadableVideo(path, str(error)) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def count_images(folder: str | Path) -> int:
    """The number of frames in a folder, without sorting them."""
    with os.scandir(folder) as entries:
        return sum(_is_image(entry.name) for entry in entries)


def count_frames(path: str | Path) -> int:
    """The number of frames of a video. Raises like `open_video`."""
    with open_video(path) as video:
        return len(video)


def read_frames_at(path: str | Path, indices: Iterable[int]) -> Tensor:
    """Frames of a video, uint8 RGB (len(indices), 3, H, W). Raises like `open_video` and `VideoFile.read`."""
    with open_video(path) as video:
        return video.read(indices)


def _check_indices(indices: Iterable[int], total: int) -> list[int]:
    numbers = [int(index) for index in indices]
    if not numbers:
        raise IndexError("indices: expected at least one, got none")
    if min(numbers) < 0 or max(numbers) >= total:
        raise IndexError(f"indices: expected them in [0, {total}), got {min(numbers)} to {max(numbers)}")
    return numbers


def _stack(path: Path, frames: list[Tensor]) -> Tensor:
    """Stacks frames (H, W, 3) to (T, 3, H, W)."""
    shapes = {(frame.shape[1], frame.shape[0]) for frame in frames}
    if len(shapes) > 1:
        raise UnreadableVideo(path, f"has frames of several sizes: {sorted(shapes)}")
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()


def _natural(file: Path) -> list[tuple[int, str]]:
    """A sort key that compares numbers in file names by value."""
    parts = re.split(r"([0-9]+)", file.name)
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)]
