"""Trains a video classifier: ``python -m amflow_models.train --config FILE [key=value ...]``.

On many processes: ``torchrun --nproc-per-node 8 -m amflow_models.train --config FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
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
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from amflow_models.training.augmentation import BatchAugmentation
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
from amflow_models.training.checkpoints import AVERAGE, TRAINED, Checkpoints, read_state, restore_optimizer
from amflow_models.training.config import Config, Training, load_config
from amflow_models.training.loading import TrainBatches, loader
from amflow_models.training.logs import Log
from amflow_models.training.losses import Loss, class_weights
from amflow_models.training.metrics import multi_label_scores, scores
from amflow_models.training.multilabel import label_table
from amflow_models.training.parallel import (
    any_process,
    broadcast_from_main,
    choose_precision,
    clip_gradients,
    cpu_has_bf16,
    distribute,
    exit_process,
    make_accelerator,
    without_sync,
)
from amflow_models.training.prediction import predict
from amflow_models.training.resuming import check_resumed, steps_as_if
from amflow_models.training.timing import Pace, bf16_times
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
        finished = train(config, synthetic=args.synthetic, resume=args.resume, allow_changes=args.allow_changes)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if finished else INTERRUPTED


def train(config: Config, *, synthetic: bool = False, resume: bool = False, allow_changes: bool = False) -> bool:
    """Trains a model by a config. With several processes, each must call it.

    Args:
        config: the config.
        synthetic: use synthetic clips instead of the lists, and random weights where others would be downloaded.
        resume: continue from the newest checkpoint in the config's `output`.
        allow_changes: continue, too, if options or clips differ from the checkpoint's, after which the weights are not
            those of an uninterrupted run; the differences are printed.

    Returns:
        Whether the run was finished. Otherwise it was interrupted (Ctrl-C, SIGTERM), and the newest checkpoint is that
        of the last step.

    Raises:
        ValueError: before the first step: the config, a list or a checkpoint is wrong. Later: the loss or the gradients
            are not finite more often than `training.skip_not_finite`, or a video can't be read (with `data.strict`).
        OSError: a checkpoint can't be written; the earlier ones are kept.
    """
    if allow_changes and not resume:
        raise ValueError("allow_changes: expected with resume, since a new run has nothing to differ from")
    run = _Run(config, synthetic, resume, allow_changes)
    try:
        with _interrupts() as stop:
            finished = run.steps(stop)
        run.accelerator.end_training()
        return finished
    finally:
        run.log.close()


class _Run:
    """Everything that a run needs, created and checked before its first step."""

    def __init__(self, config: Config, synthetic: bool, resume: bool, allow_changes: bool) -> None:
        # Checkpoints hold the precision that was chosen: on a machine that would choose another, the run is another.
        precision = choose_precision(config.training.precision)
        settings = config.training.model_copy(update={"precision": precision})
        config = config.model_copy(update={"training": settings})
        self.config = config
        self.accelerator = make_accelerator(settings.precision, wandb=settings.wandb is not None)
        self.scaler = self.accelerator.scaler  # None unless the precision is fp16
        world = self.accelerator.num_processes
        pairs = 2 if settings.mixup or settings.cutmix else 1
        if settings.batch % (world * settings.accumulate * pairs):
            raise ValueError(
                f"training.batch: expected a multiple of {world} processes times {settings.accumulate} parts"
                f"{' times 2 clips to mix' if pairs == 2 else ''}, got {settings.batch}"
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
        state = read_state(newest[0]) if newest else None
        self.changes: list[str] = []
        if state is not None:
            self.changes = check_resumed(newest[0], state, config, self.clips, world, allow_changes=allow_changes)

        model = build_model(config, synthetic=synthetic, grown=state is not None)
        if state is not None:
            load_trained(model, newest[0] / TRAINED)
        size = image_size(config, model)
        self.train_set = dataset(config, lists.get("train"), size, train=True)
        validated = synthetic or "validation" in lists
        self.validation_set = dataset(config, lists.get("validation"), size, train=False) if validated else None
        count = len(self.train_set)
        self.per_epoch = count // settings.batch
        self.step = 0 if state is None else int(state["step"])
        # Epochs count `step - shift`: the steps that would have been done with this batch and list from the start.
        done = 0 if state is None else steps_as_if(state, self.per_epoch, count)
        self.shift = self.step - done
        self.total = settings.epochs * self.per_epoch + self.shift
        if self.step > self.total:
            raise ValueError(
                f"training.epochs: expected more than the {done / self.per_epoch:.2f} epochs that the checkpoint has, "
                f"got {settings.epochs}"
            )
        self.skipped = 0 if state is None else int(state.get("skipped", 0))
        weight: Tensor | None = None
        shares: Tensor | None = None
        if settings.balance is not None and not synthetic:  # synthetic classes are of equal size
            labels = torch.tensor([video.label for video in lists["train"].videos])
            weights = class_weights(labels, config.data.num_classes)
            if settings.balance == "loss":
                weight = weights
            else:
                shares = weights[labels]
        self.batches = TrainBatches(
            count, settings.batch, rank=self.accelerator.process_index, world=world, seed=config.seed, start=done,
            stop=self.total - self.shift, repeats=1 if synthetic else config.data.repeats, shares=shares,
        )  # fmt: skip
        checkpoints.check_space(model, settings.ema is not None)
        self.checkpoints = checkpoints

        self.report = str(model.report)
        self.normalise = normalisation(model, self.accelerator.device)
        self.model = distribute(model, settings, self.accelerator)
        self.augment = BatchAugmentation(config, self.accelerator.device)
        device = self.accelerator.device
        weight = None if weight is None else weight.to(device)
        table = label_table(self.train_set)
        self.loss = Loss(
            config.data.num_classes, settings.label_smoothing, weight, multi_label=config.data.multi_label,
            table=None if table is None else table.to(device),
        )  # fmt: skip
        self.rate = settings.lr * (settings.batch / settings.base_batch if settings.base_batch else 1)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, settings)
        self.average = Average(self.model, settings.ema) if settings.ema is not None else None
        if state is not None:
            restore_optimizer(self.model, self.optimizer, state)
            if self.average is not None and state["config"].training.ema is not None:  # else it starts from here
                self.average.load(newest[0] / AVERAGE)
            if self.scaler is not None and state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
        if settings.wandb is not None:
            self._start_wandb(settings.wandb)
        self.log = Log(config.output, self.total, self.step, main, self.accelerator.log if settings.wandb else None)
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
        for line in self.changes:
            self.log.say(line, style="yellow")
        if (
            self.step
            and self._validates()
            and not broadcast_from_main(self.log.main and self.log.has("validation", self.step), self.accelerator)
        ):
            self._validate()  # the run was cut off before this validation
        batches = loader(self.train_set, self.batches, self.config.data.workers, self.accelerator.device)
        self.model.train()
        saved = self.step
        pace = Pace(self.accelerator.device, self.log.main)
        end = time.perf_counter()
        first = self.step + 1
        for step, batch in enumerate(batches, first):
            begin = time.perf_counter()
            if step == first:
                self._warn_of_slow_bf16(batch)
            with pace.step():
                values = self._train_step(step, batch)
            now = time.perf_counter()
            values |= {
                "clips_per_second": self.config.training.batch / (now - end),
                "waiting": (begin - end) / (now - end),
            }
            self.step = step
            self.log.write("train", step, values)
            self.log.step(step, _describe((step - self.shift) / self.per_epoch, values))
            pace.add(begin - end, now - end)
            estimate = pace.report(self.total - step)
            if estimate is not None:
                self.log.say(estimate)
            epoch_ends = self._epoch_ends()
            interrupted = any_process(bool(stop), self.accelerator)
            if interrupted or epoch_ends or step % (self.config.training.save_every or self.total + 1) == 0:
                self._save()
                saved = step
            if interrupted:
                self._report_errors()
                self.log.say(f"interrupted after step {step}; --resume goes on from there")
                return False
            if self._validates():
                self._validate()
            end = time.perf_counter()
        if saved != self.step:
            self._save()
        self._report_errors()
        return True

    def _warn_of_slow_bf16(self, batch: dict[str, Any]) -> None:
        """Measures how slow bf16 is on a CPU without units for it, and says so."""
        slow = self.config.training.precision == "bf16" and self.accelerator.device.type == "cpu" and not cpu_has_bf16()
        if not any_process(slow, self.accelerator):  # all take part, since a sharded model needs all
            return
        fp32, bf16 = bf16_times(self.model, self.normalise(batch["clips"][0, :1]))
        self.log.say(
            f"training.precision: this CPU has no units for bf16, and emulates it: a clip takes {bf16:.3g} s, and in "
            f"fp32 {fp32:.3g} s ({bf16 / fp32:.1f} times as long); training.precision=auto would be fp32 here",
            style="yellow",
        )

    def _epoch_ends(self) -> bool:
        """Whether the last step was the last one of an epoch."""
        return (self.step - self.shift) % self.per_epoch == 0

    def _start_wandb(self, project: str) -> None:
        """Starts the run's log at Weights & Biases, or goes on with it."""
        output = self.config.output.resolve()
        name = f"{output.name}-{hashlib.sha256(str(output).encode()).hexdigest()[:8]}"
        output.mkdir(parents=True, exist_ok=True)
        options = {"id": name, "name": output.name, "dir": str(output), "resume": "allow"}
        self.accelerator.init_trackers(project, self.config.model_dump(mode="json"), {"wandb": options})

    def _validates(self) -> bool:
        """Whether a validation follows the last step."""
        epoch = (self.step - self.shift) // self.per_epoch
        last = self.step == self.total
        return self._epoch_ends() and (last or epoch % self.config.training.validate_every == 0)

    def _train_step(self, step: int, batch: dict[str, Any]) -> dict[str, float]:
        settings, accelerator = self.config.training, self.accelerator
        self._count_errors(batch["errors"])
        clips = batch["clips"].flatten(0, 1)
        targets = self.loss.targets(batch["label"].to(accelerator.device, non_blocking=True))
        loss = torch.zeros((), device=accelerator.device)
        size = len(clips) // settings.accumulate
        for part in range(settings.accumulate):
            number = accelerator.process_index * settings.accumulate + part  # among the parts of all processes
            own = slice(part * size, (part + 1) * size)
            with without_sync(self.model, accelerator, last=part == settings.accumulate - 1):
                inputs, wanted = self.augment(self.normalise(clips[own]), targets[own], step=step, first=number * size)
                # Random numbers inside the model depend only on the step, so that a resumed run draws the same ones.
                parts = accelerator.num_processes * settings.accumulate
                torch.manual_seed(self.config.seed * 1_000_003 + step * parts + number)
                with accelerator.autocast():
                    logits = self.model(inputs).float()
                part_loss = self.loss(logits, wanted) / settings.accumulate
                (part_loss if self.scaler is None else self.scaler.scale(part_loss)).backward()
            loss += part_loss.detach()
        done, total = step - self.shift, self.total - self.shift
        rate = _rate(done, total, settings.warmup_epochs * self.per_epoch, self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, settings.clip_grad)
        mean = float(accelerator.reduce(loss, "mean"))
        if math.isfinite(mean) and math.isfinite(norm):  # these are the same in all processes
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update()
        elif self.scaler is None or not math.isfinite(mean) or self.scaler.get_scale() < 1:
            self._count_not_finite(step, mean, norm)
        if self.scaler is not None:  # it lowers its scale after an overflow, which is no fault of the run
            self.scaler.update()
        self.optimizer.zero_grad()
        return {"loss": mean, "lr": rate, "gradient_norm": norm}

    def _count_not_finite(self, step: int, loss: float, norm: float) -> None:
        """Counts a step that is left out. Raises ValueError if there are too many, with advice."""
        settings = self.config.training
        self.skipped += 1
        what = f"step {step}: the loss is {loss}, the gradients' norm {norm}"
        if self.skipped <= settings.skip_not_finite:
            self.log.say(f"{what}: left out ({self.skipped} of at most {settings.skip_not_finite})", style="yellow")
            return
        advice = [f"training.lr={settings.lr / 2:.1e}"]
        if settings.clip_grad is None:
            advice.append("training.clip_grad=1")
        if settings.precision != "fp32":
            advice.append("training.precision=fp32")
        last = self.checkpoints.all()[-1:]
        go_on = f"go on from {last[0]} with --resume --allow-changes" if last else "start again with"
        raise ValueError(
            f"{what}. Lower the learning rate: {go_on} {' '.join(advice)}. Or leave such steps out, for example up to "
            f"ten{' (with --resume)' if last else ''}: training.skip_not_finite={self.skipped + 9}"
        )

    def _validate(self) -> None:
        """Scores the weights and their average, and marks the best checkpoint; the current step has one."""
        if self.validation_set is None:
            return
        scored = {"validation": self._scores()}
        if self.average is not None:
            with self.average.applied():
                scored["validation_ema"] = self._scores()
        if not self.accelerator.is_main_process:
            return
        self._mark_best(list(scored.values())[-1])
        for name, values in reversed(scored.items()):  # a run that was cut off repeats this unless it has the last line
            if not self.log.has(name, self.step):
                self.log.write(name, self.step, values)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            self.log.say(f"epoch {(self.step - self.shift) // self.per_epoch}: {name.replace('_', ' of the ')} {shown}")

    def _scores(self) -> dict[str, float]:
        predictions = predict(self.model, self.validation_set, self.config, self.normalise, self.accelerator)
        if self.accelerator.is_main_process:  # all processes have all errors
            self.errors.update(predictions.errors)
        if self.config.data.multi_label:
            return {
                "loss": predictions.loss,
                "map": multi_label_scores(predictions.probabilities, predictions.labels).map,
            }
        result = scores(predictions.probabilities, predictions.labels)
        return {"loss": predictions.loss, "top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}

    def _mark_best(self, values: dict[str, float]) -> None:
        name = self.config.training.best or ("map" if self.config.data.multi_label else "top1")
        before = self.checkpoints.best()
        last = math.inf if before is None or name not in before["score"] else before["score"][name]
        if math.isinf(last) or (values[name] < last if name == "loss" else values[name] > last):
            self.checkpoints.mark_best(self.step, {name: values[name]})

    def _save(self) -> None:
        more = {
            "config": self.config.model_dump(mode="json"), "clips": self.clips, "classes": self.classes,
            "skipped": self.skipped, "shift": self.shift, "per_epoch": self.per_epoch,
            "processes": self.accelerator.num_processes,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }  # fmt: skip
        self.checkpoints.save(self.step, self.model, self.optimizer, self.average, more, self.accelerator)

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
    parser.add_argument(
        "--allow-changes", action="store_true",
        help="with --resume: continue, too, if options or clips have changed; the weights are then not those of an "
        "uninterrupted run",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first video that can't be read")
    parser.add_argument(
        "changes", nargs="*", metavar="key=value", help="change a value of the config, such as training.lr=1e-3"
    )
    return parser


if __name__ == "__main__":
    exit_process(main())
