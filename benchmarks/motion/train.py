"""Trains one arm on one task from one seed, and tests it once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from amflow_models import VideoClassifier, create_backbone
from amflow_models.cli.offline import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS, make_clips

POINTS = 20  # of the curve of a run
MAX_GRADIENT_NORM = 1.0  # the first gradients are large


LEARNABLE = ("direction", "which", "which_pan")  # which a convolution over frames learns at the setting "cpu"


@dataclass(frozen=True)
class Setting:
    """How large everything is.

    Attributes:
        size: width and height of a frame in pixels.
        frames: frames of a clip.
        depth: how many of the backbone's 12 blocks are used.
        steps, batch: of AdamW, with one cycle of the learning rate.
        train, validation, test: clips of each split; training shuffles them anew for each pass.
        seeds: how many runs of each arm.
        tasks: names in `TASKS`.
        precision: "bf16" (autocast) or "fp32". CPUs without AVX512_BF16 or AMX multiply bf16 matrices 20 to 35 times
            slower than fp32 ones.
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
    tasks: tuple[str, ...] = tuple(TASKS)
    precision: str = "bf16"


SETTINGS = {
    "smoke": Setting(
        size=56, frames=3, depth=2, steps=6, batch=4, train=28, validation=28, test=28, seeds=1, precision="fp32"
    ),
    "cpu": Setting(
        size=70, frames=4, depth=4, steps=450, batch=16, train=9600, validation=280, test=560, seeds=5, tasks=LEARNABLE
    ),
    "gpu": Setting(size=98, frames=8, depth=12, steps=2000, batch=32, train=14000, validation=840, test=1680, seeds=5),
}


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Attributes:
        rate, steps: the learning rate and the number of steps; 0 for probes.
        validation, test: accuracy on these splits after the last step; None if it was not tested.
        curve: steps, and accuracy on the batches since the previous point, each predicted before the model learns
            from it.
        steps_to_90: the first of these steps from which on the accuracy stays at 90% of the last one or more.
        trainable: number of trainable parameters.
        seconds: duration of the run.
    """

    task: str
    arm: str
    seed: int
    rate: float
    steps: int
    validation: float
    test: float | None
    curve: list[tuple[int, float]]
    steps_to_90: int
    trainable: int
    seconds: float


class Job(NamedTuple):
    """A run to be made; fields as those of `Run`."""

    task: str
    arm: str
    seed: int
    rate: float = 0.0
    steps: int = 0
    tested: bool = True


def train(job: Job, setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """A `Run`, as a dict."""
    started = time.perf_counter()
    run = (_probe if ARMS[job.arm].options is None else _adapters)(job, setting, device)
    run |= {name: value for name, value in job._asdict().items() if name != "tested"}
    return asdict(Run(**run, seconds=round(time.perf_counter() - started, 1)))


def _adapters(job: Job, setting: Setting, device: str) -> dict[str, Any]:
    task, arm, seed, rate, steps, tested = job
    backbone = _backbone(setting, device)  # before seeding: creating one draws random numbers, copying does not
    torch.manual_seed(seed)
    model = VideoClassifier(backbone, len(TASKS[task].classes), setting.frames, **(ARMS[arm].options or {})).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.01)
    warmup = max(0.1, 2 / steps)  # a share; the schedule divides by its steps less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=warmup)
    clips, labels = _clips(task, "train", setting, device)
    order = _order(len(clips), seed)
    curve: list[tuple[int, float]] = []
    correct = 0
    for step in range(1, steps + 1):
        chosen = torch.tensor([next(order) for _ in range(setting.batch)])
        logits = _logits(model, clips[chosen], setting)
        loss = cross_entropy(logits, labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        correct += int((logits.argmax(1) == labels[chosen]).sum())
        every = max(1, steps // POINTS)
        if step % every == 0:
            curve.append((step, correct / (every * setting.batch)))
            correct = 0
    validation = _accuracy(model, task, "validation", setting, device)
    test = _accuracy(model, task, "test", setting, device) if tested else None
    return _result(validation, test, curve, sum(p.numel() for p in trainable))


def _order(count: int, seed: int) -> Iterator[int]:
    """Indices of clips without end: every pass has each clip once, in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _probe(job: Job, setting: Setting, device: str) -> dict[str, Any]:
    """Logistic regression on standardised vectors of the backbone; the validation split chooses the weight decay."""
    data = {split: _vectors(job.task, split, setting, device) for split in ("train", "validation", "test")}
    sees = ARMS[job.arm].sees

    def features(split: str) -> Tensor:
        x = data[split][0]
        return {"mean": x.mean(1), "first": x[:, 0], "all": x.flatten(1)}[sees]

    std, mean = torch.std_mean(features("train"), 0)
    x = {split: (features(split) - mean) / (std + 1e-6) for split in data}
    classes, best = len(TASKS[job.task].classes), (-1.0, 0.0)
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
    below = [point for point, (_, accuracy) in enumerate(curve) if accuracy < 0.9 * last]
    reached = curve[below[-1] + 1 if below else 0][0]
    accuracy = {"validation": validation, "test": test, "curve": curve}
    return {**accuracy, "steps_to_90": reached, "trainable": trainable}


def _backbone(setting: Setting, device: str) -> Any:
    """A copy of `_pretrained` that the caller may change."""
    return deepcopy(_pretrained(setting.size, setting.depth)).to(device)


@cache
def _pretrained(size: int, depth: int) -> Any:
    """The first blocks of DINOv2 ViT-S/14 with the mean over patches as output.

    If the output were the class token, the temporal unit of the last adapter would have no effect on other tokens.
    """
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
    guesses = torch.cat([_logits(model, part, setting).argmax(1) for part in clips.split(4 * setting.batch)])
    return (guesses == labels).float().mean().item()


def _logits(model: nn.Module, clips: Tensor, setting: Setting) -> Tensor:
    # On a CPU and with so few tokens, the backward of PyTorch's fused attention takes twice the time of the plain one.
    attention = sdpa_kernel(SDPBackend.MATH) if clips.device.type == "cpu" else nullcontext()
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=setting.precision == "bf16"), attention:
        return model(_normalised(clips)).float()


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std
