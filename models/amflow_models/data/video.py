"""Reading frames of a video file or of a folder of frames by number, exactly.

Frames are numbered from 0 in display order, as in decoding the whole file. The frame count in a container may be
missing or wrong, so the times of all frames are collected, without decoding: from the index of an MP4 file, otherwise
in one pass over the packets. Frames before the first keyframe, which can't be decoded, do not count, nor do frames that
an edit list hides. How long a frame is shown makes no difference, so variable rates need no special case. Where packets
have no usable times (raw streams, most AVI files) the file is decoded from its beginning and frames are counted; so it
is where the times fall back, as in joined files. AVI does not store the display order: packets are numbered there only
if each surely is the next frame. A process keeps these tables (`tables`), for the next clip of a
file.

Frames are turned upright by the rotation and reflection in a file's metadata (phones). Where pixels are not square,
frames are not stretched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from amflow_models.data.frames import FrameFolder, check_naming
from amflow_models.data.mp4 import BrokenIndexError, read_index
from amflow_models.data.reading import UnreadableVideo, VideoReader
from amflow_models.data.tables import FrameTable, Samples, kept_table, visible
from amflow_models.data.transport import breaks_only_at_joins
from amflow_models.data.videos import Video, archive_of

_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails  # streams of cover art, not the video itself
# Since PyAV 17, a converter of frames starts a thread for each core, unless told otherwise.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
_STRAIGHT = 0.0175  # tan(1 degree): a rotation this close to a multiple of 90 degrees is taken for one, as FFmpeg does


# MPEG-4 Visual (ISO/IEC 14496-2): a picture begins with these bytes, and its type is in the next two bits.
_PICTURE, _B_PICTURE = b"\0\0\1\xb6", 2
_NOT_CODED = 20  # bytes: a picture of which only the header is there repeats the one before, and is not decoded


class _MissingFrameError(Exception):
    """The decoder skipped a frame or returned a damaged one."""


@dataclass(frozen=True)
class _Orientation:
    """How the frames of a video are turned upright."""

    rotation: int  # of the display matrix in degrees, counterclockwise
    transposed: bool  # whether rows and columns are exchanged, before they are mirrored
    mirrored: tuple[int, ...]  # axes whose order is reversed: rows (0), columns (1)


class VideoFile(VideoReader):
    """An open video file. It decodes in one thread, since data loading runs many processes.

    Args:
        path: the file; with `span`, a tar file and the name of the video in it.
        span: of a video in a tar file: where in that file its bytes begin, and their number. They are read at once.

    Raises:
        UnreadableVideo: the file does not exist, is not a video, has no frames, is truncated, or lacks packets. A
            transport stream that another one follows (``cat a.ts b.ts``) lacks none. Truncation can't always be
            detected: a truncated transport stream is a shorter video, and so is a Matroska file that is cut within its
            last half second. The last frame before such a cut may be incomplete, or a later one.
    """

    def __init__(self, path: str | Path, span: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        self._file = self.path if span is None else archive_of(self.path)
        if not self._file.is_file():
            raise UnreadableVideo(path, "there is no such file" if span is None else f"there is no {self._file}")
        self._orientation: _Orientation | None = None
        self._reformatter: Any = None
        with self._errors():
            self._content = None if span is None else _read_span(self._file, *span)
            self._open()
            status = self._file.stat()
            identity = (str(self._file.absolute()), span, status.st_size, status.st_mtime_ns)
            self._table = kept_table(identity, self._make_table)
        if not len(self):
            raise UnreadableVideo(self.path, "holds no frames that can be decoded")

    def __len__(self) -> int:
        return self._table.total

    def close(self) -> None:
        """Closes the file."""
        self._container.close()
        self._reformatter = None

    def _frames(self, wanted: list[int]) -> Iterator[Tensor]:
        done = 0
        with self._errors():
            try:
                for frame in self._decode(wanted, seek=self._table.times is not None):
                    yield frame
                    done += 1
            except (_MissingFrameError, av.error.FFmpegError):
                # Some packets flagged as keyframes are not decodable on their own, and some containers seek to the
                # wrong position: read from the start. What the packets of an AVI file tell is not certain, so count.
                if self._container.format.name == "avi":
                    self._table = FrameTable.counted(len(self))
                try:
                    yield from self._decode(wanted[done:], seek=False)
                except _MissingFrameError as error:
                    raise UnreadableVideo(self.path, str(error)) from None

    def _open(self) -> None:
        # Without "file:", a name with a colon would be a protocol; without the option, that of a picture with "%d" a
        # pattern of other names.
        source = f"file:{self.path}" if self._content is None else BytesIO(self._content)
        self._container: Any = av.open(source, options={"pattern_type": "none"} if self._content is None else {})
        videos = [stream for stream in self._container.streams.video if not stream.disposition & _PICTURES]
        if not videos:
            raise UnreadableVideo(self.path, "holds no video stream")
        self._stream: Any = videos[0]
        if self._stream.codec_context is None:
            raise UnreadableVideo(self.path, "FFmpeg has no decoder for it")
        self._stream.codec_context.thread_count = 1
        self.frame_rate = self._stream.average_rate or None  # 0 where it is not known
        # Without it, each frame has a converter of its own, whose threads a forked process lacks: that process would
        # hang when it frees a frame that its parent left behind.
        self._reformatter = VideoReformatter()

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _make_table(self) -> FrameTable:
        samples = self._indexed_samples()
        if samples is None:
            samples = self._packets()
        if samples is None:
            self._table = FrameTable.counted(0)
            return FrameTable.counted(sum(1 for _ in self._decode_from(None)))
        shown = visible(samples)
        if shown.any():
            ends = samples.times + samples.spans
            self._check_end(min(samples.times[shown].min(), 0), ends[shown].max(), int(shown.sum()))
        return FrameTable.of(samples)

    def _indexed_samples(self) -> Samples | None:
        """The encoded frames, from the index of an MP4 file; None if it does not tell."""
        if "mp4" not in self._container.format.name:
            return None
        try:
            with self.path.open("rb") if self._content is None else BytesIO(self._content) as file:
                samples = read_index(file, self._stream.id)
        except BrokenIndexError:
            raise UnreadableVideo(self.path, "breaks off, or is damaged") from None
        first = next((packet for packet in self._container.demux(self._stream) if packet.size), None)
        if samples is None or first is None or first.pts is None:
            return None
        return replace(samples, times=samples.times + (first.pts - samples.times[0]))  # an edit list moves all times

    def _packets(self) -> Samples | None:
        """The encoded frames, from one pass over the packets; None if their display times are unknown."""
        self._reopen()
        packets: list[tuple[Any, ...]] = []
        restarts: dict[int, bool] = {}  # of keyframes: whether time falls back, by position in the file
        latest: int | None = None  # decoding time
        complete = ordered = True
        avi = self._container.format.name == "avi"
        for packet in self._container.demux(self._stream):
            if not packet.size:  # end of the stream
                continue
            complete = complete and not packet.is_corrupt
            packets.append((packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
            falls = latest is not None and packet.dts is not None and packet.dts < latest
            latest = latest if packet.dts is None else packet.dts
            if packet.is_keyframe:
                restarts[packet.pos] = falls
            ordered = (
                ordered and not falls and not (avi and not _is_next_frame(packet, self._stream.codec_context.codec))
            )
        transport = self._container.format.name == "mpegts"
        if not (complete or (transport and breaks_only_at_joins(self._bytes(), self._stream.id, restarts))):
            raise UnreadableVideo(self.path, "breaks off, or is damaged")
        times = [time for time, *_ in packets]
        if None in times or len(set(times)) < len(times) or not restarts:
            return None
        if avi and not (packets[0][2] and times == sorted(times)):
            return None
        return Samples.of(packets) if ordered else None

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

    def _decode(self, wanted: Sequence[int], *, seek: bool) -> Iterator[Tensor]:
        """Decodes the frames `wanted`, ascending numbers. Seeks only forward, over parts that are not wanted."""
        frames: Iterator[tuple[int, Any]] | None = None
        last = -1  # number of the frame decoded last
        for index in wanted:
            key = self._table.key(index) if seek else 0
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
            yield self._upright(frame)

    def _decode_from(self, key: int | None) -> Iterator[tuple[int, Any]]:
        """Yields (number, frame) from keyframe number `key`, or from the beginning of the file if it is None."""
        if key is None:
            self._reopen()  # not every container can seek to its beginning
        else:
            self._container.seek(self._table.seek(key), stream=self._stream)
        for count, frame in enumerate(self._container.decode(self._stream)):
            number = count if self._table.times is None else self._table.number(frame.pts)  # None: not shown
            if number is not None:
                yield number, frame

    def _upright(self, frame: Any) -> Tensor:
        """A decoded frame as it is meant to be seen, uint8 RGB (H, W, 3)."""
        if self._orientation is None:
            self._orientation = _read_orientation(self.path, frame)
        if frame.rotation != self._orientation.rotation:
            raise UnreadableVideo(self.path, "its rotation changes, expected the same in all frames")
        image = torch.from_numpy(self._reformatter.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray())
        if self._orientation.transposed:
            image = image.transpose(0, 1)
        return image.flip(self._orientation.mirrored) if self._orientation.mirrored else image

    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r") if self._content is None else np.frombuffer(self._content, np.uint8)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            empty = self._file.is_file() and not (self._file.stat().st_size if self._content is None else self._content)
            reason = "it is empty" if empty else error.strerror or str(error)
            raise UnreadableVideo(self.path, f"can't be read as a video ({reason})") from error


def open_video(path: str | Path, template: str | None = None, start_index: int | None = None) -> VideoReader:
    """Opens a video file or a folder of frames, whichever the path leads to.

    Args:
        path: the file or folder.
        template, start_index: the names of a folder's frames, as for `FrameFolder`. A file needs none.

    Raises:
        ValueError, UnreadableVideo: for the reasons of `VideoFile` and `FrameFolder`.
    """
    check_naming(template, start_index)
    try:
        return FrameFolder(path, template, start_index) if Path(path).is_dir() else VideoFile(path)
    except OSError as error:  # no permission, a network file system that is gone
        raise UnreadableVideo(path, str(error)) from error


def open_listed(video: Video) -> VideoReader:
    """Opens a video of a list. Raises what `open_video` does."""
    if video.span is not None:
        return VideoFile(video.path, video.span)
    return open_video(video.path, video.template, video.start_index)


def frames_of(video: Video, available: int) -> int:
    """The number of frames of a video of a list: of a folder, the number in its list.

    Args:
        video: the video.
        available: the number of frames of its file or folder.

    Raises:
        UnreadableVideo: the folder has fewer frames than the list says.
    """
    start = video.start or 0
    frames = available - start if video.frames is None else video.frames
    if start + frames <= available:
        return frames
    reason = f"has {available} frames, and its list says {frames}"
    if start:
        reason += f" from frame {start} on"
    if start and start + frames == available + 1:
        reason += "; starts count from 0, do those of the list count from 1?"
    raise UnreadableVideo(video.path, reason)


def count_frames(path: str | Path, template: str | None = None, start_index: int | None = None) -> int:
    """The number of frames of a video. Takes and raises what `open_video` does."""
    with open_video(path, template, start_index) as video:
        return len(video)


def read_frames_at(
    path: str | Path, indices: Iterable[int], template: str | None = None, start_index: int | None = None
) -> Tensor:
    """Frames of a video, uint8 RGB (len(indices), 3, H, W). Takes and raises what `open_video` and `read` do."""
    with open_video(path, template, start_index) as video:
        return video.read(indices)


def _is_next_frame(packet: Any, codec: Any) -> bool:
    """Whether a packet is decoded to exactly one frame, which is shown after those of the packets before."""
    if codec.intra_only:
        return True
    if codec.name != "mpeg4":
        return False
    content = bytes(packet)
    place = content.find(_PICTURE) + len(_PICTURE)
    single = content.count(_PICTURE) == 1 and _NOT_CODED < len(content) > place
    return single and content[place] >> 6 != _B_PICTURE


def _read_span(file: Path, start: int, size: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        content = opened.read(size)
    if len(content) < size:
        raise OSError(f"{file} breaks off")
    return content


def _read_orientation(path: Path, frame: Any) -> _Orientation:
    """The orientation that the display matrix of a decoded frame gives to the video.

    It is read only once for a file: PyAV frees a frame whose matrix was read only when Python collects cycles.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Orientation(frame.rotation, False, ())
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    (a, b), (c, d) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].tolist()
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > _STRAIGHT * max(straight, turned):
        raise UnreadableVideo(path, "is rotated by an angle that is not a multiple of 90 degrees, or distorted")
    transposed = turned > straight
    signs = (b, c) if transposed else (d, a)  # of the order of rows, and of columns
    return _Orientation(frame.rotation, transposed, tuple(axis for axis, sign in enumerate(signs) if sign < 0))
