"""Checkpoints of earlier versions: options that they lack have their defaults, unknown ones are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models import evaluate, load_trained, train
from amflow_models.blocks import AdapterOptions
from amflow_models.training.build import build_model
from amflow_models.training.checkpoints import Checkpoints
from amflow_models.training.config import Model, load_config
from amflow_models.training.resuming import FIXED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import rows

KEPT = Path(__file__).parent / "checkpoint_of_0.1"  # its README.md says how it was made
SHOWN = ("pool", "depth", "training")
DEFAULTS = [key for key, field in Model.model_fields.items() if not field.is_required()]


@pytest.fixture
def old_run(videos: Path, tmp_path: Path) -> list[str]:
    """The words of the command for a run whose checkpoint is the kept one, on videos under the names of its list."""
    for number in range(4):
        shutil.copy(videos / f"train {number}.mp4", tmp_path / f"clip {number}.mp4")
    (tmp_path / "train.txt").write_text("".join(f"clip {number}.mp4 {number % 2}\n" for number in range(4)))
    shutil.copytree(KEPT, tmp_path / "run")
    return ["--config", str(KEPT / "config.yaml"), f"data.root={tmp_path}", f"output={tmp_path / 'run'}"]


def evaluation(words: list[str]) -> list[str]:
    """The words of the command that tests the run on its training list."""
    return [*words, "--split", "train", "--output", words[-1].removeprefix("output=") + "_tested"]


def checkpoint(words: list[str]) -> Path:
    """The newest checkpoint of the run."""
    return Checkpoints(Path(words[-1].removeprefix("output=")), 2).all()[-1]


def edit_state(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the config in a checkpoint."""
    state = torch.load(path / "state.pt", weights_only=True)
    edit(state["config"])
    torch.save(state, path / "state.pt")


def edit_options(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the options of adapters in a file of weights."""
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["adapters"])
    edit(options)
    save_file(load_file(path), path, metadata={"adapters": json.dumps(options)})


def test_a_checkpoint_of_version_0_1_is_evaluated_and_resumed(
    old_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(old_run)
    model = build_model(load_config(KEPT / "config.yaml"))
    load_trained(model, path / "model.safetensors")
    kept, loaded = load_file(path / "model.safetensors"), dict(model.named_parameters())
    assert len(kept) == sum(p.requires_grad for p in loaded.values())
    assert all(torch.equal(loaded[name], value) for name, value in kept.items())
    for more in ([], ["--ema"]):
        assert evaluate.main([*evaluation(old_run), *more]) == 0, capsys.readouterr().err
    assert train.main([*old_run, "--resume"]) == 0, capsys.readouterr().err
    assert [step for step, *_ in rows(path.parent.parent)] == ["3", "4"]
    assert checkpoint(old_run).name == "step_00000004"


@pytest.mark.parametrize(
    "missing",
    [
        *SHOWN,
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*DEFAULTS, "data.scale"] if name not in SHOWN),
    ],
)
def test_options_that_a_checkpoint_lacks_have_their_defaults(
    old_run: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be of a version in which they did not exist."""
    names = ("model", missing) if missing in DEFAULTS else tuple(missing.split("."))

    def remove(config: dict[str, Any]) -> None:
        *sections, last = names
        for section in sections:
            config = config[section]
        config.pop(last, None)  # that run was before some options were

    changes = {"weights": "hub", "img_size": None, "depth": None, "bottleneck": 64}
    path = checkpoint(old_run)
    edit_state(path, remove)
    evaluated = evaluate.main(evaluation(old_run))
    error = capsys.readouterr().err
    if missing == "depth":  # its default is another depth
        assert evaluated == 1
        assert "was trained on another backbone: depth None, now 1" in error
    else:
        assert evaluated == 0, error
    resumed = train.main([*old_run, "--resume"])
    error = capsys.readouterr().err
    if missing in changes:
        assert resumed == 1
        kind = "model" if f"model.{missing}" in FIXED else "run"
        assert f"is of another {kind}: model.{missing} {changes[missing]!r}, now " in error
    elif missing == "training":
        assert resumed == 1
        assert "training.lr 0.0003, now 0.001" in error
    else:
        assert resumed == 0, error


@pytest.mark.parametrize("section", ["model", "training", "data"])
def test_a_checkpoint_with_unknown_options_is_refused_by_their_names(
    old_run: list[str], section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be of a later version, and mean something else."""
    edit_state(checkpoint(old_run), lambda config: config[section].update(colour="red"))
    for main, words in ((evaluate.main, evaluation(old_run)), (train.main, [*old_run, "--resume"])):
        assert main(words) == 1
        message = capsys.readouterr().err
        assert f"{section}.colour: there is no such key" in message
        assert str(checkpoint(old_run)) in message


ADAPTER_DEFAULTS = ["form", "activation", "unit", "pooled", "centred", "gate", "align"]


@pytest.mark.parametrize("missing", ADAPTER_DEFAULTS)
def test_adapter_options_that_a_file_of_weights_lacks_have_their_defaults(tmp_path: Path, missing: str) -> None:
    path = shutil.copy(KEPT / "checkpoints" / "step_00000002" / "model.safetensors", tmp_path)
    edit_options(path, lambda options: options.pop(missing))
    config = load_config(KEPT / "config.yaml")
    load_trained(build_model(config), path)
    if missing == "gate":
        other = build_model(load_config(KEPT / "config.yaml", ["model.gate=frame_difference"]))
        with pytest.raises(ValueError, match=r"of other options: gate 'am_flow', expected 'frame_difference'"):
            load_trained(other, path)


def test_every_adapter_option_with_a_default_is_tested_above() -> None:
    """The bottleneck is not 64 here, and the implementation is in no file."""
    assert {*ADAPTER_DEFAULTS, "num_frames", "bottleneck", "impl"} == set(AdapterOptions.__dataclass_fields__)


def test_a_file_of_weights_with_unknown_adapter_options_is_refused_by_their_names(tmp_path: Path) -> None:
    path = shutil.copy(KEPT / "checkpoints" / "step_00000002" / "model.safetensors", tmp_path)
    edit_options(path, lambda options: options.update(colour="red"))
    with pytest.raises(ValueError, match=r"of unknown options: colour$"):
        load_trained(build_model(load_config(KEPT / "config.yaml")), path)
