"""Data sets of clips. All that is random about an item is a function of seed, epoch and index, whoever loads it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from amflow_models.data.lists import Video, VideoList
from amflow_models.data.sampling import check_least, dense, uniform, views
from amflow_models.data.transforms import TrainTransform, names_directions, spatial_crops
from amflow_models.data.video import UnreadableVideo, open_video
from amflow_models.errors import check_known

Item = dict[str, Any]


class VideoDataset(Dataset[Item]):
    """Clips of the videos of a list.

    An index is a pair (epoch, place in the list). An item is a dict:

    - ``clips``: uint8 RGB (views, T, 3, size, size); views = clips * crops, the crops of a clip next to each other.
    - ``label``: number of the class.
    - ``index``: the place in the list that was asked for.
    - ``error``: path and reason of a video that could not be read; empty if all is well.
    - ``valid``: whether `clips` is from a video.

    What becomes of a video that can't be read: in training the next one of the list that can be read takes its place,
    with its own label; in testing `clips` is 0 and `valid` False. `error` tells of it either way.

    Args:
        videos: what `read_list` gave.
        frames: T.
        size: of the frames, in pixels.
        train: random frames and augmentation; else the middle of the video (of each part) and no augmentation.
        sampling: "uniform", one frame of each of T equal parts of the video, or "dense", one in `stride`.
        stride: of dense sampling.
        clips, crops: in testing, how many clips of each video, and crops of each clip (1, the centre, or 3).
        augment: RandAugment in training; random resized crops are always made.
        flip: mirror half of the clips in training; None: unless the classes speak of left and right.
        scale: share of the frame's area that a crop has in training. The default is that of torchvision, PySlowFast's
            vision transformers and MMAction2.
        seed: at least 0.
        strict: raise `UnreadableVideo` in place of what is said above.

    Raises:
        ValueError: an argument is out of range, the list is empty; from an item: no video of the list can be read.
        IndexError: from an item: there is no such place in the list.
        UnreadableVideo: from an item, if `strict`.
    """

    def __init__(
        self,
        videos: VideoList,
        *,
        frames: int,
        size: int,
        train: bool,
        sampling: Literal["uniform", "dense"] = "uniform",
        stride: int = 2,
        clips: int = 1,
        crops: int = 1,
        augment: bool = True,
        flip: bool | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        check_known("sampling", sampling, ("uniform", "dense"))
        check_least(1, videos=len(videos.videos), frames=frames, size=size, stride=stride, clips=clips)
        check_least(0, seed=seed)
        if crops not in (1, 3):
            raise ValueError(f"crops: expected 1 or 3, got {crops}")
        if train and (clips, crops) != (1, 1):
            raise ValueError(f"clips, crops: expected 1 and 1 in training, got {clips} and {crops}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected (least, most) within (0, 1], got {scale}")
        self.videos, self.train, self.strict, self.seed = videos, train, strict, seed
        self.frames, self.size, self.clips, self.crops = frames, size, clips, crops
        self.stride = stride if sampling == "dense" else None
        self.flip = not names_directions(videos.classes) if flip is None else flip
        self.transform = TrainTransform(size, scale=scale, flip=self.flip, augment=augment)

    def __len__(self) -> int:
        return len(self.videos.videos)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected a place in [0, {len(self)}), got {index}")
        error = ""
        for step in range(len(self) if self.train else 1):
            video = self.videos.videos[(index + step) % len(self)]
            try:
                clips = self._train_clip(video, epoch, index) if self.train else self._test_clips(video)
                return {"clips": clips, "label": video.label, "index": index, "error": error, "valid": True}
            except UnreadableVideo as problem:
                if self.strict:
                    raise
                error = error or str(problem)
        if self.train:
            raise ValueError(f"none of the {len(self)} videos of {self.videos.source} can be read; first: {error}")
        clips = torch.zeros(self.clips * self.crops, self.frames, 3, self.size, self.size, dtype=torch.uint8)
        return {"clips": clips, "label": video.label, "index": index, "error": error, "valid": False}

    def _train_clip(self, video: Video, epoch: int, index: int) -> Tensor:
        of_frames, of_transform = _seeds(2, self.seed, epoch, index)
        generator = Generator().manual_seed(of_frames)
        with open_video(video.path) as reader:
            total = _total(video, len(reader))
            if self.stride is None:
                places = uniform(total, self.frames, generator)
            else:
                places = dense(total, self.frames, self.stride, generator)
            clip = reader.read(places.tolist())
        return self.transform(clip, of_transform)[None]

    def _test_clips(self, video: Video) -> Tensor:
        with open_video(video.path) as reader:
            places = views(_total(video, len(reader)), self.frames, self.clips, self.stride)
            frames = reader.read(places.flatten().tolist())
        crops = spatial_crops(frames, self.size, self.crops)  # (crops, clips * T, 3, size, size)
        return crops.unflatten(1, (self.clips, self.frames)).transpose(0, 1).flatten(0, 1).contiguous()


class SyntheticDataset(Dataset[Item]):
    """Made-up clips, to measure speed with and to try a training run: items as those of `VideoDataset`.

    A clip is a grating that drifts in the direction of its class, from a random phase on. Where the number of classes
    is even, each has the stripes of another one that drifts the other way: single frames can't tell the two apart.

    Args:
        num_classes: how many; labels follow one another, so every class comes equally often.
        count: items.
        frames, size: as for `VideoDataset`.
        views: of each item.
        seed: at least 0.

    Raises:
        ValueError: a number is below 1, or the seed below 0.
        IndexError: from an item: there is no such place.
    """

    def __init__(self, num_classes: int, count: int, *, frames: int, size: int, views: int = 1, seed: int = 0) -> None:
        check_least(1, num_classes=num_classes, count=count, frames=frames, size=size, views=views)
        check_least(0, seed=seed)
        self.num_classes, self.count, self.seed = num_classes, count, seed
        self.frames, self.size, self.views = frames, size, views

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected a place in [0, {self.count}), got {index}")
        label = index % self.num_classes
        angle = 2 * math.pi * label / self.num_classes
        side = torch.arange(self.size) / self.size
        waves = 4 * (math.cos(angle) * side + math.sin(angle) * side[:, None])  # four stripes across a frame
        phases = torch.rand(self.views, 1, generator=Generator().manual_seed(_seeds(1, self.seed, epoch, index)[0]))
        drift = phases - torch.arange(self.frames) / 5  # a fifth of a stripe from frame to frame
        clips = 127.5 + 127 * torch.sin(2 * math.pi * (waves + drift[:, :, None, None]))
        clips = clips.byte()[:, :, None].expand(-1, -1, 3, -1, -1).contiguous()
        return {"clips": clips, "label": label, "index": index, "error": "", "valid": True}


def collate(items: list[Item]) -> dict[str, Any]:
    """A batch of items.

    Returns:
        ``clips`` uint8 (B, views, T, 3, size, size); ``label`` and ``index`` int64 (B,); ``valid`` bool (B,);
        ``errors``, a list of those that are not empty.
    """
    batch: dict[str, Any] = {name: torch.tensor([item[name] for item in items]) for name in ("label", "index", "valid")}
    batch["clips"] = torch.stack([item["clips"] for item in items])
    batch["errors"] = [item["error"] for item in items if item["error"]]
    return batch


def _total(video: Video, there: int) -> int:
    """How many frames to draw from: of a folder, as many as its list says."""
    if video.frames is not None and there < video.frames:
        raise UnreadableVideo(video.path, f"has {there} frames, and its list says {video.frames}")
    return there if video.frames is None else video.frames


def _seeds(count: int, *numbers: int) -> list[int]:
    """Independent seeds from a few small numbers."""
    return np.random.SeedSequence(numbers).generate_state(count, np.uint64).tolist()
