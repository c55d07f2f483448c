"""Joined and damaged transport streams: FFmpeg marks packets of both as corrupt."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from amflow_models.data import UnreadableVideo, VideoFile, open_video
from amflow_models.data.transport import breaks_only_at_joins
from video_files import decode_all, write_video

SIZE = 188  # bytes of a packet
CODECS = {"libx264": {}, "libx265": {"x265-params": "log-level=none"}, "mpeg2video": {}}


def write(path: Path, codec: str = "libx264", *, frames: int = 30, start: int = 0) -> Path:
    return write_video(path, codec=codec, frames=frames, start=start, gop=10, options=CODECS[codec])


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def corrupt_packets(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.is_corrupt for packet in container.demux(video=0))


@pytest.mark.parametrize(
    ("codec", "starts"),
    [(codec, (0, 0)) for codec in CODECS]
    + [(codec, starts) for codec in ("libx264", "libx265") for starts in ((5000, 0), (0, 1200), (0, 9000))],
)
def test_joined_transport_streams_are_read_one_after_the_other(
    tmp_path: Path, codec: str, starts: tuple[int, int]
) -> None:
    """Whether time falls back, goes on or jumps."""
    parts = [write(tmp_path / f"{n}.ts", codec, start=start, frames=30 + n) for n, start in enumerate(starts)]
    path = join(tmp_path / "joined.ts", *parts)
    assert corrupt_packets(path) == 1
    expected = torch.cat([decode_all(part) for part in parts])
    with VideoFile(path) as video:
        assert len(video) == 61
        for indices in (range(61), [45], [29, 30], [60, 3]):
            assert torch.equal(video.read(indices), expected[list(indices)])


def test_joined_files_of_camcorders_are_read_one_after_the_other(tmp_path: Path) -> None:
    """They have four bytes before each packet."""
    parts = [write(tmp_path / f"{n}.m2ts", frames=30 + n) for n in range(2)]
    path = join(tmp_path / "joined.m2ts", *parts)
    assert corrupt_packets(path) == 1
    with VideoFile(path) as video:
        assert torch.equal(video.read(range(61)), torch.cat([decode_all(part) for part in parts]))


def packets(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[at : at + SIZE] for at in range(0, len(content), SIZE)]


def video_rows(path: Path) -> tuple[list[int], list[int]]:
    """The places of all packets of the video, and of those that begin a frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0].id
    rows = [n for n, p in enumerate(packets(path)) if (p[1] & 0x1F) << 8 | p[2] == stream]
    return rows, [n for n in rows if packets(path)[n][1] & 0x40]


@pytest.mark.parametrize("codec", CODECS)
def test_lost_packets_are_detected(tmp_path: Path, codec: str) -> None:
    """In a keyframe, in another frame, or a whole frame; also behind or before a join."""
    whole = write(tmp_path / "a.ts", codec)
    rows, starts = video_rows(whole)
    second = starts[10]
    losses = {
        "the middle of a keyframe": (second + 5, 2),
        "the start of a keyframe": (second, 2),
        "the middle of a frame": (rows[rows.index(starts[5]) + 1], 1),
        "a whole frame": (starts[15], starts[16] - starts[15]),
        "a frame's end and the next one's start": (starts[16] - 1, 2),
    }
    for name, (at, count) in losses.items():
        left = packets(whole)
        del left[at : at + count]
        path = tmp_path / "lost.ts"
        path.write_bytes(b"".join(left))
        assert corrupt_packets(path) > 0, name
        for parts in ([path], [whole, path], [path, whole]):
            joined = join(tmp_path / "joined.ts", *parts)
            with pytest.raises(UnreadableVideo, match="breaks off, or is damaged"):
                open_video(joined)


def test_a_lost_end_of_a_frame_before_a_keyframe_is_no_join(tmp_path: Path) -> None:
    """A program table stands there, as at a join, but its counter goes on."""
    whole = write(tmp_path / "a.ts")
    rows, starts = video_rows(whole)
    last = rows[rows.index(starts[10]) - 1]
    left = packets(whole)
    assert any((packet[1] & 0x1F) << 8 | packet[2] == 0 for packet in left[last : starts[10]])
    del left[last]
    path = tmp_path / "lost.ts"
    path.write_bytes(b"".join(left))
    with pytest.raises(UnreadableVideo, match="breaks off, or is damaged"):
        open_video(path)


def test_packets_received_with_errors_are_detected(tmp_path: Path) -> None:
    """Also in joined files, where the counters only jump at the join."""
    whole = write(tmp_path / "a.ts")
    content = bytearray(whole.read_bytes())
    content[video_rows(whole)[0][40] * SIZE + 1] |= 0x80
    (tmp_path / "errors.ts").write_bytes(content)
    with pytest.raises(UnreadableVideo, match="breaks off, or is damaged"):
        open_video(join(tmp_path / "joined.ts", whole, tmp_path / "errors.ts"))


def test_a_truncated_file_within_a_joined_one_loses_no_more_than_its_last_frame(tmp_path: Path) -> None:
    """As where nothing follows it; often the damage is detected."""
    whole = write(tmp_path / "a.ts")
    expected = decode_all(whole)
    cut = tmp_path / "cut.ts"
    detected = 0
    for share in np.linspace(0.2, 0.95, 9):
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        try:
            with VideoFile(join(tmp_path / "joined.ts", cut, whole)) as video:
                frames = video.read(range(len(video)))
        except UnreadableVideo:
            detected += 1
            continue
        complete = len(frames) - 30 - 1
        assert torch.equal(frames[:complete], expected[:complete])
        assert torch.equal(frames[complete + 1 :], expected)
    assert detected > 4


def test_packets_of_other_streams_may_be_lost(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.ts")
    rows, starts = video_rows(whole)
    left = [packet for n, packet in enumerate(packets(whole)) if n in rows or n < starts[0]]
    path = tmp_path / "tables.ts"
    path.write_bytes(b"".join(left))
    assert breaks_only_at_joins(np.fromfile(path, np.uint8), 256, {})
    assert torch.equal(VideoFile(path).read(range(30)), decode_all(whole))
