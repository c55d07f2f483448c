"""Tables of frames: from the index of a file, from its packets, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from amflow_models.data import UnreadableVideo, VideoFile, read_frames_at, tables, video
from amflow_models.data.tables import FrameTable
from video_files import FRAMES, decode_all, write_video

MANY_B = {"x264-params": "bframes=5:b-adapt=0:scenecut=0"}


@pytest.fixture(autouse=True)
def _no_kept_tables() -> None:
    tables.forget()


def add_sound(path: Path) -> Path:
    """Copies a video beside a sound track, whose packets stand between those of the video."""
    target = path.with_name("sound.mp4")
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        sound: Any = container.add_stream("aac", rate=8000, layout="mono")
        copy = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            container.mux(sound.encode(frame))
            packet.stream = copy
            container.mux(packet)
        container.mux(sound.encode(None))
    return target


INDEXED: dict[str, Callable[[Path], Path]] = {
    "B-frames": lambda folder: write_video(folder / "a.mp4", options=MANY_B),
    "open groups": lambda folder: write_video(folder / "a.mp4", options={"x264-params": "open-gop=1:bframes=3"}),
    "intra refresh": lambda folder: write_video(folder / "a.mp4", options={"x264-params": "intra-refresh=1"}),
    "only keyframes": lambda folder: write_video(folder / "a.mp4", gop=1),
    "one frame": lambda folder: write_video(folder / "a.mp4", frames=1),
    "index first": lambda folder: write_video(folder / "a.mp4", container_options={"movflags": "faststart"}),
    "negative offsets": lambda folder: write_video(
        folder / "a.mp4", options=MANY_B, container_options={"movflags": "negative_cts_offsets"}
    ),
    "starts late": lambda folder: write_video(folder / "a.mp4", start=5000, options=MANY_B),
    "variable rate": lambda folder: write_video(folder / "a.mp4", varying=True, options={"bf": "0"}),
    "mpeg4": lambda folder: write_video(folder / "a.mp4", codec="mpeg4", options={"bf": "2"}),
    "vp9": lambda folder: write_video(folder / "a.mp4", codec="libvpx-vp9", options={"cpu-used": "8"}),
    "hevc": lambda folder: write_video(folder / "a.mp4", codec="libx265", options={"x265-params": "log-level=error"}),
    "quicktime": lambda folder: write_video(folder / "a.mov"),
    "sound": lambda folder: add_sound(write_video(folder / "a.mp4", options=MANY_B)),
}
NOT_INDEXED: dict[str, Callable[[Path], Path]] = {
    "fragments": lambda folder: write_video(
        folder / "a.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "hidden frames": lambda folder: write_video(
        folder / "a.mp4", earlier=5, container_options={"avoid_negative_ts": "disabled"}
    ),
    "variable rate, B-frames": lambda folder: write_video(folder / "a.mp4", varying=True, options=MANY_B),
    "mkv": lambda folder: write_video(folder / "a.mkv"),
}


def table_of(path: Path, monkeypatch: pytest.MonkeyPatch, *, indexed: bool) -> FrameTable:
    """The table of a file from its index only, or from its packets only."""
    tables.forget()
    with monkeypatch.context() as patch:
        if indexed:
            patch.delattr(VideoFile, "_packets")
        else:
            patch.setattr(VideoFile, "_indexed_samples", lambda _: None)
        with VideoFile(path) as opened:
            return opened._table


@pytest.mark.parametrize("name", INDEXED)
def test_the_index_of_a_file_tells_what_its_packets_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = INDEXED[name](tmp_path)
    ours, theirs = (table_of(path, monkeypatch, indexed=indexed) for indexed in (True, False))
    assert ours.total == theirs.total == (1 if name == "one frame" else FRAMES)
    for part in ("times", "keys", "seeks"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part)), part
    assert len(ours.keys) > 1 or name in ("one frame", "intra refresh")
    expected = decode_all(path)
    for number in range(0, ours.total, 3):
        assert torch.equal(read_frames_at(path, [number])[0], expected[number])


@pytest.mark.parametrize("name", NOT_INDEXED)
def test_packets_tell_where_the_index_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = NOT_INDEXED[name](tmp_path)
    with pytest.raises(AttributeError, match="_packets"):
        table_of(path, monkeypatch, indexed=True)
    expected = decode_all(path)
    with VideoFile(path) as opened:
        assert torch.equal(opened.read(range(len(opened))), expected)
        assert torch.equal(opened.read([len(expected) - 1, 20]), expected[[-1, 20]])


AVI: dict[str, tuple[dict[str, Any], bool]] = {
    "mpeg4": ({"codec": "mpeg4", "gop": 8}, True),
    "mjpeg": ({"codec": "mjpeg", "pixels": "yuvj420p"}, True),
    "mpeg4, B-frames": ({"codec": "mpeg4", "options": {"bf": "2"}}, False),
    "mpeg4, no keyframe at the start": ({"codec": "mpeg4", "gop": 8, "drop": 3}, False),
    "h264": ({}, False),
    "h264, no B-frames": ({"options": {"bf": "0"}}, False),
}


@pytest.mark.parametrize("name", AVI)
def test_avi_files_are_sought_only_if_each_packet_is_the_next_frame(tmp_path: Path, name: str) -> None:
    """Otherwise they are decoded from the beginning."""
    options, sought = AVI[name]
    path = write_video(tmp_path / "a.avi", **options)
    expected = decode_all(path)
    with VideoFile(path) as opened:
        assert (opened._table.times is not None) == sought
        assert torch.equal(opened.read(range(len(opened))), expected)
        assert torch.equal(opened.read([25, 30]), expected[[25, 30]])
        wrong = np.arange(1000, 1000 + len(expected))
        opened._table = FrameTable(len(expected), wrong, *(np.zeros(1, np.int64),) * 2)
        assert torch.equal(opened.read([25, 30]), expected[[25, 30]])  # where the packets were wrong


def not_coded(content: bytes) -> bytes:
    """The header of an MPEG-4 picture (25 frames per second), with the bit that says that nothing follows."""
    header = content[:10]
    bits = "".join(f"{byte:08b}" for byte in header[4:])
    place = bits.index("0", 2) + 1 + 1 + 5 + 1  # after the type, whole seconds, a marker, the time and a marker
    assert bits[place] == "1"
    bits = bits[:place] + "0" + "01111111"
    bits = bits[: len(bits) // 8 * 8]
    return header[:4] + int(bits, 2).to_bytes(len(bits) // 8, "big")


def test_pictures_that_repeat_the_one_before_are_not_counted_as_frames(tmp_path: Path) -> None:
    """Encoders for MPEG-4 write a header only, which FFmpeg's decoder leaves out."""
    path = write_video(tmp_path / "a.avi", codec="mpeg4", gop=8)
    with av.open(str(path)) as source, av.open(str(tmp_path / "repeats.avi"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            content = bytes(packet)
            copy = av.Packet(not_coded(content) if number in (10, 11, 20) else content)
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            container.mux(copy)
    expected = decode_all(tmp_path / "repeats.avi")
    assert len(expected) == FRAMES - 3
    with VideoFile(tmp_path / "repeats.avi") as opened:
        assert opened._table.times is None
        assert torch.equal(opened.read(range(len(opened))), expected)


def test_a_broken_index_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in its boxes, the packets decide."""
    path = write_video(tmp_path / "a.mp4", options=MANY_B)
    content, expected = path.read_bytes(), decode_all(path)
    for name in (b"stts", b"ctts", b"stss", b"stsc"):
        broken = bytearray(content)
        broken[content.index(name) + 11] += 1  # the number of entries
        path.write_bytes(broken)
        try:
            with VideoFile(path) as opened:
                assert torch.equal(opened.read([0, 33]), expected[[0, 33]]), name
        except UnreadableVideo:
            continue


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the bytes that Linux says were read")
def test_a_clip_of_a_long_video_reads_no_more_of_the_file_than_that_of_a_short_one(tmp_path: Path) -> None:
    def bytes_read(path: Path, number: int) -> int:
        def count() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        before = count()
        read_frames_at(path, [number])
        return count() - before

    short = write_video(tmp_path / "short.mp4", frames=30, size=(96, 128))
    long = write_video(tmp_path / "long.mp4", frames=600, size=(96, 128))
    assert os.path.getsize(long) > 8 * os.path.getsize(short)
    spare = 3 * os.path.getsize(short)  # the index, and a buffer wherever the file is sought
    assert bytes_read(long, 500) < bytes_read(short, 20) + spare < os.path.getsize(long) / 2


def test_a_file_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it changes."""
    made = []
    monkeypatch.setattr(
        video, "kept_table", lambda file, make: tables.kept_table(file, lambda: made.append(file) or make())
    )
    paths = [write_video(tmp_path / name) for name in ("a.mp4", "b.mkv", "c.h264")]
    expected = [decode_all(path) for path in paths]
    for _ in range(3):
        for path, frames in zip(paths, expected, strict=True):
            assert torch.equal(read_frames_at(path, [30, 7]), frames[[30, 7]])
    assert len(made) == 3
    write_video(paths[0], frames=20)
    assert torch.equal(read_frames_at(paths[0], [11]), decode_all(paths[0])[11:12])
    assert len(made) == 4


def test_kept_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones that were used last stay."""
    table = FrameTable(100, np.arange(100), np.zeros(1, np.int64), np.zeros(1, np.int64))
    monkeypatch.setattr(tables, "_KEPT", 3 * table.nbytes)
    for name in ("a", "b", "c", "a", "d"):
        tables.kept_table(name, lambda: table)
    assert list(tables._kept.tables) == ["c", "a", "d"]
    assert tables._kept.size == 3 * table.nbytes
