"""Data sets of clips, real and synthetic, and batches."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amflow_models.data import (
    SyntheticDataset,
    UnreadableVideo,
    Video,
    VideoDataset,
    VideoList,
    collate,
    spatial_crops,
    uniform,
    views,
)
from PIL import Image
from torch.utils.data import DataLoader
from video_files import decode_all, write_video


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
def test_training_items_have_one_clip(videos: VideoList, sampling: Any) -> None:
    dataset = VideoDataset(videos, frames=4, size=32, train=True, sampling=sampling, seed=3)
    assert len(dataset) == 3
    for index in range(3):
        item = dataset[1, index]
        assert item["clips"].shape == (1, 4, 3, 32, 32)
        assert item["clips"].dtype == torch.uint8
        assert item["clips"].is_contiguous()
        assert (item["label"], item["index"], item["error"], item["valid"]) == (index, index, "", True)


def test_items_depend_only_on_seed_epoch_and_index(videos: VideoList) -> None:
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


def test_testing_items_are_views_and_their_crops(videos: VideoList) -> None:
    """Nothing is random in testing."""
    dataset = VideoDataset(videos, frames=4, size=32, train=False, sampling="dense", stride=2, clips=2, crops=3, seed=1)
    item = dataset[0, 0]
    assert item["clips"].shape == (6, 4, 3, 32, 32)
    assert equal(item, VideoDataset(videos, frames=4, size=32, train=False, sampling="dense", clips=2, crops=3)[9, 0])
    frames = decode_all(videos.videos[0].path)
    for clip, indices in enumerate(views(20, 4, 2, 2)):
        assert torch.equal(item["clips"][3 * clip : 3 * clip + 3], spatial_crops(frames[indices], 32, 3))
    folder = VideoDataset(videos, frames=4, size=32, train=False)[0, 2]  # its list says 16 frames
    assert torch.equal(folder["clips"], spatial_crops(frames[uniform(16, 4)], 32, 1))


def test_items_do_not_depend_on_the_loader_process(videos: VideoList) -> None:
    dataset = VideoDataset(videos, frames=4, size=32, train=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(3)]
    batches = [
        torch.cat([batch["clips"] for batch in DataLoader(dataset, 3, sampler=keys, num_workers=n, collate_fn=collate)])
        for n in (0, 2)
    ]
    assert torch.equal(*batches)


def test_a_batch_stacks_items_and_lists_errors(videos: VideoList) -> None:
    dataset = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=False)
    batch = collate([dataset[0, index] for index in (0, 1, 2)])
    assert batch["clips"].shape == (3, 1, 2, 3, 16, 16)
    assert batch["clips"].dtype == torch.uint8
    assert batch["label"].tolist() == batch["index"].tolist() == [0, 1, 2]
    assert batch["label"].dtype == torch.int64
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["errors"] == ["/nowhere/1.mp4: there is no such file"]


def test_in_training_the_next_readable_video_replaces_an_unreadable_one(videos: VideoList) -> None:
    """With its own label, also past the end of the list."""
    dataset = VideoDataset(with_bad(videos, 1, 2), frames=2, size=16, train=True)
    for index in (1, 2):
        item = dataset[0, index]
        assert (item["label"], item["index"], item["valid"]) == (0, index, True)
        assert item["error"] == f"/nowhere/{index}.mp4: there is no such file"
        assert item["clips"].any()


def test_in_testing_an_unreadable_video_is_zeros_and_not_valid(videos: VideoList) -> None:
    item = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=False, clips=2, crops=3)[0, 1]
    assert item["clips"].shape == (6, 2, 3, 16, 16)
    assert not item["clips"].any()
    assert (item["label"], item["valid"]) == (1, False)
    assert "/nowhere/1.mp4" in item["error"]


def test_a_list_without_readable_videos_is_an_error(videos: VideoList) -> None:
    dataset = VideoDataset(with_bad(videos, 0, 1, 2), frames=2, size=16, train=True)
    with pytest.raises(ValueError, match=r"none of the 3 videos of made up can be read; first: /nowhere/1.mp4"):
        dataset[0, 1]


def test_strict_data_sets_raise_for_an_unreadable_video(videos: VideoList) -> None:
    for train in (False, True):
        dataset = VideoDataset(with_bad(videos, 1), frames=2, size=16, train=train, strict=True)
        with pytest.raises(UnreadableVideo, match=r"/nowhere/1.mp4"):
            dataset[0, 1]


def test_a_folder_with_fewer_frames_than_its_list_says_is_unreadable(videos: VideoList) -> None:
    short = VideoList((Video(videos.videos[2].path, 0, 21),), ("walk",), "made up")
    with pytest.raises(UnreadableVideo, match="has 20 frames, and its list says 21"):
        VideoDataset(short, frames=2, size=16, train=False, strict=True)[0, 0]


def test_clips_are_flipped_unless_classes_name_directions(videos: VideoList) -> None:
    directions = VideoList(videos.videos, ("turning left", "turning right", "sit"), "made up")
    for listed, flip, expected in (
        (videos, None, True), (directions, None, False), (directions, True, True), (videos, False, False),
    ):  # fmt: skip
        dataset = VideoDataset(listed, frames=2, size=16, train=True, flip=flip)
        assert dataset.flip is expected


@pytest.mark.parametrize("train", [False, True])
def test_clips_are_of_the_frames_that_the_template_names(tmp_path: Path, train: bool) -> None:
    for number in range(8):
        Image.new("L", (40, 32), 100 + number).save(tmp_path / f"img_{number:05}.png")
        Image.new("L", (40, 32), 0).save(tmp_path / f"flow_x_{number:05}.png")

    def clip(template: str | None, start: int | None) -> list[int]:
        listed = VideoList((Video(tmp_path, 0, 4, template, start=start),), ("walk",), "made up")
        item = VideoDataset(
            listed, frames=4, size=16, train=train, sampling="dense", stride=1, augment=False, strict=True
        )[0, 0]
        return item["clips"][0, :, 0, 8, 8].tolist()

    assert clip("img_{:05}.png", None) == [100, 101, 102, 103]
    assert clip("img_{:05}.png", 3) == [103, 104, 105, 106]
    with pytest.raises(UnreadableVideo, match="several series"):
        clip(None, None)


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_bad_options_are_refused(videos: VideoList, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDataset(videos, **{"frames": 2, "size": 16, "train": True, **options})


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="videos: expected at least 1, got 0"):
        VideoDataset(VideoList((), ("walk",), ""), frames=2, size=16, train=True)


def test_indices_outside_the_data_set_are_refused(videos: VideoList) -> None:
    for dataset in (
        VideoDataset(videos, frames=2, size=16, train=True),
        SyntheticDataset(3, 3, frames=2, size=16),
    ):
        for index in (-1, 3):
            with pytest.raises(IndexError, match="index: expected a place in"):
                dataset[0, index]


def test_synthetic_items_repeat_labels_and_depend_on_the_key() -> None:
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


def test_only_motion_tells_synthetic_classes_apart() -> None:
    """The strongest wave in space and time is that of the class; opposite classes share their waves in space."""
    dataset = SyntheticDataset(4, 16, frames=10, size=32, seed=0)
    labels = []
    for index in range(16):
        clip = dataset[0, index]["clips"][0, :, 0].double()
        waves = torch.fft.fftn(clip - clip.mean()).abs()
        waves[5:] = 0  # keeps one of each pair of conjugates: forward in time
        time, y, x = np.unravel_index(int(waves.argmax()), waves.shape)
        assert time == 2  # a fifth of a stripe from frame to frame
        angle = math.atan2(-(y - 32 * (y > 16)), -(x - 32 * (x > 16)))
        labels.append(round(angle / (2 * math.pi) * 4) % 4)
    assert labels == [index % 4 for index in range(16)]
