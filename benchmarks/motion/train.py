"""Trains one arm on one task from one seed, and tests it once."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from amflow_models import VideoClassifier, create_backbone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from amflow_kernels.offline import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS, make_clips

EVALUATIONS = 10  # of a run, on the validation split: what the curve shows


@dataclass(frozen=True)
class Setting:
    """How large everything is.

    Attributes:
        size: side of a frame in pixels.
        frames: of a clip.
        depth: how many of the backbone's 12 blocks are used.
        steps, batch, learning_rate: of AdamW, one cycle.
        train, validation, test: clips.
        seeds: how many runs of each arm.
    """

    size: int
    frames: int
    depth: int
    steps: int
    batch: int
    train: int
    validation: int
    test: int
    seeds: int
    learning_rate: float = 2e-3


SETTINGS = {
    "smoke": Setting(size=56, frames=3, depth=2, steps=6, batch=4, train=28, validation=28, test=28, seeds=1),
    "cpu": Setting(size=70, frames=4, depth=4, steps=300, batch=16, train=2100, validation=280, test=560, seeds=3),
    "gpu": Setting(size=98, frames=8, depth=12, steps=2000, batch=32, train=14000, validation=840, test=1680, seeds=5),
}


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        accuracy: on the test split, after the last step.
        curve: steps and accuracy on the validation split.
        steps_to_90: the first of these steps at which the accuracy is at least 90% of the final one.
        trainable: parameters.
    """

    task: str
    arm: str
    seed: int
    accuracy: float
    curve: list[tuple[int, float]]
    steps_to_90: int
    trainable: int
    seconds: float


def train(task: str, arm: str, seed: int, setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """A `Run`, as a dict."""
    started = time.perf_counter()
    options = ARMS[arm].options
    run = _probe(task, arm, setting, device) if options is None else _adapters(task, arm, seed, setting, device)
    run |= {"task": task, "arm": arm, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
    return asdict(Run(**run))


def _adapters(task: str, arm: str, seed: int, setting: Setting, device: str) -> dict[str, Any]:
    steps = setting.steps * ARMS[arm].budget
    backbone = _backbone(setting, device)  # before the seed: making it draws numbers, copying it none
    torch.manual_seed(seed)
    model = VideoClassifier(backbone, len(TASKS[task].classes), setting.frames, **(ARMS[arm].options or {})).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, setting.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.learning_rate, steps, pct_start=0.1)
    clips, labels = _clips(task, "train", setting, device)
    order = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(clips), (setting.batch,), generator=order)
        loss = cross_entropy(_logits(model, clips[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // EVALUATIONS) == 0:
            curve.append((step, _accuracy(model, task, "validation", setting, device)))
    return _result(_accuracy(model, task, "test", setting, device), curve, sum(p.numel() for p in trainable))


def _probe(task: str, arm: str, setting: Setting, device: str) -> dict[str, Any]:
    """Logistic regression on the backbone's vectors, standardised; weight decay is chosen on the validation split."""
    data = {split: _vectors(task, split, setting, device) for split in ("train", "validation", "test")}
    sees = ARMS[arm].sees

    def seen(split: str) -> Tensor:
        x = data[split][0]
        return x.mean(1) if sees == "mean" else x[:, 0] if sees == "first" else x.flatten(1)

    std, mean = torch.std_mean(seen("train"), 0)
    x = {split: (seen(split) - mean) / (std + 1e-6) for split in data}
    classes, best = len(TASKS[task].classes), (-1.0, 0.0)
    for decay in (1e-3, 1e-2, 1e-1, 1.0):
        head = nn.Linear(x["train"].shape[1], classes, device=device)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(head: nn.Linear = head, decay: float = decay, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            penalty = decay * head.weight.square().sum() / 2
            loss = cross_entropy(head(x["train"]), data["train"][1]) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            scores = [
                (head(x[split]).argmax(1) == data[split][1]).float().mean().item() for split in ("validation", "test")
            ]
        best = max(best, (scores[0], scores[1]), key=lambda pair: pair[0])
    return _result(best[1], [(1, best[0])], sum(p.numel() for p in head.parameters()))


def _result(accuracy: float, curve: list[tuple[int, float]], trainable: int) -> dict[str, Any]:
    reached = next(step for step, value in curve if value >= 0.9 * curve[-1][1])
    return {"accuracy": accuracy, "curve": curve, "steps_to_90": reached, "trainable": trainable}


def _backbone(setting: Setting, device: str) -> Any:
    """A copy of `_pretrained`, to be changed."""
    return deepcopy(_pretrained(setting.size, setting.depth)).to(device)


@cache
def _pretrained(size: int, depth: int) -> Any:
    """The first blocks of DINOv2 ViT-S/14, mean over patches: with the class token alone, the last adapter's temporal
    unit would see no other token."""
    model: Any = create_backbone("vit_small_patch14_dinov2", "offline", size)
    model.blocks = model.blocks[:depth]
    model.reset_classifier(0, "avg")
    return model


@lru_cache(maxsize=3)  # the splits of a task
def _clips(task: str, split: str, setting: Setting, device: str) -> tuple[Tensor, Tensor]:
    clips, labels = make_clips(task, split, getattr(setting, split), size=setting.size, frames=setting.frames)
    return clips.to(device), labels.to(device)


@torch.no_grad()
def _vectors(task: str, split: str, setting: Setting, device: str) -> tuple[Tensor, Tensor]:
    """The backbone's vectors of each frame, (clips, T, C), and labels."""
    clips, labels = _clips(task, split, setting, device)
    backbone = _backbone(setting, device)
    vectors = [backbone(_normalised(part.flatten(0, 1))) for part in clips.split(64)]
    return torch.cat(vectors).unflatten(0, (-1, setting.frames)), labels


@torch.no_grad()
def _accuracy(model: nn.Module, task: str, split: str, setting: Setting, device: str) -> float:
    clips, labels = _clips(task, split, setting, device)
    guesses = torch.cat([_logits(model, part).argmax(1) for part in clips.split(4 * setting.batch)])
    return (guesses == labels).float().mean().item()


def _logits(model: nn.Module, clips: Tensor) -> Tensor:
    with torch.autocast(clips.device.type, torch.bfloat16):
        return model(_normalised(clips)).float()


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std
