"""Checkpoints, from which a run is resumed: written completely or not at all; the newest few are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from amflow_models.files import flush, write_text
from amflow_models.training.average import Average
from amflow_models.training.config import Config, parse_config
from amflow_models.unpickling import tensors_only
from amflow_models.weights import read_described, save_trained, trained_state

TRAINED, AVERAGE, STATE = "model.safetensors", "ema.safetensors", "state.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Checkpoints:
    """The folder `checkpoints` of a run: `step_00000100`, ...

    Each holds `model.safetensors` (the trainable parameters, written by `save_trained`), `ema.safetensors` if there is
    an average, and `state.pt` (the optimizer's state, the step and the config). They do not depend on the number of
    processes. The files of weights also hold the config and the names of the classes, see `read_about`.

    Args:
        output: folder of the run.
        keep: number of the newest checkpoints to keep, besides the one that `best.json` names.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self.folder, self.keep = output / "checkpoints", keep
        self.best_file = output / "best.json"

    def all(self) -> list[Path]:
        """All complete checkpoints, from the oldest to the newest."""
        return sorted(path for path in self.folder.glob("step_*") if path.suffix != ".part")

    def best(self) -> dict[str, Any] | None:
        """The best checkpoint's "step", and its "score" by name, as `mark_best` left them; None if it is not there."""
        try:
            found: dict[str, Any] = json.loads(self.best_file.read_text())
            return found if self.path(found["step"]).is_dir() else None
        except OSError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.best_file}: expected a step and its score ({error}); remove the file") from error

    def mark_best(self, step: int, score: dict[str, float]) -> None:
        """Keeps the checkpoint of a step, until another one is marked."""
        write_text(self.best_file, json.dumps({"step": step, "score": score}) + "\n")
        self._remove_old()

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step_{step:08d}"

    def check_space(self, model: nn.Module, average: bool) -> None:
        """Raises OSError unless the disk has room for the newest checkpoints, the best and the one being written."""
        copies = 3 + average  # weights, AdamW's two moments, average
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        needed = (self.keep + 2) * copies * trained
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder}: {needed / 1e6:.0f} MB are needed for checkpoints, {free / 1e6:.0f} MB are free"
            )

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        more: dict[str, Any],
        accelerator: Accelerator,
    ) -> None:
        """Writes a checkpoint and removes the oldest; all processes must call it.

        Args:
            step: the step that was done last.
            model, optimizer, average: the state to save; the average may be None.
            more: what else `state.pt` shall hold, with the run's "config", "clips", the `digest` of its list, and the
                names of its "classes", None if they have none.
            accelerator: the processes.

        Raises:
            OSError: the checkpoint can't be written; the existing ones are kept.
        """
        trained = trained_state(model)
        averaged = None
        if average is not None:
            with average.applied():
                averaged = {name: x.clone() for name, x in trained_state(model).items()}
        state = {
            "step": step,
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
            **more,
        }
        if accelerator.is_main_process:
            # Equal runs write equal files, wherever they write them.
            described = {key: value for key, value in more["config"].items() if key != "output"}
            about = {"config": described, "classes": more["classes"]}
            self._write(self.path(step), model, trained, averaged, about, state)
        accelerator.wait_for_everyone()

    def _write(self, path: Path, model: nn.Module, trained: Any, averaged: Any, about: Any, state: Any) -> None:
        part = path.with_suffix(".part")
        for leftover in self.folder.glob("step_*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            save_trained(model, part / TRAINED, trained, about=about)
            if averaged is not None:
                save_trained(model, part / AVERAGE, averaged, about=about)
            torch.save(state, part / STATE)
            for file in [*part.iterdir(), part]:
                flush(file)
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
        except Exception as error:  # those of the file system, safetensors and torch.save differ
            shutil.rmtree(part, ignore_errors=True)
            last = self.all()
            kept = f"the last one is {last[-1]}" if last else "there is none yet"
            raise OSError(f"{path}: the checkpoint can't be written ({error}); {kept}") from error
        flush(self.folder)
        self._remove_old()

    def _remove_old(self) -> None:
        best = self.best()
        kept = None if best is None else self.path(best["step"])
        for old in self.all()[: -self.keep]:
            if old == kept:
                continue
            shutil.rmtree(old, ignore_errors=True)  # a network file system keeps files that are open


def find_trained(path: Path, name: str = TRAINED, *, best: bool = False) -> Path:
    """Finds the file of weights that a path stands for.

    Args:
        path: a file, a checkpoint, or a run, whose newest checkpoint is taken.
        name: name of the file in a checkpoint.
        best: take a run's best checkpoint instead of its newest.

    Raises:
        ValueError: there is no such file.
    """
    file = path
    if best:
        checkpoints = Checkpoints(path, 1)
        found = checkpoints.best()
        if found is None:
            raise ValueError(f"{path}: expected a run with a best checkpoint, and there is no {checkpoints.best_file}")
        file = checkpoints.path(found["step"])
    elif (path / "checkpoints").is_dir():
        file = next(reversed(Checkpoints(path, 1).all()), path)
    if file.is_dir():
        file = file / name
    if not file.is_file():
        raise ValueError(f"{path}: expected a run, a checkpoint or a file, and there is no file {file}")
    return file


@dataclass(frozen=True)
class About:
    """What a file of trained weights says about its classifier.

    Attributes:
        config: the config that it was trained by; `output` is the run that the file is in, or the file's folder.
        classes: names of its classes; None if they have none.
    """

    config: Config
    classes: list[str] | None


def read_about(trained: Path) -> About | None:
    """Reads what a file of weights says about its classifier.

    In checkpoints of version 0.1 only `state.pt` says it, and classes have no names.

    Args:
        trained: the file, as `find_trained` finds it.

    Returns:
        None for a file that is from no run, but from a call of `save_trained`.

    Raises:
        ValueError: the file can't be read, or has options that this version does not know.
    """
    inside = trained.parent.parent.name == "checkpoints"
    output = trained.parent.parent.parent if inside else trained.parent
    described = read_described(trained)
    if described is not None:
        try:
            config, classes = {**described["config"], "output": str(output)}, described["classes"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{trained}: what it says about its classifier can't be read ({error!r})") from error
        return About(parse_config(config, trained), classes)
    if (trained.parent / STATE).is_file():
        return About(read_state(trained.parent)["config"].model_copy(update={"output": output}), None)
    return None


def check_backbone(trained: Path, config: Config) -> None:
    """Raises ValueError if weights were trained on another backbone, whose names and shapes may be the same.

    Options that the checkpoint's config lacks have their defaults; one that this version does not know is an error.
    """
    about = read_about(trained)
    if about is None:
        return
    before, now = about.config.model, config.model
    changed = [
        f"{key} {getattr(before, key)!r}, now {getattr(now, key)!r}"
        for key in ("backbone", "depth", "pool")
        if getattr(before, key) != getattr(now, key)
    ]
    if changed:
        raise ValueError(f"{trained}: was trained on another backbone: {', '.join(changed)}")


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.pt`, with the config as a `Config`.

    Raises:
        ValueError: it can't be read, or has options that this version does not know.
    """
    try:
        with tensors_only(STATE):
            state: dict[str, Any] = torch.load(path / STATE, map_location="cpu")
    except Exception as error:  # torch.load has no error of its own
        raise ValueError(f"{path}: can't be read as a checkpoint ({error})") from error
    if not isinstance(state, dict) or not {"step", "optimizer", "config", "clips"} <= state.keys():
        raise ValueError(f"{path}: can't be read as a checkpoint (its {STATE} holds something else)")
    return state | {"config": parse_config(state["config"], path / STATE)}


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the optimizer's state, but not its options; each process takes its part."""
    names = ("betas", "weight_decay")
    options = [{name: group[name] for name in names} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_WHOLE)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
