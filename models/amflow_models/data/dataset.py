"""Data sets of clips. An item is a function of seed, epoch and index, whichever process loads it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from amflow_models.data.reading import UnreadableVideo
from amflow_models.data.sampling import check_least, dense, uniform, views
from amflow_models.data.transforms import TrainTransform, names_directions, spatial_crops
from amflow_models.data.video import frames_of, open_listed
from amflow_models.data.videos import Video, VideoList
from amflow_models.suggestions import check_known

Item = dict[str, Any]


class VideoDataset(Dataset[Item]):
    """Clips of the videos of a list.

    A key is a pair (epoch, index in the list). An item is a dict:

    - ``clips``: uint8 RGB (views, T, 3, size, size); views = clips * crops, the crops of a clip next to each other.
    - ``label``: index of the class.
    - ``index``: the index in the list, from the key.
    - ``error``: path and reason of a video that could not be read; empty if there was none.
    - ``valid``: whether `clips` is from a video.

    If a video can't be read, ``error`` is set. In training the next readable video of the list replaces it, with its
    own label; in testing ``clips`` is 0 and ``valid`` False.

    Args:
        videos: the result of `read_list`.
        frames: T.
        size: side of the frames, in pixels.
        train: random frames and augmentation; otherwise the middle of the video (of each part) and no augmentation.
        sampling: "uniform", one frame of each of T equal parts of the video, or "dense", every `stride`-th frame.
        stride: distance in frames, for dense sampling.
        clips, crops: in testing, the number of clips per video and of crops per clip (1, the centre, or 3).
        augment: RandAugment in training; random resized crops are always made.
        flip: mirror half of the clips in training; None mirrors unless class names speak of left and right.
        scale: range of the share of the frame's area that a crop has in training. The default is that of torchvision,
            PySlowFast's vision transformers and MMAction2.
        seed: seed of all random choices, at least 0.
        strict: raise `UnreadableVideo` instead.

    Raises:
        ValueError: an argument is out of range or the list is empty; for an item: no video of the list can be read.
        IndexError: for an item: the index is not in the list.
        UnreadableVideo: for an item, if `strict`.
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

    @property
    def views(self) -> int:
        """Number of views of each item."""
        return self.clips * self.crops

    def name(self, index: int) -> str:
        """The path of a video, for messages."""
        return str(self.videos.videos[index].path)

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
        clips = torch.zeros(self.views, self.frames, 3, self.size, self.size, dtype=torch.uint8)
        return {"clips": clips, "label": video.label, "index": index, "error": error, "valid": False}

    def _train_clip(self, video: Video, epoch: int, index: int) -> Tensor:
        frames_seed, transform_seed = _seeds(2, self.seed, epoch, index)
        generator = Generator().manual_seed(frames_seed)
        with open_listed(video) as reader:
            total = frames_of(video, len(reader))
            if self.stride is None:
                indices = uniform(total, self.frames, generator)
            else:
                indices = dense(total, self.frames, self.stride, generator)
            wanted, places = (indices + (video.start or 0)).unique(return_inverse=True)
            clip = self.transform(reader.iterate(wanted.tolist()), transform_seed)
        return clip[places][None]

    def _test_clips(self, video: Video) -> Tensor:
        with open_listed(video) as reader:
            indices = views(frames_of(video, len(reader)), self.frames, self.clips, self.stride)
            wanted, places = (indices + (video.start or 0)).unique(return_inverse=True)
            crops = spatial_crops(reader.iterate(wanted.tolist()), self.size, self.crops)
        return crops[torch.arange(self.crops)[:, None], places[:, None]].flatten(0, 1)  # (clips, crops, T, ...) first


class SyntheticDataset(Dataset[Item]):
    """Synthetic clips, to measure speed and to try out a training run; items are like those of `VideoDataset`.

    A clip is a grating that starts at a random phase and drifts in the direction of its class. If the number of classes
    is even, each class has the stripes of another one that drifts the other way: no single frame tells the two apart.

    Args:
        num_classes: number of classes; labels repeat in order, so all classes are equally frequent.
        count: number of items.
        frames, size: as for `VideoDataset`.
        views: number of views of each item.
        seed: seed of the phases, at least 0.

    Raises:
        ValueError: a number is below 1, or the seed is below 0.
        IndexError: for an item: the index is not in [0, count).
    """

    def __init__(self, num_classes: int, count: int, *, frames: int, size: int, views: int = 1, seed: int = 0) -> None:
        check_least(1, num_classes=num_classes, count=count, frames=frames, size=size, views=views)
        check_least(0, seed=seed)
        self.num_classes, self.count, self.seed = num_classes, count, seed
        self.frames, self.size, self.views = frames, size, views

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """A name of a clip, for messages."""
        return f"synthetic clip {index}"

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
    """Makes a batch of items.

    Returns:
        ``clips`` uint8 (B, views, T, 3, size, size); ``label`` and ``index`` int64 (B,); ``valid`` bool (B,);
        ``errors``, a list of the errors that are not empty.
    """
    batch: dict[str, Any] = {name: torch.tensor([item[name] for item in items]) for name in ("label", "index", "valid")}
    batch["clips"] = torch.stack([item["clips"] for item in items])
    batch["errors"] = [item["error"] for item in items if item["error"]]
    return batch


def _seeds(count: int, *numbers: int) -> list[int]:
    """Independent seeds from a few small numbers."""
    return np.random.SeedSequence(numbers).generate_state(count, np.uint64).tolist()
