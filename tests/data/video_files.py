"""Video files that the tests write, and an oracle that decodes all of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
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
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
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
