"""No dead ends: resumed runs with changes, starts from other classes, steps whose loss is not finite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models import train
from amflow_models.training.build import build_model
from amflow_models.training.checkpoints import Checkpoints, find_trained, read_state, restore_optimizer
from amflow_models.training.config import Config, load_config
from amflow_models.training.losses import Loss
from amflow_models.training.resuming import FIXED, FREE, ROUNDING, steps_as_if
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training_runs import environment, rows, same_weights, write_config

OPTIONS = ["training.epochs=1", "training.warmup_epochs=0"]


@pytest.fixture(scope="module")
def done(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of one epoch of four steps."""
    folder = tmp_path_factory.mktemp("done")
    assert train.main(["--config", str(write_config(videos, folder)), *OPTIONS]) == 0
    return folder / "run"


@pytest.fixture
def words(done: Path, config_file: Path) -> list[str]:
    """The words of the command for a copy of that run."""
    shutil.copytree(done, load_config(config_file).output)
    return ["--config", str(config_file), *OPTIONS]


def output(words: list[str]) -> Path:
    return load_config(words[1]).output


def test_a_run_goes_on_with_changes_only_if_they_are_allowed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error and the resumed run name every change. The place in the epochs is kept, and no line of the log lost."""
    changed = [*words, "training.lr=2e-3", "training.epochs=2", "training.batch=8", "data.repeats=2", "--resume"]
    assert train.main(changed) == 1
    error = capsys.readouterr().err
    for change in ("data.repeats 1, now 2", "training.batch 4, now 8", "training.epochs 1, now 2"):
        assert change in error
    assert "Pass --allow-changes to go on" in error
    assert all(name in error for name in (*FREE, *ROUNDING))
    assert train.main([*changed, "--allow-changes"]) == 0
    out = capsys.readouterr().out
    assert "changed: training.lr 0.001, now 0.002" in out
    assert "its weights will not be those of an uninterrupted run" in out
    assert [row[0] for row in rows(output(words))] == ["1", "2", "3", "4", "5", "6"]  # an epoch has two steps now
    assert rows(output(words), "validation", ("step",)) == [("4",), ("6",)]
    assert float(rows(output(words), columns=("lr",))[-1][0]) == pytest.approx(0)
    again = [*changed, "training.epochs=3", "--allow-changes"]
    assert train.main(again) == 0
    assert len(rows(output(words))) == 8
    assert train.main([*words, "--resume", "--allow-changes"]) == 1
    assert "training.epochs: expected more than the 3.00 epochs that the checkpoint has" in capsys.readouterr().err
    assert train.main([*words, "output=elsewhere", "--allow-changes"]) == 1
    assert "expected with resume" in capsys.readouterr().err


@pytest.mark.slow
def test_options_of_no_effect_and_other_rounding_need_no_permission(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*words, "--resume", "training.keep=3", "training.skip_not_finite=2", "evaluation.clips=1"]) == 0
    assert "changed" not in capsys.readouterr().out
    assert train.main([*words, "--resume", "training.recompute=true"]) == 0
    assert "with other rounding: training.recompute False, now True" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["model.bottleneck=4", "data.frames=4"])
def test_another_model_is_refused_with_the_way_to_start_from_the_weights(
    words: list[str], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--allow-changes"]):
        assert train.main([*words, change, "--resume", *more]) == 1
        error = capsys.readouterr().err
        assert f"is of another model: {change.partition('=')[0]}" in error
        assert f"model.start.trained={Checkpoints(output(words), 1).all()[-1]}" in error


def test_every_name_in_the_tables_is_an_option(words: list[str]) -> None:
    names = {
        name
        for section, field in Config.model_fields.items()
        for name in (section, *(f"{section}.{key}" for key in getattr(field.annotation, "model_fields", ())))
    }
    assert names.issuperset((*FREE, *ROUNDING, *FIXED))


def test_the_place_in_the_epochs_is_kept_whatever_the_batch() -> None:
    state: dict[str, Any] = {"step": 30, "shift": 10, "per_epoch": 8}
    assert steps_as_if(state, 8, 0) == 20
    assert steps_as_if(state, 4, 0) == 10
    assert steps_as_if(state, 3, 0) == 7  # in the same epoch, at most one step back


def test_the_optimizers_options_are_the_configs() -> None:
    """Its state in the checkpoint holds those of the run before."""
    model = torch.nn.Linear(2, 2)
    first = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.6), weight_decay=0.1)
    model(torch.ones(1, 2)).sum().backward()
    first.step()
    model.zero_grad()
    second = torch.optim.AdamW(model.parameters(), betas=(0.7, 0.8), weight_decay=0.2)
    restore_optimizer(model, second, {"optimizer": get_optimizer_state_dict(model, first)})
    (group,) = second.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.7, 0.8), 0.2)
    assert torch.equal(second.state[model.weight]["exp_avg"], first.state[model.weight]["exp_avg"])


def test_a_run_starts_from_weights_of_another_number_of_classes(words: list[str]) -> None:
    """With a new head; without, the error says how."""
    trained = output(words)
    more = ["data.num_classes=3", f"model.start.trained={trained}"]
    with pytest.raises(ValueError, match=r"head\.weight .*; with model\.start\.head=new it starts with a new head"):
        build_model(load_config(words[1], more), grown=False)
    model = build_model(load_config(words[1], [*more, "model.start.head=new"]), grown=False)
    assert model.head.out_features == 3
    kept = {name: x for name, x in load_file(find_trained(trained)).items() if not name.startswith("head.")}
    own = dict(model.named_parameters())
    assert kept
    assert all(torch.equal(x, own[name]) for name, x in kept.items())


def not_finite(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Makes the loss of these calls, counted from 1, NaN."""
    number = 0
    loss = Loss.__call__

    def broken(self: Loss, logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal number
        number += 1
        return loss(self, logits, targets) * (float("nan") if number in calls else 1)

    monkeypatch.setattr(Loss, "__call__", broken)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice can be followed, and names the last checkpoint where there is one."""
    base = ["--config", str(config_file), "training.warmup_epochs=0"]
    with monkeypatch.context() as patch:
        not_finite(patch, 2)
        assert train.main(base) == 1
    error = capsys.readouterr().err
    assert "step 2: the loss is nan, the gradients' norm nan. Lower the learning rate: start again with tr" in error
    with monkeypatch.context() as patch:
        not_finite(patch, 6)
        assert train.main(base) == 1
    error = capsys.readouterr().err
    last = Checkpoints(output(base), 1).all()[-1]
    assert f"go on from {last} with --resume --allow-changes training.lr=5.0e-04. Or" in error
    assert "training.skip_not_finite=10" in error


@pytest.mark.slow
def test_steps_whose_loss_is_not_finite_are_left_out_up_to_a_limit(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part of a step is enough. Weights and average stay as they were, and a resumed run counts on."""
    base = ["--config", str(config_file), "training.accumulate=2", "training.ema=0.9", "training.skip_not_finite=1",
            "training.save_every=1", "training.keep=9"]  # fmt: skip
    with monkeypatch.context() as patch:
        not_finite(patch, 5, 10)  # in the third and in the fifth step
        assert train.main(base) == 1
    captured = capsys.readouterr()
    assert "step 3: the loss is nan, the gradients' norm nan: left out (1 of at most 1)" in captured.out
    assert "step 5: the loss is nan" in captured.err
    saved = Checkpoints(output(base), 9).all()
    assert [read_state(path)["skipped"] for path in saved] == [0, 0, 1, 1]
    for name in ("model.safetensors", "ema.safetensors"):
        assert same_weights(saved[1] / name, saved[2] / name)
        assert not same_weights(saved[2] / name, saved[3] / name)
    with monkeypatch.context() as patch:
        not_finite(patch, 1)
        assert train.main([*base, "--resume"]) == 1
    assert "step 5: the loss is nan" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_leave_out_a_step_together(config_file: Path, tmp_path: Path) -> None:
    """Also where the loss of only one of them is not finite."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
from amflow_models import train
from amflow_models.training.losses import Loss
loss, calls = Loss.__call__, []
def broken(self, logits, targets):
    calls.append(1)
    return loss(self, logits, targets) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
Loss.__call__ = broken
train.exit_process(train.main(sys.argv[1:]))
""")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *launch, "--config", str(config_file), "training.skip_not_finite=1"],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3: the loss is nan" in done.stdout
    losses = [float(loss) for (loss,) in rows(load_config(config_file).output, columns=("loss",))]
    assert [loss == loss for loss in losses] == [step != 3 for step in range(1, 9)]
