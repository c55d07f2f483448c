"""From a config to a model, lists and data sets."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amflow_models.backbones import create_backbone
from amflow_models.blocks import find_blocks
from amflow_models.classifier import VideoClassifier
from amflow_models.data import SyntheticDataset, VideoDataset, VideoList, check_lists, read_list
from amflow_models.insertion import grow_am_flow, report_of
from amflow_models.training.checkpoints import check_backbone, find_trained
from amflow_models.training.config import Config
from amflow_models.weights import load_trained

SPLITS = ("train", "validation", "test")
SYNTHETIC_STEPS = 20  # of an epoch on made-up clips
_ADAPTERS = ("form", "bottleneck", "unit", "pooled", "centred", "gate", "align")

Images = Callable[[Tensor], Tensor]


def build_model(config: Config, *, synthetic: bool = False, grown: bool = True) -> VideoClassifier:
    """The model of a config.

    Args:
        synthetic: random weights in the place of pretrained ones that would have to be downloaded, and no `start`.
        grown: AM flow in all of `blocks` from the beginning; else, where there is a `start`, as it was trained so far,
            and then grown.

    Raises:
        ValueError: a name, size or file that does not fit, see `create_backbone`, `add_adapters` and `load_trained`.
    """
    wanted = config.model
    torch.manual_seed(config.seed)  # random weights are of the run, too
    weights = None if synthetic and wanted.weights == "hub" else wanted.weights
    backbone: Any = create_backbone(wanted.backbone, weights, wanted.img_size)
    options = {name: getattr(wanted, name) for name in _ADAPTERS}
    start = None if grown or synthetic else wanted.start
    placement = start.blocks if start else wanted.blocks
    try:
        path, blocks = find_blocks(backbone)
        if wanted.depth is not None:
            if hasattr(backbone, "stage_ends") or wanted.depth > len(blocks):
                raise ValueError(f"model.depth: expected at most {len(blocks)} blocks in one stage, got {wanted.depth}")
            backbone.set_submodule(path, blocks[: wanted.depth])
        if wanted.pool is not None:
            backbone.reset_classifier(0, wanted.pool)
        model = VideoClassifier(backbone, config.data.num_classes, config.data.frames, blocks=placement, **options)
    except TypeError as error:
        raise ValueError(f"model.backbone {wanted.backbone}: {error}") from error
    if start is not None:
        trained = find_trained(start.trained)
        check_backbone(trained, config)
        load_trained(model, trained)
        grow_am_flow(model.backbone, wanted.blocks, verbose=False)
        model.report = report_of(model)
    if config.training.recompute:
        backbone.set_grad_checkpointing(True)
    return model


def image_size(config: Config, model: VideoClassifier) -> int:
    """Side of the frames that the backbone takes, in pixels."""
    return config.model.img_size or int(_pretrained(model.backbone, "input_size")[-1])


def normalisation(model: VideoClassifier, device: torch.device) -> Images:
    """Turns uint8 clips (B, T, 3, H, W) into what the backbone was trained on, float32, on the device."""
    mean, std = (
        torch.tensor(_pretrained(model.backbone, name), device=device).view(3, 1, 1) for name in ("mean", "std")
    )
    return lambda clips: (clips.to(device, non_blocking=True) / 255 - mean) / std


def read_lists(config: Config, splits: tuple[str, ...], *, check: bool = True) -> dict[str, VideoList]:
    """The lists of a config.

    Args:
        check: look for what is wrong with them together, as `check_lists` does; no video is opened. Warnings are
            printed.

    Raises:
        ValueError: a list can't be read or names other classes than there are, or a check fails: all problems are
            listed.
    """
    data, lists = config.data, {}
    distinct = {}  # a list that is there to validate and to test on shares all of its videos with itself
    for split in splits:
        path = getattr(data, split)
        if path is not None:
            part = f"{data.split}/{split}" if data.kind == "smarthome" else data.split
            distinct[split == "train", path, part] = split
            lists[split] = read_list(
                data.kind, path, root=data.root, classes=data.classes, labels=data.labels, split=part
            )
            found = len(lists[split].classes)
            if found != data.num_classes and (data.classes is not None or data.kind in ("ssv2", "smarthome")):
                raise ValueError(f"data.num_classes: expected the {found} that have names, got {data.num_classes}")
    if check:
        checked = {split: lists[split] for split in distinct.values()}
        report = check_lists(checked, data.num_classes, open_videos=False)
        report.raise_for_problems()
        for problem in report.problems:
            print(f"warning: {problem}", file=sys.stderr)
    return lists


def digest(lists: dict[str, VideoList]) -> str:
    """Of the clips to train on: their names without folders, labels and order."""
    told = "".join(f"{video.path.name} {video.label}\n" for video in lists["train"].videos) if lists else "synthetic"
    return hashlib.sha256(told.encode()).hexdigest()


def class_names(config: Config, videos: VideoList) -> list[str]:
    """A name for every class; a list that names none may not have the last ones."""
    return [*videos.classes, *map(str, range(len(videos.classes), config.data.num_classes))]


def dataset(config: Config, videos: VideoList | None, size: int, *, train: bool, views: bool = False) -> Any:
    """The clips of a list, or made-up ones if there is none.

    Args:
        size: of frames, in pixels.
        train: with augmentation, and random in time; else from the middle.
        views: the clips and crops that the config tests on.
    """
    data, tested = config.data, config.evaluation
    clips, crops = (tested.clips, tested.crops) if views else (1, 1)
    if videos is None:
        count = config.training.batch * (SYNTHETIC_STEPS if train else 2)
        return SyntheticDataset(
            data.num_classes, count, frames=data.frames, size=size, views=clips * crops, seed=config.seed + (not train)
        )
    return VideoDataset(
        videos, frames=data.frames, size=size, train=train, sampling=data.sampling, stride=data.stride, clips=clips,
        crops=crops, augment=data.augment, flip=data.flip, scale=data.scale, seed=config.seed,
    )  # fmt: skip


def _pretrained(backbone: nn.Module, name: str) -> Any:
    found: Any = getattr(backbone, "pretrained_cfg", None)
    if not found:
        raise ValueError(f"backbone: expected one of timm with a pretrained_cfg, got {type(backbone).__name__}")
    return found[name]
