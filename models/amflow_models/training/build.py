"""Builds a model, lists and data sets from a config."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from amflow_kernels.integrations.block_finder import find_blocks
from amflow_models.backbones import create_backbone
from amflow_models.blocks import AdaptedBlock
from amflow_models.classifier import VideoClassifier
from amflow_models.data import SyntheticDataset, VideoDataset, VideoList, check_lists, read_list
from amflow_models.data.lists import format_of
from amflow_models.insertion import grow_am_flow, report_of
from amflow_models.training.checkpoints import check_backbone, find_trained
from amflow_models.training.config import Config
from amflow_models.training.multilabel import MultiLabelList, by_video
from amflow_models.weights import load_trained

SPLITS = ("train", "validation", "test")
_ADVICE = (
    "  `amflow data check --all` names every case, --write-clean writes a list without them; data.missing=skip leaves "
    "missing videos out, data.subset=true trains without some classes"
)
SYNTHETIC_STEPS = 20  # per epoch of synthetic clips
_ADAPTERS = ("form", "bottleneck", "unit", "pooled", "centred", "gate", "align")

Images = Callable[[Tensor], Tensor]


def build_model(config: Config, *, synthetic: bool = False, grown: bool = True) -> VideoClassifier:
    """Builds the model of a config.

    Args:
        config: the config.
        synthetic: use random weights where pretrained ones would be downloaded, and ignore `model.start`.
        grown: build AM flow in all of `model.blocks` at once, to load a checkpoint of this stage; otherwise a model
            with a `model.start` is built and loaded as the first stage left it, and then grown.

    Raises:
        ValueError: a name, size or file does not fit, see `create_backbone`, `add_adapters` and `load_trained`.
    """
    wanted = config.model
    torch.manual_seed(config.seed)  # random weights depend on the run's seed, too
    weights = None if synthetic and wanted.weights == "hub" else wanted.weights
    backbone: Any = create_backbone(wanted.backbone, weights, wanted.img_size)
    options = {name: getattr(wanted, name) for name in _ADAPTERS}
    start = None if grown or synthetic else wanted.start
    placement = wanted.blocks if start is None or start.blocks is None else start.blocks
    try:
        path, blocks = find_blocks(backbone)
        if wanted.depth is not None:
            if hasattr(backbone, "stage_ends") or wanted.depth > len(blocks):
                raise ValueError(f"model.depth: expected at most {len(blocks)} blocks in one stage, got {wanted.depth}")
            backbone.set_submodule(path, blocks[: wanted.depth])
        if wanted.pool is not None:
            backbone.reset_classifier(0, wanted.pool)
        model = VideoClassifier(
            backbone, config.data.num_classes, config.data.frames, blocks=placement, dropout=wanted.dropout, **options
        )
    except TypeError as error:
        raise ValueError(f"model.backbone {wanted.backbone}: {error}") from error
    if start is not None:
        trained = find_trained(start.trained)
        check_backbone(trained, config)
        try:
            load_trained(model, trained, head=start.head == "trained")
        except ValueError as error:
            other = "of another shape: head." in str(error)
            hint = "; with model.start.head=new it starts with a new head, for other classes" if other else ""
            raise ValueError(f"{error}{hint}") from error
        grow_am_flow(model.backbone, wanted.blocks, verbose=False)
        model.report = report_of(model)
    if wanted.drop_path:
        adapted = [block for block in model.modules() if isinstance(block, AdaptedBlock)]
        for number, block in enumerate(adapted, 1):
            block.adapter.drop_path = torch.tensor(wanted.drop_path * number / len(adapted))
    if config.training.recompute:
        backbone.set_grad_checkpointing(True)
    return model


def image_size(config: Config, model: VideoClassifier) -> int:
    """Side of the backbone's input, in pixels."""
    return config.model.img_size or int(pretrained(model.backbone, "input_size")[-1])


def normalisation(model: VideoClassifier, device: torch.device) -> Images:
    """A function that normalises uint8 clips (B, T, 3, H, W) for the backbone: float32, on the device."""
    mean, std = (
        torch.tensor(pretrained(model.backbone, name), device=device).view(3, 1, 1) for name in ("mean", "std")
    )
    return lambda clips: (clips.to(device, non_blocking=True) / 255 - mean) / std


def read_lists(config: Config, splits: tuple[str, ...], *, check: bool = True) -> dict[str, VideoList]:
    """Reads the lists of a config.

    Args:
        config: the config.
        splits: names of the lists to read; those that the config does not have are left out.
        check: run `check_lists` on them, without opening videos. Warnings are printed.

    Raises:
        ValueError: a list can't be read, the number of classes is wrong, or a check fails: all problems are listed.
            With `data.missing: skip`, missing videos are no problem; the lists' `missing` names them.
    """
    data, lists = config.data, {}
    list_format = format_of(data.kind)
    distinct = {}  # a list that serves both validation and test would share all of its videos with itself
    for split in splits:
        path = getattr(data, split)
        if path is not None:
            part = f"{data.split}/{split}" if list_format.splits else data.split
            distinct[split == "train", path, part] = split
            lists[split] = read_list(
                data.kind, path, root=data.root, classes=data.classes, labels=data.labels, split=part,
                template=data.template, start_index=data.start_index,
            )  # fmt: skip
            named = len(lists[split].classes)
            if named != data.num_classes and (data.classes is not None or list_format.names_classes):
                raise ValueError(f"data.num_classes: expected the {named} that have names, got {data.num_classes}")
            if data.missing == "skip":
                lists[split] = _existing(lists[split], split, say=check)
    if check:
        checked = {split: lists[split] for split in distinct.values()}
        report = check_lists(
            checked, data.num_classes, open_videos=False, subset=data.subset, several_labels=data.multi_label
        )
        try:
            report.raise_for_problems()
        except ValueError as error:
            raise ValueError(f"{error}\n{_ADVICE}") from None
        for problem in report.problems:
            print(f"warning: {problem}", file=sys.stderr)
    if data.multi_label:
        return {split: by_video(listed, data.num_classes) for split, listed in lists.items()}
    return lists


def _existing(videos: VideoList, split: str, *, say: bool) -> VideoList:
    """The list without videos that do not exist, whose number is printed to stderr if `say`."""
    with ThreadPoolExecutor() as pool:  # network file systems answer slowly
        exists = list(pool.map(lambda video: video.file.exists(), videos.videos))
    missing = [str(video.path) for video, there in zip(videos.videos, exists, strict=True) if not there]
    if missing and say:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        print(f"warning: {split}: {len(missing)} of {len(exists)} videos are missing: {shown}", file=sys.stderr)
    kept = tuple(video for video, there in zip(videos.videos, exists, strict=True) if there)
    return replace(videos, videos=kept, missing=tuple(missing))


def digest(lists: dict[str, VideoList]) -> str:
    """A hash of the training list: its videos' names without folders, their labels and their order."""
    if not lists:
        text = "synthetic"
    elif isinstance(lists["train"], MultiLabelList):
        rows = zip(lists["train"].videos, lists["train"].table, strict=True)
        text = "".join(f"{video.path.name} {row.nonzero().flatten().tolist()}\n" for video, row in rows)
    else:
        text = "".join(f"{video.path.name} {video.label}\n" for video in lists["train"].videos)
    return hashlib.sha256(text.encode()).hexdigest()


def class_names(config: Config, videos: VideoList | None) -> list[str] | None:
    """The names of the classes; None if the list, or its absence, gives them none."""
    named = config.data.classes is not None or format_of(config.data.kind).names_classes
    return list(videos.classes) if videos is not None and named else None


def dataset(config: Config, videos: VideoList | None, size: int, *, train: bool, views: bool = False) -> Any:
    """The data set of a list, or synthetic clips without one.

    Args:
        config: the config.
        videos: the list; None makes synthetic clips.
        size: side of the frames, in pixels.
        train: augmented clips at random times; otherwise clips from the middle.
        views: the clips and crops of the config's evaluation.
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


def pretrained(backbone: nn.Module, name: str) -> Any:
    """An entry of timm's `pretrained_cfg`, such as "mean". Raises ValueError if the backbone has none."""
    config: Any = getattr(backbone, "pretrained_cfg", None)
    if not config:
        raise ValueError(f"backbone: expected one of timm with a pretrained_cfg, got {type(backbone).__name__}")
    return config[name]
