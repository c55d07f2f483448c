"""Reading frames, sampling, transforms and data sets."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from amflow_models.cli.offline import CLIPS, clip_path
from amflow_models.data import (
    FrameFolder,
    SyntheticDataset,
    TrainTransform,
    UnreadableVideo,
    Video,
    VideoDataset,
    VideoFile,
    VideoList,
    collate,
    count_frames,
    dense,
    names_directions,
    open_video,
    read_frames_at,
    spatial_crops,
    uniform,
    views,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader

FRAMES, HEIGHT, WIDTH = 40, 48, 64
PADDED = {"movflags": "faststart"}  # the header comes first: a file that is cut off still opens


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
    """A moving pattern. Times in milliseconds: 40 apart from `start` on, or of any distance.

    As a tool that cuts without decoding does, the first packets may be left out (`drop`), and all frames be shown so
    many frames `earlier` that an edit list hides those before 0.
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
    """The oracle: every frame, from the first to the last."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def check_reading(path: Path, count: int) -> None:
    """Any frames, in any order, are those that decoding everything gives."""
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


# Reading files.

MANY_B = {"x264-params": "bframes=5:b-adapt=0:scenecut=0"}
FILES: dict[str, Callable[[Path], Path]] = {
    "B-frames": lambda folder: write_video(folder / "a.mp4", options=MANY_B),
    "B-frames, short groups": lambda folder: write_video(folder / "a.mp4", options=MANY_B, gop=3),
    "keyframes alone": lambda folder: write_video(folder / "a.mp4", gop=1),
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
def test_reading(tmp_path: Path, name: str) -> None:
    check_reading(FILES[name](tmp_path), 1 if name == "one frame" else FRAMES)


@pytest.mark.demo
@pytest.mark.parametrize("clip", CLIPS)
def test_reading_real_clips(clip: str) -> None:
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
def test_reading_cuts(tmp_path: Path, drop: int, earlier: int, count: int) -> None:
    """Frames that an edit list hides do not count, nor do those before the first keyframe."""
    path = tmp_path / "cut.mp4"
    write_video(path, drop=drop, earlier=earlier, container_options={"avoid_negative_ts": "disabled"})
    check_reading(path, count)


class Decoded:
    """Counts the frames that come out of the decoder, and the jumps."""

    def __init__(self, video: VideoFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames, self.jumps = 0, []
        decode = video._decode_from

        def counted(key: int | None) -> Iterator[tuple[int, Any]]:
            self.jumps.append(key)
            for step in decode(key):
                self.frames += 1
                yield step

        monkeypatch.setattr(video, "_decode_from", counted)


def test_decodes_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jumps forward to keyframes, never back; goes on decoding within a group and into the next one."""
    path = write_video(tmp_path / "a.mp4", gop=10, options={"x264-params": "scenecut=0"})
    with VideoFile(path) as video:
        decoded = Decoded(video, monkeypatch)
        video.read([33, 31])
        assert (decoded.jumps, decoded.frames) == ([30], 4)
        decoded = Decoded(video, monkeypatch)
        video.read([5, 2, 9, 10, 35, 11])
        assert decoded.jumps == [0, 30]
        assert decoded.frames == 12 + 6


def test_bad_indices(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5)
    for indices in ([5], [-1], [0, 7], []):
        with pytest.raises(IndexError, match="indices: expected"):
            read_frames_at(path, indices)


# Files that can't be read.


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def damage(path: Path) -> Path:
    """The middle picture becomes what no decoder takes: noise may decode to a wrong picture, without a word."""
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
def test_unreadable(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = make(tmp_path)
    with pytest.raises(UnreadableVideo, match=reason) as error, open_video(path) as video:
        video.read(range(len(video)))
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"


@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 25).tolist())
def test_cut_anywhere(tmp_path: Path, share: float) -> None:
    """Wherever a file breaks off: an error, or frames of the whole file."""
    for name, options in (("a.mp4", PADDED), ("a.mkv", {}), ("a.ts", {})):
        path = write_video(tmp_path / name, frames=30, container_options=options)
        expected = decode_all(path)
        try:
            with VideoFile(cut(path, share)) as video:
                found = video.read(range(len(video)))
        except UnreadableVideo:
            continue
        sure = len(found) - (name != "a.mp4")  # of the others, the last picture may be cut, see `VideoFile`
        assert torch.equal(found[:sure], expected[:sure]), name


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "it is empty")))
    assert (type(error), str(error), error.reason) == (UnreadableVideo, "a.mp4: it is empty", "it is empty")


def test_frames_of_several_sizes(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(UnreadableVideo, match="several sizes"):
        read_frames_at(tmp_path, [0, 1])


# Folders of frames.


def test_folder(tmp_path: Path) -> None:
    """Natural order; all images as RGB; other files do not count."""
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


def test_bad_folders(tmp_path: Path) -> None:
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


# Sampling.

totals, counts, strides = st.integers(1, 200), st.integers(1, 20), st.integers(1, 6)


def check_indices(indices: Tensor, total: int, shape: tuple[int, ...]) -> None:
    assert indices.dtype == torch.int64
    assert indices.shape == shape
    assert indices.min() >= 0
    assert indices.max() < total
    assert (indices.diff() >= 0).all()


@given(totals, counts, strides, st.integers(0, 2**63))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_sampling(total: int, frames: int, stride: int, seed: int) -> None:
    for sample in (
        lambda generator: uniform(total, frames, generator),
        lambda generator: dense(total, frames, stride, generator),
    ):
        check_indices(sample(None), total, (frames,))
        drawn = [sample(Generator().manual_seed(seed)) for _ in range(2)]
        check_indices(drawn[0], total, (frames,))
        assert torch.equal(*drawn)
    if total >= (frames - 1) * stride + 1:
        assert (dense(total, frames, stride, Generator().manual_seed(seed)).diff() == stride).all()
    if total >= frames:
        assert (uniform(total, frames).diff() > 0).all()
        assert (uniform(total, frames, Generator().manual_seed(seed)).diff() >= 0).all()
    else:  # all frames, as evenly as can be
        times = uniform(total, frames).bincount(minlength=total)
        assert times.min() >= 1
        assert times.max() - times.min() <= 1


@given(totals, counts, st.integers(1, 10), st.none() | strides)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_views(total: int, frames: int, clips: int, stride: int | None) -> None:
    found = views(total, frames, clips, stride)
    check_indices(found, total, (clips, frames))
    one = uniform(total, frames) if stride is None else dense(total, frames, stride)
    assert torch.equal(views(total, frames, 1, stride)[0], one)
    if stride is not None and total >= (frames - 1) * stride + 1:
        assert (found.diff() == stride).all()
        if clips > 1:
            assert found[0, 0] == 0
            assert found[-1, -1] == total - 1
    if stride is None and total >= frames * clips:
        assert len(found.unique()) == frames * clips


@pytest.mark.parametrize(("total", "frames"), [(1, 4), (5, 8), (8, 8), (13, 4), (40, 8)])
def test_every_frame_is_reachable(total: int, frames: int) -> None:
    generator = Generator().manual_seed(0)
    for sample in (lambda: uniform(total, frames, generator), lambda: dense(total, frames, 2, generator)):
        assert set(torch.cat([sample() for _ in range(300)]).tolist()) == set(range(total))


def test_uniform_in_each_part() -> None:
    """A random frame of each part is each of its frames equally often."""
    generator = Generator().manual_seed(0)
    drawn = torch.stack([uniform(12, 3, generator) for _ in range(4000)])
    for part in range(3):
        times = drawn[:, part].bincount(minlength=12)[4 * part : 4 * part + 4]
        assert times.sum() == 4000
        assert (times - 1000).abs().max() < 150
    assert uniform(12, 3).tolist() == [2, 6, 10]
    assert dense(12, 3, 2).tolist() == [3, 5, 7]
    assert views(12, 3, 2, 2).tolist() == [[0, 2, 4], [7, 9, 11]]
    assert views(12, 3, 2).tolist() == [[1, 5, 9], [3, 7, 11]]


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        (lambda: uniform(0, 4), "total"),
        (lambda: uniform(4, 0), "frames"),
        (lambda: dense(4, 4, 0), "stride"),
        (lambda: views(4, 4, 0), "clips"),
    ],
)
def test_bad_numbers(sample: Callable[[], Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        sample()


# Transforms.


def picture(height: int = 60, width: int = 80, frames: int = 1) -> Tensor:
    """The same smooth picture in all frames."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    colours = torch.stack([x + 0 * y, y + 0 * x, (3 * x + 2 * y).sin().abs()])
    return (255 * colours).byte().expand(frames, 3, height, width)


@pytest.mark.parametrize("augment", [False, True])
def test_train_transform(augment: bool) -> None:
    """The same for all frames; a function of the seed; nobody else's random numbers change."""
    transform = TrainTransform(32, scale=(0.3, 1.0), flip=True, augment=augment)
    clip = picture(frames=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    results = []
    for seed in range(60):
        result = transform(clip, seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert result.shape == (4, 3, 32, 32)
        assert result.dtype == torch.uint8
        assert torch.equal(result, result[:1].expand_as(result)), seed
        torch.manual_seed(seed + 1)
        torch.rand(3)
        assert torch.equal(result, transform(clip, seed))
        results.append(result[0])
        torch.set_rng_state(before)
    assert len({result.numpy().tobytes() for result in results}) > 50


def test_flip() -> None:
    """Half of all clips, or none; red grows from left to right in the picture."""
    for flip, least, most in ((True, 20, 40), (False, 0, 0)):
        transform = TrainTransform(32, scale=(0.5, 1.0), flip=flip, augment=False)
        clips = [transform(picture(), seed)[0, 0].float() for seed in range(60)]
        flipped = sum(bool(clip[:, 0].mean() > clip[:, -1].mean()) for clip in clips)
        assert least <= flipped <= most


def test_scale() -> None:
    """A crop of the whole area of a square is the square."""
    clip = picture(32, 32)
    transform = TrainTransform(32, scale=(1.0, 1.0), flip=False, augment=False)
    assert any(torch.equal(transform(clip, seed), clip) for seed in range(20))
    small = TrainTransform(32, scale=(0.05, 0.1), flip=False, augment=False)
    for seed in range(10):
        red = small(picture(200, 200), seed)[0, 0].float()
        assert red.max() - red.min() < 0.5 * 255


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (50, 50), (33, 1000), (1000, 7)])
def test_crops_in_testing(height: int, width: int) -> None:
    clip = picture(height, width, 2)
    one, three = spatial_crops(clip, 40, 1), spatial_crops(clip, 40, 3)
    assert one.shape == (1, 2, 3, 40, 40)
    assert three.shape == (3, 2, 3, 40, 40)
    assert torch.equal(one[0], three[1])
    red, green = three[:, 0, 0].float(), three[:, 0, 1].float()
    if width > height:  # red shows where a column is from, green a row
        assert red[0, :, 0].max() <= 12
        assert red[2, :, -1].min() >= 240
        assert (red[1].mean() - 127).abs() < 8
        assert green[1, 0].mean() < 20 < 230 < green[1, -1].mean()
    elif height > width:
        assert green[0, 0].max() <= 12
        assert green[2, -1].min() >= 240
        assert (green[1].mean() - 127).abs() < 8
    with pytest.raises(ValueError, match="crops: expected 1 or 3, got 2"):
        spatial_crops(clip, 40, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Pulling something from left to right", True),
        ("Turning the camera left while filming something", True),
        ("swipe_left", True),
        ("Rolling hand, CLOCKWISE", True),
        ("eating leftovers", False),
        ("putting up bright lights", False),
        ("Cook.Cut", False),
        ("3", False),
    ],
)
def test_names_directions(name: str, expected: bool) -> None:
    assert names_directions(["walk", name]) is expected
    assert not names_directions([])


# Data sets.


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    """Two videos and a folder of frames, of 20 frames each; labels 0, 1, 2."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "0.mp4", frames=20)
    write_video(folder / "1.mp4", frames=20, codec="mpeg4", size=(64, 48))
    (folder / "2").mkdir()
    for number, frame in enumerate(decode_all(folder / "0.mp4")):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / "2" / f"{number}.png")
    listed = (Video(folder / "0.mp4", 0), Video(folder / "1.mp4", 1), Video(folder / "2", 2, 16))
    return VideoList(listed, ("walk", "run", "sit"), "made up")


def with_bad(videos: VideoList, *places: int) -> VideoList:
    listed = list(videos.videos)
    for place in places:
        listed[place] = Video(Path(f"/nowhere/{place}.mp4"), listed[place].label)
    return VideoList(tuple(listed), videos.classes, "made up")


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a["clips"], b["clips"]) and all(a[name] == b[name] for name in a if name != "clips")


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
def test_training_items(videos: VideoList, sampling: Any) -> None:
    dataset = VideoDataset(videos, frames=4, size=32, train=True, sampling=sampling, seed=3)
    assert len(dataset) == 3
    for index in range(3):
        item = dataset[1, index]
        assert item["clips"].shape == (1, 4, 3, 32, 32)
        assert item["clips"].dtype == torch.uint8
        assert item["clips"].is_contiguous()
        assert (item["label"], item["index"], item["error"], item["valid"]) == (index, index, "", True)


def test_items_depend_on_seed_epoch_and_index_alone(videos: VideoList) -> None:
    def make(seed: int, listed: VideoList = videos) -> VideoDataset:
        return VideoDataset(listed, frames=4, size=32, train=True, seed=seed)

    item = make(0)[5, 1]
    torch.manual_seed(99)
    other = make(0)
    other[5, 0]
    assert equal(item, other[5, 1])
    assert equal(item, copy.deepcopy(other)[5, 1])
    twice = VideoList((videos.videos[1],) * 3, videos.classes, "made up")
    drawn = [item["clips"], make(0)[6, 1]["clips"], make(1)[5, 1]["clips"], make(0, twice)[5, 0]["clips"]]
    assert len({clip.numpy().tobytes() for clip in drawn}) == 4


def test_testing_items(videos: VideoList) -> None:
    """Clips of `views`, and their crops; nothing is random."""
    dataset = VideoDataset(videos, frames=4, size=32, train=False, sampling="dense", stride=2, clips=2, crops=3, seed=1)
    item = dataset[0, 0]
    assert item["clips"].shape == (6, 4, 3, 32, 32)
    assert equal(item, VideoDataset(videos, frames=4, size=32, train=False, sampling="dense", clips=2, crops=3)[9, 0])
    frames = decode_all(videos.videos[0].path)
    for clip, indices in enumerate(views(20, 4, 2, 2)):
        assert torch.equal(item["clips"][3 * clip : 3 * clip + 3], spatial_crops(frames[indices], 32, 3))
    folder = VideoDataset(videos, frames=4, size=32, train=False)[0, 2]  # of 16 frames, its list says
    assert torch.equal(folder["clips"], spatial_crops(frames[uniform(16, 4)], 32, 1))


def test_loader_processes(videos: VideoList) -> None:
    """Whoever loads an item: the same."""
    dataset = VideoDataset(videos, frames=4, size=32, train=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(3)]
    batches = [
        torch.cat([batch["clips"] for batch in DataLoader(dataset, 3, sampler=keys, num_workers=n, collate_fn=collate)])
        for n in (0, 2)
    ]
    assert torch.equal(*batches)


def test_collate(videos: VideoList) -> None:
    dataset = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=False)
    batch = collate([dataset[0, index] for index in (0, 1, 2)])
    assert batch["clips"].shape == (3, 1, 2, 3, 16, 16)
    assert batch["clips"].dtype == torch.uint8
    assert batch["label"].tolist() == batch["index"].tolist() == [0, 1, 2]
    assert batch["label"].dtype == torch.int64
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["errors"] == ["/nowhere/1.mp4: there is no such file"]


def test_unreadable_in_training(videos: VideoList) -> None:
    """The next readable one takes its place, with its label, past the end of the list, too."""
    dataset = VideoDataset(with_bad(videos, 1, 2), frames=2, size=16, train=True)
    for index in (1, 2):
        item = dataset[0, index]
        assert (item["label"], item["index"], item["valid"]) == (0, index, True)
        assert item["error"] == f"/nowhere/{index}.mp4: there is no such file"
        assert item["clips"].any()


def test_unreadable_in_testing(videos: VideoList) -> None:
    item = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=False, clips=2, crops=3)[0, 1]
    assert item["clips"].shape == (6, 2, 3, 16, 16)
    assert not item["clips"].any()
    assert (item["label"], item["valid"]) == (1, False)
    assert "/nowhere/1.mp4" in item["error"]


def test_nothing_can_be_read(videos: VideoList) -> None:
    dataset = VideoDataset(with_bad(videos, 0, 1, 2), frames=2, size=16, train=True)
    with pytest.raises(ValueError, match=r"none of the 3 videos of made up can be read; first: /nowhere/1.mp4"):
        dataset[0, 1]


def test_strict(videos: VideoList) -> None:
    for train in (False, True):
        dataset = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=train, strict=True)
        with pytest.raises(UnreadableVideo, match=r"/nowhere/1.mp4"):
            dataset[0, 1]


def test_folder_with_too_few_frames(videos: VideoList) -> None:
    short = VideoList((Video(videos.videos[2].path, 0, 21),), ("walk",), "made up")
    with pytest.raises(UnreadableVideo, match="has 20 frames, and its list says 21"):
        VideoDataset(short, frames=2, size=16, train=False, strict=True)[0, 0]


def test_flips_by_default(videos: VideoList) -> None:
    directions = VideoList(videos.videos, ("turning left", "turning right", "sit"), "made up")
    for listed, flip, expected in (
        (videos, None, True), (directions, None, False), (directions, True, True), (videos, False, False),
    ):  # fmt: skip
        dataset = VideoDataset(listed, frames=2, size=16, train=True, flip=flip)
        assert dataset.flip is expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"size": 0}, "size: expected at least 1"),
        ({"stride": 0}, "stride: expected at least 1"),
        ({"clips": 0, "train": False}, "clips: expected at least 1"),
        ({"crops": 2, "train": False}, "crops: expected 1 or 3, got 2"),
        ({"crops": 3}, "clips, crops: expected 1 and 1 in training, got 1 and 3"),
        ({"sampling": "denze"}, "did you mean 'dense'"),
        ({"scale": (0.5, 0.2)}, "scale: expected"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_options(videos: VideoList, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        VideoDataset(videos, **{"frames": 2, "size": 16, "train": True, **options})


def test_no_videos() -> None:
    with pytest.raises(ValueError, match="videos: expected at least 1, got 0"):
        VideoDataset(VideoList((), ("walk",), ""), frames=2, size=16, train=True)


def test_no_such_place(videos: VideoList) -> None:
    for dataset in (
        VideoDataset(videos, frames=2, size=16, train=True),
        SyntheticDataset(3, 3, frames=2, size=16),
    ):
        for index in (-1, 3):
            with pytest.raises(IndexError, match="index: expected a place in"):
                dataset[0, index]


# Made-up clips.


def test_synthetic_items() -> None:
    dataset = SyntheticDataset(5, 12, frames=3, size=16, views=2, seed=4)
    items = [dataset[2, index] for index in range(len(dataset))]
    assert [item["label"] for item in items] == [index % 5 for index in range(12)]
    batch = collate(items)
    assert batch["clips"].shape == (12, 2, 3, 3, 16, 16)
    assert batch["clips"].dtype == torch.uint8
    assert batch["valid"].all()
    assert batch["errors"] == []
    assert equal(items[3], SyntheticDataset(5, 12, frames=3, size=16, views=2, seed=4)[2, 3])
    assert not equal(items[3], dataset[1, 3])
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        SyntheticDataset(0, 3, frames=2, size=16)


def test_synthetic_classes_can_be_told_by_motion() -> None:
    """The strongest wave in space and time is that of the class; in space alone, that of its opposite as well."""
    dataset = SyntheticDataset(4, 16, frames=10, size=32, seed=0)
    found = []
    for index in range(16):
        clip = dataset[0, index]["clips"][0, :, 0].double()
        waves = torch.fft.fftn(clip - clip.mean()).abs()
        waves[5:] = 0  # one of each pair of conjugates: forward in time
        time, y, x = np.unravel_index(int(waves.argmax()), waves.shape)
        assert time == 2  # a fifth of a stripe from frame to frame
        angle = math.atan2(-(y - 32 * (y > 16)), -(x - 32 * (x > 16)))
        found.append(round(angle / (2 * math.pi) * 4) % 4)
    assert found == [index % 4 for index in range(16)]
