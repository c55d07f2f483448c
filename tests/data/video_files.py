"""Video files that the tests write, and an oracle that decodes all of them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 40, 48, 64


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    gop: int = 12,
    frames: int = FRAMES,
    start: int = 0,
    varying: bool = False,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pixels: str = "yuv420p",
    drop: int = 0,
    earlier: int = 0,
    **container_options: Any,
) -> Path:
    """Writes a moving pattern, with a frame every 40 ms from `start` on, or at uneven distances.

    Like a tool that cuts without decoding, it can leave out the first packets (`drop`), and show all frames so many
    frames `earlier` that an edit list hides those before 0.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    rng = np.random.default_rng(0)
    height, width = size
    base = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    time = start
    with av.open(str(path), "w", **container_options) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1  # the same file every time
        if varying or start:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets: list[Any] = []
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, (number, 2 * number), (0, 1)), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += 20 + 37 * number % 90 if varying else 40
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)][drop:]:
            shift = int(earlier / 25 / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            container.mux(packet)
    return path


def decode_all(path: Path) -> Tensor:
    """The oracle: decodes all frames in order."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def set_display_matrix(path: Path, matrix: list[list[float]]) -> Path:
    """Changes the display matrix [[a, b], [c, d]] of the first track of an MP4 file (ISO/IEC 14496-12, `tkhd`).

    A pixel at (x, y) is shown at (a x + c y, b x + d y).
    """
    (a, b), (c, d) = [[round(65536 * x) for x in row] for row in matrix]
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44  # after the version, times, identifier, duration, layer, group and volume
    assert content[place : place + 36] == struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def write_with_cover(path: Path, *, only_cover: bool = False) -> Path:
    """Writes an MP4 file with cover art, whose first video stream is the cover: a white square."""
    with av.open(str(path), "w") as container:
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value  # PyAV 18 takes both
        sound: Any = container.add_stream("aac", rate=8000, layout="mono")
        video: Any = None if only_cover else container.add_stream("libx264", rate=25)
        if video is not None:
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
        for packet in (*cover.encode(picture), *cover.encode(None), *sound.encode(silence), *sound.encode(None)):
            container.mux(packet)
        if video is not None:
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 50 * number, np.uint8), format="rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
    # FFmpeg writes the cover behind the tracks, and numbers streams in the order of the file.
    content = path.read_bytes()
    tracks, cover_box = content.index(b"trak") - 4, content.index(b"udta") - 4
    size = int.from_bytes(content[cover_box : cover_box + 4], "big")
    path.write_bytes(
        content[:tracks]
        + content[cover_box : cover_box + size]
        + content[tracks:cover_box]
        + content[cover_box + size :]
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    return path
