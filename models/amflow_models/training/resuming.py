"""Resuming a run: what must agree with the checkpoint for the same bits, and what may change without that promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amflow_models.training.config import Config

# Options that change no weight of the run, by name or by section. `amflow train --resume` takes any value of them.
FREE = (
    "output", "evaluation", "data.root", "data.train", "data.validation", "data.test", "data.classes", "data.labels",
    "data.workers", "data.strict", "data.missing", "data.subset", "training.keep", "training.save_every",
    "training.validate_every", "training.best", "training.skip_not_finite", "training.wandb",
)  # fmt: skip
# Options that change the rounding of the same computation, as the number of processes does.
ROUNDING = ("training.compile", "training.recompute", "training.parallel")
# Options that the trained parameters depend on: a checkpoint with other ones does not fit the model.
FIXED = (
    "model.backbone", "model.depth", "model.pool", "model.blocks", "model.form", "model.bottleneck", "model.unit",
    "model.pooled", "model.centred", "model.gate", "model.align", "data.num_classes", "data.frames",
)  # fmt: skip


def check_resumed(
    path: Path, state: dict[str, Any], config: Config, clips: str, processes: int, *, allow_changes: bool
) -> list[str]:
    """Compares a run with the checkpoint that it resumes from.

    Args:
        path: the checkpoint.
        state: its state, see `read_state`.
        config: the config of the run that resumes it.
        clips: `digest` of that run's training list.
        processes: its number of processes.
        allow_changes: accept differences after which the run is another one.

    Returns:
        A line for each difference that may change results, with the values before and now.

    Raises:
        ValueError: the run would be another one and `allow_changes` is not set, or the model is another one. All
            differences are listed.
    """
    changes = _changes(state["config"], config)
    fixed = [text for key, text in changes.items() if key in FIXED]
    other = [text for key, text in changes.items() if not _among(key, (*FREE, *ROUNDING, *FIXED))]
    if state["clips"] != clips:
        other.append("it was trained on other clips, another order of them, or with or without --synthetic")
    if fixed:
        raise ValueError(
            f"{path}: is of another model: {'; '.join([*fixed, *other])}. A new run can start from its weights: choose "
            f"another output, and model.start.trained={path} (with model.start.head=new for other classes)"
        )
    if other and not allow_changes:
        raise ValueError(
            f"{path}: is of another run: {'; '.join(other)}. Pass --allow-changes to go on from it all the same. To "
            f"end with the weights of an uninterrupted run, everything must agree except "
            f"{', '.join((*FREE, *ROUNDING))}"
        )
    rounding = [text for key, text in changes.items() if key in ROUNDING]
    before = state.get("processes", processes)
    if before != processes:
        rounding.append(f"{before} processes, now {processes}")
    lines = [f"changed: {text}" for text in other]
    if other:
        lines.append("the run goes on, and its weights will not be those of an uninterrupted run")
    if rounding:
        lines.append(f"the same clips are trained on, with other rounding: {'; '.join(rounding)}")
    return lines


def steps_as_if(state: dict[str, Any], per_epoch: int, count: int) -> int:
    """The checkpoint's progress in steps of this run.

    With another batch or list an epoch has another number of steps; the run goes on at the same place in its epoch.

    Args:
        state: the checkpoint's state.
        per_epoch: steps of an epoch now.
        count: number of training clips, for checkpoints that don't state their steps of an epoch.
    """
    before = state["per_epoch"] if "per_epoch" in state else count // state["config"].training.batch
    return (int(state["step"]) - int(state.get("shift", 0))) * per_epoch // max(1, before)


def _changes(before: Config, now: Config) -> dict[str, str]:
    """The options that differ: ``"training.lr 0.001, now 1.0"`` by name."""
    one, other = (_flat(config.model_dump(mode="json")) for config in (before, now))
    return {
        key: f"{key} {one.get(key)!r}, now {other.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }


def _among(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
