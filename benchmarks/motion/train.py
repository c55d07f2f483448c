"""Trains one arm on one task from one seed, and tests it once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from amflow_models import VideoClassifier, create_backbone
from amflow_models.cli.offline import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS, make_clips

SLOW = {"camera": 2}  # tasks that take so many times the steps, at as much lower a learning rate
POINTS = 10  # of the curve of a run
GRADIENT_NORM = 1.0  # clipped to it: the first gradients are large


@dataclass(frozen=True)
class Setting:
    """How large everything is.

    Attributes:
        size: side of a frame in pixels.
        frames: of a clip.
        depth: how many of the backbone's 12 blocks are used.
        steps, batch, learning_rate: of AdamW, one cycle.
        train, validation, test: clips; those to train on come in an order drawn anew for each pass over them.
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
    learning_rate: float = 4e-3


SETTINGS = {
    "smoke": Setting(size=56, frames=3, depth=2, steps=6, batch=4, train=28, validation=28, test=28, seeds=1),
    "cpu": Setting(size=70, frames=4, depth=4, steps=150, batch=16, train=4800, validation=280, test=560, seeds=3),
    "gpu": Setting(size=98, frames=8, depth=12, steps=2000, batch=32, train=14000, validation=840, test=1680, seeds=5),
}


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        validation, test: accuracy on these splits, after the last step. An arm that is there for a choice has no test.
        curve: steps, and accuracy on the batches since the last point, each taken before the step that learns from it.
        steps_to_90: the first of these steps from which on the accuracy is at least 90% of the last one.
        trainable: parameters.
    """

    task: str
    arm: str
    seed: int
    validation: float
    test: float | None
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


def train_job(job: tuple[str, str, int], setting: Setting, device: str) -> dict[str, Any]:
    """`train` of (task, arm, seed)."""
    return train(*job, setting, device)


def _adapters(task: str, arm: str, seed: int, setting: Setting, device: str) -> dict[str, Any]:
    steps = setting.steps * ARMS[arm].budget * SLOW.get(task, 1)
    rate = setting.learning_rate / SLOW.get(task, 1)
    backbone = _backbone(setting, device)  # before the seed: making it draws numbers, copying it none
    torch.manual_seed(seed)
    model = VideoClassifier(backbone, len(TASKS[task].classes), setting.frames, **(ARMS[arm].options or {})).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    clips, labels = _clips(task, "train", setting, device)
    order = _order(len(clips), seed)
    curve: list[tuple[int, float]] = []
    right = 0
    for step in range(1, steps + 1):
        chosen = torch.tensor([next(order) for _ in range(setting.batch)])
        logits = _logits(model, clips[chosen])
        loss = cross_entropy(logits, labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right += int((logits.argmax(1) == labels[chosen]).sum())
        every = max(1, steps // POINTS)
        if step % every == 0:
            curve.append((step, right / (every * setting.batch)))
            right = 0
    validation = _accuracy(model, task, "validation", setting, device)
    test = None if ARMS[arm].choice else _accuracy(model, task, "test", setting, device)
    return _result(validation, test, curve, sum(p.numel() for p in trainable))


def _order(count: int, seed: int) -> Iterator[int]:
    """Each clip once, and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


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
    return _result(*best, [(1, best[0])], sum(p.numel() for p in head.parameters()))


def _result(validation: float, test: float | None, curve: list[tuple[int, float]], trainable: int) -> dict[str, Any]:
    last = curve[-1][1]
    below = [place for place, (_, accuracy) in enumerate(curve) if accuracy < 0.9 * last]
    reached = curve[below[-1] + 1 if below else 0][0]
    return {
        "validation": validation, "test": test, "curve": curve, "steps_to_90": reached, "trainable": trainable,
    }  # fmt: skip


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


@cache
def _clips(task: str, split: str, setting: Setting, device: str) -> tuple[Tensor, Tensor]:
    clips, labels = make_clips(task, split, getattr(setting, split), size=setting.size, frames=setting.frames)
    return clips.to(device), labels.to(device)


@cache
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
    # On the CPU, with tokens this few, PyTorch's fused attention takes twice the time of its plain one backward.
    attention = sdpa_kernel(SDPBackend.MATH) if clips.device.type == "cpu" else nullcontext()
    with torch.autocast(clips.device.type, torch.bfloat16), attention:
        return model(_normalised(clips)).float()


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std
