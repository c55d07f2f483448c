"""Trains a video classifier: ``python -m amflow_models.train --config FILE [key=value ...]``.

On many processes: ``torchrun --nproc-per-node 8 -m amflow_models.train --config FILE``.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy

from amflow_models.training.average import Average
from amflow_models.training.build import (
    SPLITS,
    build_model,
    class_names,
    dataset,
    digest,
    image_size,
    normalisation,
    read_lists,
)
from amflow_models.training.checkpoints import AVERAGE, TRAINED, Checkpoints, load_state, restore_optimizer
from amflow_models.training.config import Config, Training, load_config
from amflow_models.training.loading import TrainBatches, loader
from amflow_models.training.logs import Log
from amflow_models.training.metrics import scores
from amflow_models.training.parallel import (
    any_process,
    broadcast_from_main,
    choose_precision,
    clip_gradients,
    distribute,
    exit_process,
    make_accelerator,
    without_sync,
)
from amflow_models.training.prediction import predict
from amflow_models.weights import load_trained

INTERRUPTED = 130  # exit status, as in a shell after Ctrl-C
PATIENCE = 2.0  # seconds after which another Ctrl-C ends the run at once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0; 1 after an error, which is printed in a line; 130 if the run was interrupted and can be
        resumed.
    """
    args = _parser().parse_intermixed_args(argv)
    try:
        config = load_config(args.config, [*args.changes, *(["data.strict=true"] if args.strict else [])])
        finished = train(config, synthetic=args.synthetic, resume=args.resume)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if finished else INTERRUPTED


def train(config: Config, *, synthetic: bool = False, resume: bool = False) -> bool:
    """Trains a model by a config. With several processes, each must call it.

    Args:
        config: the config.
        synthetic: use synthetic clips instead of the lists, and random weights where others would be downloaded.
        resume: continue from the newest checkpoint in the config's `output`.

    Returns:
        Whether the run was finished. Otherwise it was interrupted (Ctrl-C, SIGTERM), and the newest checkpoint is that
        of the last step.

    Raises:
        ValueError: before the first step: the config, a list or a checkpoint is wrong. Later: the loss or the gradients
            are not finite, or a video can't be read (with `data.strict`).
        OSError: a checkpoint can't be written; the earlier ones are kept.
    """
    run = _Run(config, synthetic, resume)
    try:
        with _interrupts() as stop:
            finished = run.steps(stop)
        run.accelerator.end_training()
        return finished
    finally:
        run.log.close()


class _Run:
    """Everything that a run needs, created and checked before its first step."""

    def __init__(self, config: Config, synthetic: bool, resume: bool) -> None:
        # Checkpoints hold the precision that was chosen: on a machine that would choose another, the run is another.
        precision = choose_precision(config.training.precision)
        settings = config.training.model_copy(update={"precision": precision})
        config = config.model_copy(update={"training": settings})
        self.config = config
        self.accelerator = make_accelerator(settings.precision)
        world = self.accelerator.num_processes
        if settings.batch % (world * settings.accumulate):
            raise ValueError(
                f"training.batch: expected a multiple of {world} processes times {settings.accumulate} parts, "
                f"got {settings.batch}"
            )
        checkpoints = Checkpoints(config.output, settings.keep)
        newest = broadcast_from_main(checkpoints.all()[-1:], self.accelerator)
        if newest and not resume:
            raise ValueError(
                f"output already holds a checkpoint ({newest[0]}): pass --resume to continue, or choose another output"
            )
        if resume and not newest:
            raise ValueError(f"output: there is no checkpoint in {checkpoints.folder} to resume")
        main = self.accelerator.is_main_process
        lists = {} if synthetic else read_lists(config, SPLITS, check=main)
        self.clips, self.classes = digest(lists), class_names(config, lists.get("train"))
        state = load_state(newest[0], config, self.clips) if newest else None

        model = build_model(config, synthetic=synthetic, grown=state is not None)
        if state is not None:
            load_trained(model, newest[0] / TRAINED)
        size = image_size(config, model)
        self.train_set = dataset(config, lists.get("train"), size, train=True)
        validated = synthetic or "validation" in lists
        self.validation_set = dataset(config, lists.get("validation"), size, train=False) if validated else None
        self.per_epoch = len(self.train_set) // settings.batch
        self.total = settings.epochs * self.per_epoch
        self.step = 0 if state is None else int(state["step"])
        self.batches = TrainBatches(
            len(self.train_set), settings.batch, rank=self.accelerator.process_index, world=world, seed=config.seed,
            start=self.step, stop=self.total,
        )  # fmt: skip
        checkpoints.check_space(model, settings.ema is not None)
        self.checkpoints = checkpoints

        self.report = str(model.report)
        self.normalise = normalisation(model, self.accelerator.device)
        self.model = distribute(model, settings, self.accelerator)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, settings)
        self.average = Average(self.model, settings.ema) if settings.ema is not None else None
        if state is not None:
            restore_optimizer(self.model, self.optimizer, state)
            if self.average is not None:
                self.average.load(newest[0] / AVERAGE)
        self.log = Log(config.output, self.total, self.step, main)
        self.errors: Counter[str] = Counter()

    def steps(self, stop: list[float]) -> bool:
        """Runs until the end, or until `stop` is no longer empty. Returns whether it reached the end."""
        self.log.say(self.report)
        layout = "sharded" if isinstance(self.model, FSDPModule) else "copied"
        self.log.say(
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}, the model is {layout}, "
            f"precision {self.config.training.precision}"
        )
        self.log.say(
            f"{self.total} steps of {self.config.training.batch} clips, from step {self.step}: {self.config.output}"
        )
        if (
            self.step
            and self.step % self.per_epoch == 0
            and not broadcast_from_main(self.log.main and self.log.has("validation", self.step), self.accelerator)
        ):
            self._validate()  # the run was cut off before this validation
        batches = loader(self.train_set, self.batches, self.config.data.workers, self.accelerator.device)
        self.model.train()
        saved = self.step
        end = time.perf_counter()
        for step, batch in enumerate(batches, self.step + 1):
            begin = time.perf_counter()
            values = self._train_step(step, batch)
            now = time.perf_counter()
            values |= {
                "clips_per_second": self.config.training.batch / (now - end),
                "waiting": (begin - end) / (now - end),
            }
            self.step = step
            self.log.write("train", step, values)
            self.log.step(step, _describe(step / self.per_epoch, values))
            epoch_ends = step % self.per_epoch == 0
            interrupted = any_process(bool(stop), self.accelerator)
            if interrupted or epoch_ends or step % (self.config.training.save_every or self.total + 1) == 0:
                self._save()
                saved = step
            if interrupted:
                self._report_errors()
                self.log.say(f"interrupted after step {step}; --resume goes on from there")
                return False
            if epoch_ends:
                self._validate()
            end = time.perf_counter()
        if saved != self.step:
            self._save()
        self._report_errors()
        return True

    def _train_step(self, step: int, batch: dict[str, Any]) -> dict[str, float]:
        settings, accelerator = self.config.training, self.accelerator
        self._count_errors(batch["errors"])
        # Random numbers inside the model depend only on the step, so that a resumed run draws the same ones.
        torch.manual_seed(self.config.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
        clips, labels = batch["clips"].flatten(0, 1), batch["label"].to(accelerator.device, non_blocking=True)
        parts = list(zip(clips.chunk(settings.accumulate), labels.chunk(settings.accumulate), strict=True))
        loss = torch.zeros((), device=accelerator.device)
        for number, (part_clips, part_labels) in enumerate(parts, 1):
            with without_sync(self.model, accelerator, last=number == len(parts)):
                with accelerator.autocast():
                    logits = self.model(self.normalise(part_clips)).float()
                part = cross_entropy(logits, part_labels, label_smoothing=settings.label_smoothing) / len(parts)
                part.backward()
            loss += part.detach()
        rate = _rate(step, self.total, settings.warmup_epochs * self.per_epoch, settings.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = clip_gradients(self.parameters, settings.clip_grad)
        mean = float(accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise ValueError(f"step {step}: the loss is {mean}, the gradients' norm {norm}; lower training.lr?")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return {"loss": mean, "lr": rate, "gradient_norm": norm}

    def _validate(self) -> None:
        if self.validation_set is None:
            return
        predictions = predict(self.model, self.validation_set, self.config, self.normalise, self.accelerator)
        if self.accelerator.is_main_process:  # all processes have all errors
            self.errors.update(predictions.errors)
        result = scores(predictions.probabilities, predictions.labels)
        values = {"loss": predictions.loss, "top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
        self.log.write("validation", self.step, values)
        self.log.say(f"epoch {self.step // self.per_epoch}: validation {result}")

    def _save(self) -> None:
        self.checkpoints.save(
            self.step, self.model, self.optimizer, self.average, self.config, self.clips, self.classes, self.accelerator
        )

    def _count_errors(self, errors: list[str]) -> None:
        if self.config.data.strict and any_process(bool(errors), self.accelerator):
            raise ValueError(errors[0] if errors else "another process can't read a video")
        for error in errors:
            if not self.errors[error]:
                self.log.say(f"skipped: {error}", style="yellow")
            self.errors[error] += 1

    def _report_errors(self) -> None:
        counts = [*self.errors.items()]
        if self.accelerator.num_processes > 1:
            counts = gather_object(counts)
        if counts:
            total: Counter[str] = Counter()
            for error, count in counts:
                total[error] += count
            self.log.say(f"{len(total)} videos could not be read:")
            for error, count in sorted(total.items()):
                self.log.say(f"  {error} ({count}x)")


def _optimizer(parameters: list[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """AdamW, without weight decay of biases, gains and scales."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def _rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Learning rate of a step from 1 to `total`: linear up to `peak`, then half a cosine down to 0."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def _describe(epoch: float, values: dict[str, float]) -> str:
    return (
        f"epoch {epoch:.2f}  loss {values['loss']:.3f}  {values['clips_per_second']:.1f} clips/s  "
        f"{values['waiting']:.0%} waiting for data"
    )


@contextmanager
def _interrupts() -> Iterator[list[float]]:
    """A list of the times of SIGINT and SIGTERM. Another Ctrl-C after `PATIENCE` seconds raises KeyboardInterrupt.

    An earlier second signal does not: one interrupt may arrive twice, from a scheduler and from torchrun, or at a
    process and at its group.
    """
    times: list[float] = []
    previous: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] - times[0] > PATIENCE:
            raise KeyboardInterrupt

    for kind in (signal.SIGINT, signal.SIGTERM):
        previous[kind] = signal.signal(kind, handle)
    try:
        yield times
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="amflow train", description="Train a video classifier with AM-flow adapters.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a YAML file, or the name of a config of the package"
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="train on synthetic clips, to try a config and its speed"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the output folder"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first video that can't be read")
    parser.add_argument(
        "changes", nargs="*", metavar="key=value", help="change a value of the config, such as training.lr=1e-3"
    )
    return parser


if __name__ == "__main__":
    exit_process(main())
