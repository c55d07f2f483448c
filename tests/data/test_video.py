"""Reading frames of files and folders by number."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from amflow_models.cli.offline import CLIPS, clip_path
from amflow_models.data import FrameFolder, UnreadableVideo, VideoFile, count_frames, open_video, read_frames_at
from PIL import Image
from video_files import FRAMES, decode_all, write_video

PADDED = {"movflags": "faststart"}  # the header comes first, so that a truncated file still opens


def check_reading(path: Path, count: int) -> None:
    """Checks that frames read in any order are those of decoding the whole file."""
    expected = decode_all(path)
    rng = np.random.default_rng(1)
    choices: list[list[int]] = [
        [0],
        [count - 1],
        [count // 2],
        list(range(0, count, 7)),
        [count // 8, count // 8, count // 9, count - 1, 0],
    ]
    choices += [rng.integers(0, count, size).tolist() for size in (1, 2, 3, 8)]
    with VideoFile(path) as video:
        assert len(video) == count == len(expected)
        for indices in [*choices, range(count)]:
            frames = video.read(indices)
            assert frames.dtype == torch.uint8
            assert torch.equal(frames, expected[list(indices)]), list(indices)
    for indices in choices[:5]:
        assert torch.equal(read_frames_at(path, indices), expected[indices])


MANY_B = {"x264-params": "bframes=5:b-adapt=0:scenecut=0"}


FILES: dict[str, Callable[[Path], Path]] = {
    "B-frames": lambda folder: write_video(folder / "a.mp4", options=MANY_B),
    "B-frames, short groups": lambda folder: write_video(folder / "a.mp4", options=MANY_B, gop=3),
    "only keyframes": lambda folder: write_video(folder / "a.mp4", gop=1),
    "one long group": lambda folder: write_video(folder / "a.mp4", gop=250),
    "open groups": lambda folder: write_video(folder / "a.mp4", options={"x264-params": "open-gop=1:bframes=3"}),
    "intra refresh": lambda folder: write_video(folder / "a.mp4", options={"x264-params": "intra-refresh=1"}),
    "starts late": lambda folder: write_video(folder / "a.mp4", start=5000),
    "starts late, mkv": lambda folder: write_video(folder / "a.mkv", start=5000),
    "variable rate": lambda folder: write_video(folder / "a.mp4", varying=True),
    "variable rate, webm": lambda folder: write_video(folder / "a.webm", codec="libvpx-vp9", varying=True),
    "vp9": lambda folder: write_video(folder / "a.webm", codec="libvpx-vp9", options={"cpu-used": "8"}),
    "vp8": lambda folder: write_video(folder / "a.webm", codec="libvpx", options={"cpu-used": "8"}),
    "mpeg4": lambda folder: write_video(folder / "a.mp4", codec="mpeg4"),
    "no count, no duration": lambda folder: write_video(folder / "a.mkv", options={}, container_options={"live": "1"}),
    "no times": lambda folder: write_video(folder / "a.avi"),
    "raw": lambda folder: write_video(folder / "a.h264"),
    "transport stream": lambda folder: write_video(folder / "a.ts"),
    "one frame": lambda folder: write_video(folder / "a.mp4", frames=1),
    "odd size": lambda folder: write_video(folder / "a.mp4", codec="mpeg4", size=(34, 46)),
    "name with spaces": lambda folder: write_video(folder / "my video é.mp4"),
}


@pytest.mark.parametrize("name", FILES)
def test_frames_by_number_are_those_of_decoding_the_whole_file(tmp_path: Path, name: str) -> None:
    check_reading(FILES[name](tmp_path), 1 if name == "one frame" else FRAMES)


@pytest.mark.demo
@pytest.mark.parametrize("clip", CLIPS)
def test_frames_of_real_clips_are_those_of_decoding_them(clip: str) -> None:
    path = clip_path(clip)
    with av.open(str(path)) as container:
        wanted = sorted({0, 1, 29, 31, 100, 119})
        expected = {
            number: torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            for number, frame in zip(range(120), container.decode(video=0), strict=False)
            if number in wanted
        }
    frames = read_frames_at(path, wanted)
    assert all(torch.equal(frame, expected[number]) for number, frame in zip(wanted, frames, strict=True))


@pytest.mark.parametrize(("drop", "earlier", "count"), [(0, 5, FRAMES - 5), (0, 15, FRAMES - 15), (3, 5, FRAMES - 12)])
def test_hidden_and_undecodable_frames_do_not_count(tmp_path: Path, drop: int, earlier: int, count: int) -> None:
    """Frames that an edit list hides, and frames before the first keyframe."""
    path = tmp_path / "cut.mp4"
    write_video(path, drop=drop, earlier=earlier, container_options={"avoid_negative_ts": "disabled"})
    check_reading(path, count)


class Decoded:
    """Counts decoded frames, and records seeks by their keyframe."""

    def __init__(self, video: VideoFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames, self.seeks = 0, []
        decode = video._decode_from

        def counted(key: int | None) -> Iterator[tuple[int, Any]]:
            self.seeks.append(key)
            for step in decode(key):
                self.frames += 1
                yield step

        monkeypatch.setattr(video, "_decode_from", counted)


def test_reading_seeks_forward_only_and_decodes_no_more_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps decoding within a group of pictures and into the next one."""
    path = write_video(tmp_path / "a.mp4", gop=10, options={"x264-params": "scenecut=0"})
    with VideoFile(path) as video:
        decoded = Decoded(video, monkeypatch)
        video.read([33, 31])
        assert (decoded.seeks, decoded.frames) == ([30], 4)
        decoded = Decoded(video, monkeypatch)
        video.read([5, 2, 9, 10, 35, 11])
        assert decoded.seeks == [0, 30]
        assert decoded.frames == 12 + 6


def test_indices_out_of_range_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5)
    for indices in ([5], [-1], [0, 7], []):
        with pytest.raises(IndexError, match="indices: expected"):
            read_frames_at(path, indices)


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def damage(path: Path) -> Path:
    """Overwrites the middle frame with bytes that no decoder accepts; noise might decode to a wrong picture."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    middle = packets[len(packets) // 2]
    content = bytearray(path.read_bytes())
    content[middle.pos : middle.pos + middle.size] = b"\xff" * middle.size
    path.write_bytes(content)
    return path


def write_text(path: Path) -> Path:
    path.write_text("this is no video\n" * 100)
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_nothing(path: Path) -> Path:
    path.touch()
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "a.mp4", "there is no such file"),
    "empty": (lambda folder: write_nothing(folder / "a.mp4"), "it is empty"),
    "text": (lambda folder: write_text(folder / "a.mp4"), "can't be read as a video"),
    "sound": (lambda folder: write_sound(folder / "a.mp4"), "holds no video stream"),
    "cut, without header": (lambda folder: cut(write_video(folder / "a.mp4"), 0.5), "can't be read as a video"),
    "cut": (
        lambda folder: cut(write_video(folder / "a.mp4", container_options=PADDED), 0.5),
        "breaks off",
    ),
    "cut webm": (lambda folder: cut(write_video(folder / "a.webm", codec="libvpx-vp9"), 0.5), "breaks off"),
    "cut mkv": (lambda folder: cut(write_video(folder / "a.mkv"), 0.5), "breaks off"),
    "damaged": (lambda folder: damage(write_video(folder / "a.mp4")), "is damaged|can't be read as a video"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_files_say_why(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = make(tmp_path)
    with pytest.raises(UnreadableVideo, match=reason) as error, open_video(path) as video:
        video.read(range(len(video)))
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"


@pytest.mark.parametrize(
    "share",
    [
        0.3,
        0.66,
        0.97,
        *(pytest.param(share, marks=pytest.mark.slow) for share in np.linspace(0.02, 0.98, 25).tolist()),
    ],
)
def test_a_truncated_file_is_an_error_or_yields_frames_of_the_whole_one(tmp_path: Path, share: float) -> None:
    for name, options in (("a.mp4", PADDED), ("a.mkv", {}), ("a.ts", {})):
        path = write_video(tmp_path / name, frames=30, container_options=options)
        expected = decode_all(path)
        try:
            with VideoFile(cut(path, share)) as video:
                frames = video.read(range(len(video)))
        except UnreadableVideo:
            continue
        complete = len(frames) - (name != "a.mp4")  # other containers may lose a part of the last one, see `VideoFile`
        assert torch.equal(frames[:complete], expected[:complete]), name


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "it is empty")))
    assert (type(error), str(error), error.reason) == (UnreadableVideo, "a.mp4: it is empty", "it is empty")


def test_frames_of_several_sizes_are_refused(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(UnreadableVideo, match="several sizes"):
        read_frames_at(tmp_path, [0, 1])


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    """All images as RGB; other files do not count."""
    for number in (10, 9, 1, 2, 100):
        Image.new("RGB", (8, 6), (number, 2 * number, 0)).save(tmp_path / f"img_{number}.png")
    Image.new("L", (8, 6), 3).save(tmp_path / "img_3.PNG")
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "img_200.jpg")
    (tmp_path / "notes.txt").write_text("nothing")
    assert count_frames(tmp_path) == 7
    frames = read_frames_at(tmp_path, [0, 1, 2, 3, 4, 5, 1, 0])
    assert frames.shape == (8, 3, 6, 8)
    assert frames[:, :2, 0, 0].tolist() == [
        [1, 2], [2, 4], [3, 3], [9, 18], [10, 20], [100, 200], [2, 4], [1, 2],
    ]  # fmt: skip
    assert (read_frames_at(tmp_path, [6])[0, :, 0, 0] - torch.tensor([200, 100, 50])).abs().max() < 4


def test_bad_folders_and_images_say_why(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="found none"):
        open_video(tmp_path)
    with pytest.raises(UnreadableVideo, match="there is no such folder"):
        FrameFolder(tmp_path / "no")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.jpg")
    for bad in (lambda: cut(tmp_path / "1.jpg", 0.5), lambda: write_text(tmp_path / "1.jpg")):
        bad()
        with pytest.raises(UnreadableVideo, match=r"1.jpg can't be read as an image"):
            read_frames_at(tmp_path, [0])
    with pytest.raises(IndexError, match="indices"):
        read_frames_at(tmp_path, [1])
