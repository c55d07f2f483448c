"""Reading frames of files by number."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from amflow_models.cli.offline import CLIPS, clip_path
from amflow_models.data import UnreadableVideo, VideoFile, open_video, read_frames_at
from PIL import Image
from video_files import FRAMES, decode_all, set_display_matrix, write_video, write_with_cover

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
    "avi": lambda folder: write_video(folder / "a.avi"),
    "avi, mpeg4": lambda folder: write_video(folder / "a.avi", codec="mpeg4"),
    "avi, mpeg4 with B-frames": lambda folder: write_video(folder / "a.avi", codec="mpeg4", options={"bf": "2"}),
    "avi, mjpeg": lambda folder: write_video(folder / "a.avi", codec="mjpeg", pixels="yuvj420p"),
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


@pytest.mark.parametrize("share", [0.3, 0.66])
def test_frames_are_also_read_one_by_one(tmp_path: Path, share: float) -> None:
    """Numbers must ascend; a file that can't be read from the middle is read from its start."""
    path = write_video(tmp_path / "a.mp4")
    expected = decode_all(path)
    with VideoFile(path) as video:
        assert all(map(torch.equal, video.iterate(range(3, FRAMES, 5)), expected[3::5]))
        assert list(video.iterate([])) == []
        for indices, error in (([3, 2], ValueError), ([2, 2], ValueError), ([0, FRAMES], IndexError)):
            with pytest.raises(error, match="indices: expected"):
                list(video.iterate(indices))

        decode = video._decode_from

        def fails_in_the_middle(key: int | None) -> Iterator[tuple[int, Any]]:
            for number, frame in decode(key):
                if key is not None and number > share * FRAMES:
                    return
                yield number, frame

        video._decode_from = fails_in_the_middle  # type: ignore[method-assign]
        assert all(map(torch.equal, video.iterate(range(FRAMES)), expected))


MATRICES: dict[str, list[list[float]]] = {
    "turned by 90": [[0, 1], [-1, 0]],
    "turned by 180": [[-1, 0], [0, -1]],
    "turned by 270": [[0, -1], [1, 0]],
    "mirrored": [[-1, 0], [0, 1]],
    "upside down": [[1, 0], [0, -1]],
    "transposed": [[0, 1], [1, 0]],
    "transposed and turned by 180": [[0, -1], [-1, 0]],
    "nearly turned by 90": [[0.01, 1], [-1, 0.01]],
}


@pytest.mark.parametrize("name", MATRICES)
def test_frames_are_turned_upright_by_the_display_matrix(tmp_path: Path, name: str) -> None:
    """As phones write it. The oracle moves each pixel to its place."""
    path = write_video(tmp_path / "a.mp4", frames=15)
    stored = decode_all(path)
    (a, b), (c, d) = np.rint(MATRICES[name]).astype(int).tolist()
    y, x = np.mgrid[:48, :64]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    expected = torch.zeros(15, 3, shown_y.max() + 1, shown_x.max() + 1, dtype=torch.uint8)
    expected[:, :, shown_y, shown_x] = stored
    set_display_matrix(path, MATRICES[name])
    with VideoFile(path) as video:
        assert torch.equal(video.read(range(15)), expected)
        assert all(map(torch.equal, video.iterate([4, 9]), expected[[4, 9]]))
    if name.startswith("turned"):
        with av.open(str(path)) as container:
            quarters = next(container.decode(video=0)).rotation // 90  # counterclockwise
        assert torch.equal(expected, torch.rot90(stored, quarters, (2, 3)))


def test_a_forked_process_can_free_what_reading_left_behind(tmp_path: Path) -> None:
    """Loader processes are forked; in them, threads of the parent process are not there to be ended."""
    path = write_video(tmp_path / "a.mp4", frames=5)
    gc.collect()
    gc.disable()
    try:
        for video in (path, set_display_matrix(path, MATRICES["turned by 90"])):
            read_frames_at(video, [0, 3])
        process = multiprocessing.get_context("fork").Process(target=gc.collect)
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        gc.enable()
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that Linux lists")
def test_reading_starts_no_threads(tmp_path: Path) -> None:
    """Loader processes are many; threads for each core in each of them would slow each other down."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    path = write_video(tmp_path / "a.mp4", size=(256, 256))
    before = threads()
    with VideoFile(path) as opened:
        frames = opened.iterate(range(FRAMES))
        for _ in frames:
            assert threads() == before


def test_a_display_matrix_without_a_direction_turns_nothing(tmp_path: Path) -> None:
    """Some programs write zeros."""
    path = write_video(tmp_path / "a.mp4", frames=3)
    expected = decode_all(path)
    assert torch.equal(read_frames_at(set_display_matrix(path, [[0, 0], [0, 0]]), range(3)), expected)


@pytest.mark.parametrize("matrix", [[[0.8, 0.6], [-0.6, 0.8]], [[1, 0.1], [0, 1]]])
def test_other_display_matrices_are_refused(tmp_path: Path, matrix: list[list[float]]) -> None:
    path = set_display_matrix(write_video(tmp_path / "a.mp4", frames=3), matrix)
    with pytest.raises(UnreadableVideo, match="is rotated by an angle that is not a multiple of 90 degrees"):
        read_frames_at(path, [0])


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    frames = read_frames_at(write_with_cover(tmp_path / "a.mp4"), range(5))
    assert frames.shape == (5, 3, 48, 64)
    assert frames.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 50, 100, 150, 200], abs=2)
    with pytest.raises(UnreadableVideo, match="holds no video stream"):
        open_video(write_with_cover(tmp_path / "song.mp4", only_cover=True))


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "file:c.mp4", "-i.mp4", "%03d.mp4", "pipe:0", "~", "a|b.mp4"]
)
def test_every_file_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Relative names too, in which FFmpeg would see a protocol."""
    content = write_video(tmp_path / "original.mp4").read_bytes()
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), tmp_path / name):
        assert torch.equal(read_frames_at(path, [7]), decode_all(tmp_path / "original.mp4")[7:8])


def test_a_picture_is_not_read_as_a_pattern_of_others(tmp_path: Path) -> None:
    """FFmpeg would read 1.jpg and 2.jpg."""
    for number in (1, 2):
        Image.new("L", (16, 16), 50 * number).save(tmp_path / f"{number}.jpg")
    Image.new("L", (16, 16), 200).save(tmp_path / "%d.jpg")
    with open_video(tmp_path / "%d.jpg") as video:
        assert len(video) == 1
        assert abs(video.read([0]).float().mean() - 200) < 2
