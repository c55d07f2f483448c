"""Training and testing as commands: whole runs, interruptions, checkpoints, errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models import evaluate, load_trained, save_trained, train
from amflow_models.training import checkpoints as checkpoints_module
from amflow_models.training import parallel
from amflow_models.training.build import build_model
from amflow_models.training.checkpoints import Checkpoints, find_trained
from amflow_models.training.config import load_config
from torch import Tensor, nn
from training_runs import RECIPES, command, environment, rows, run, same_weights


def test_a_run_goes_from_lists_to_scores(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is not overwritten; the average is tested, too."""
    assert train.main(["--config", str(config_file), "training.ema=0.9", "training.accumulate=2"]) == 0
    output = load_config(config_file).output
    assert [row[0] for row in rows(output)] == [str(step) for step in range(1, 9)]
    assert rows(output, "validation", ("step",)) == [("4",), ("8",)]
    assert [path.name for path in Checkpoints(output, 2).all()] == ["step_00000004", "step_00000008"]
    assert list((output / "tensorboard").iterdir())
    for speed, waiting in rows(output, columns=("clips_per_second", "waiting")):
        assert float(speed) > 0
        assert 0 <= float(waiting) <= 1

    capsys.readouterr()
    assert evaluate.main(["--config", str(config_file)]) == 0
    result = json.loads((output / "test.json").read_text())
    assert result["videos"] == 5
    assert f"top-1 {result['top1']:.2%}" in capsys.readouterr().out
    with (output / "test.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [Path(line["video"]).name for line in lines] == [f"test {number}.mp4" for number in range(5)]
    assert sum(line["label"] == line["prediction"] for line in lines) / 5 == pytest.approx(result["top1"])
    assert (output / "test_confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert evaluate.main(["--config", str(config_file), "--ema", "--output", str(output / "ema")]) == 0
    assert json.loads((output / "ema" / "test.json").read_text())["loss"] != result["loss"]

    assert train.main(["--config", str(config_file)]) == 1
    assert (
        f"output already holds a checkpoint ({output / 'checkpoints' / 'step_00000008'}): pass --resume to continue"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("at", "options"), [(3, RECIPES), (4, ["training.ema=0.9"])], ids=["recipes", "plain"])
def test_an_interrupted_run_is_resumed_to_the_bit(
    at: int, options: list[str], config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in a step, or in the last one of an epoch: the step is finished and saved, and nothing else changes."""
    output = load_config(config_file).output
    words = ["--config", str(config_file), *options]
    assert train.main([*words, f"output={output}_whole"]) == 0
    step, handler = train._Run._train_step, signal.getsignal(signal.SIGINT)  # a background job ignores the signal

    def interrupted(self: Any, number: int, batch: Any) -> Any:
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_train_step", interrupted)
        assert train.main(words) == train.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in Checkpoints(output, 2).all()] == [f"step_0000000{at}"]
    assert f"interrupted after step {at}" in capsys.readouterr().out
    assert train.main([*words, "--resume"]) == 0
    assert rows(output) == rows(Path(f"{output}_whole"))
    for name in ("validation", "validation_ema"):
        found = rows(output, name, ("step", "loss"))
        assert len(found) == 2
        assert found == rows(Path(f"{output}_whole"), name, ("step", "loss"))
    assert (output / "best.json").read_bytes() == Path(f"{output}_whole/best.json").read_bytes()
    for name in ("model.safetensors", "ema.safetensors"):
        assert same_weights(find_trained(output, name), find_trained(Path(f"{output}_whole"), name))


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_bit(config_file: Path, tmp_path: Path) -> None:
    """SIGKILL within an epoch, with a loader process and an average: losses and weights are those of a whole run."""
    words = ["training.epochs=4", "training.save_every=3", "training.ema=0.9", "data.workers=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config_file, *words, f"output={whole}")
    process = subprocess.Popen(
        command(config_file, *words, f"output={cut}"), env=environment(), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (cut / "checkpoints" / "step_00000006").exists() or len(rows(cut)) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = len(rows(cut))
    assert 7 <= reached < 16
    run(config_file, *words, f"output={cut}", "--resume")
    assert rows(cut) == rows(whole)
    assert rows(cut, "validation", ("step", "loss", "top1")) == rows(whole, "validation", ("step", "loss", "top1"))
    for name in ("model.safetensors", "ema.safetensors"):
        assert same_weights(find_trained(cut, name), find_trained(whole, name))


def test_sigterm_ends_a_run_with_a_checkpoint(config_file: Path) -> None:
    """Also if it comes twice, and to loader processes as well: the checkpoint is that of the last step."""
    output = load_config(config_file).output
    words = ["training.epochs=200", "data.workers=1"]
    process = subprocess.Popen(
        command(config_file, *words), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (output / "train.csv").exists() or len(rows(output)) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == train.INTERRUPTED
    last = Checkpoints(output, 2).all()[-1]
    assert last.name == f"step_{int(rows(output)[-1][0]):08d}"


def test_a_second_stage_starts_with_the_firsts_predictions(config_file: Path, tmp_path: Path) -> None:
    """And can be resumed; with other options it is another run."""
    assert train.main(["--config", str(config_file), "model.blocks=[0]"]) == 0
    first = load_config(config_file).output
    words = ["model.blocks=all", f"model.start.trained={first}", "model.start.blocks=[0]", f"output={tmp_path / 'two'}"]
    before = build_model(load_config(config_file, ["model.blocks=[0]"])).eval()
    load_trained(before, find_trained(first))
    after = build_model(load_config(config_file, words), grown=False).eval()
    clips = torch.rand(2, 3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(before(clips), after(clips))
    assert after.report is not None
    assert after.report.temporal == (0, 1)
    assert train.main(["--config", str(config_file), *words]) == 0
    assert train.main(["--config", str(config_file), *words, "training.epochs=3", "--resume"]) == 1  # another run
    assert train.main(["--config", str(config_file), *words, "data.workers=1", "--resume"]) == 0


def test_weights_of_another_backbone_are_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their names and shapes fit, but scores would be wrong."""
    assert train.main(["--config", str(config_file), "training.epochs=1"]) == 0
    words = ["--config", str(config_file), "model.pool=avg"]
    assert evaluate.main(words) == 1
    assert "was trained on another backbone: pool None, now 'avg'" in capsys.readouterr().err
    output = load_config(config_file).output
    start = [f"model.start.trained={output}", "model.start.blocks=all", f"output={output}_2"]
    assert train.main([*words, *start]) == 1
    assert "was trained on another backbone" in capsys.readouterr().err
    torch.save([1], Checkpoints(output, 2).all()[-1] / "state.pt")
    assert train.main(["--config", str(config_file), "training.epochs=1", "--resume"]) == 1
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "k400_vitb_am12",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ssv2_vitb_am12", "smarthome_vitb_first_last")),
    ],
)
def test_shipped_configs_run(name: str, tmp_path: Path) -> None:
    """On synthetic clips, at a smaller size and depth."""
    small = ["model.img_size=28", "model.depth=2", "model.backbone=vit_small_patch14_dinov2", "data.frames=2",
             "training.batch=2", "training.epochs=1", f"output={tmp_path}"]  # fmt: skip
    assert train.main(["--config", name, "--synthetic", *small]) == 0
    assert len(rows(tmp_path)) == 20


def test_synthetic_clips_need_no_data_and_recomputing_blocks_changes_no_loss(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither lists nor a first stage are read; a synthetic run is not resumed with real clips."""
    words = ["--config", str(config_file), "--synthetic", "data.train=/none.txt", "training.epochs=1", "data.frames=4",
             "model.start.trained=/none", "model.start.blocks=[0]"]  # fmt: skip
    assert train.main(words) == 0
    output = load_config(config_file).output
    assert "40 videos" not in capsys.readouterr().out
    assert len(rows(output)) == 20
    assert train.main(["--config", str(config_file), "training.epochs=1", "--resume"]) == 1
    assert "was trained on other clips" in capsys.readouterr().err
    assert train.main([*words, "training.recompute=true", f"output={output}_2"]) == 0
    for a, b in zip(rows(output), rows(Path(f"{output}_2")), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-4)


def test_unreadable_videos_are_reported_and_left_out(
    videos: Path, config_file: Path, tmp_path: Path, capsys: Any
) -> None:
    """With `--strict` they are an error."""
    lists = []
    for split in ("train", "test"):
        broken = tmp_path / f"broken {split}.mp4"
        broken.write_text("no video")
        listed = tmp_path / f"{split}.txt"
        listed.write_text((videos / f"{split}.txt").read_text() + f"{broken} 1\n")
        lists.append(f"data.{split}={listed}")
    lists.append(f"data.validation={listed}")  # the last one, the test list, as in the config
    words = ["--config", str(config_file), *lists, f"data.root={videos}", "training.batch=17", "training.epochs=1"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "2 videos could not be read" in out
    assert "broken train.mp4" in out
    assert evaluate.main(words) == 0
    assert "not read: " in capsys.readouterr().err
    for workers in (0, 1):
        strict = [*words, "--strict", f"data.workers={workers}", f"output={tmp_path / 'strict'}"]
        assert train.main(strict) == 1
        (message,) = capsys.readouterr().err.splitlines()
        assert "broken train.mp4" in message
    assert evaluate.main([*words, "--strict"]) == 1
    assert "broken test.mp4" in capsys.readouterr().err


def test_the_chosen_precision_is_printed_and_kept_by_resumed_runs(
    config_file: Path,
    forget_precision: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a machine that would choose another one, the run is another."""
    words = ["--config", str(config_file), "training.precision=auto", "training.epochs=1"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "cpu_has_bf16", lambda: False)
    assert train.main(words) == 0
    assert "1 x cpu, the model is copied, precision fp32" in capsys.readouterr().out
    assert evaluate.main(words) == 0
    assert "precision fp32" in capsys.readouterr().out
    forget_precision()
    monkeypatch.setattr(parallel, "cpu_has_bf16", lambda: True)
    assert train.main([*words, "--resume"]) == 1
    assert "is of another run: training.precision 'fp32', now 'bf16'" in capsys.readouterr().err
    forget_precision()
    assert train.main([*words, "training.precision=fp32", "--resume"]) == 0


def test_bf16_computes_products_in_bfloat16(
    config_file: Path, forget_precision: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the loss comes near that of fp32."""
    dtypes = set()
    forward = nn.Linear.forward

    def spy(self: nn.Linear, x: Tensor) -> Tensor:
        out = forward(self, x)
        dtypes.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", spy)
    output = load_config(config_file).output
    losses = []
    for precision in ("bf16", "fp32"):
        words = [f"training.precision={precision}", "training.epochs=1", f"output={output}_{precision}"]
        assert train.main(["--config", str(config_file), *words]) == 0
        forget_precision()
        losses.append([float(loss) for (loss,) in rows(Path(f"{output}_{precision}"), columns=("loss",))])
    assert torch.bfloat16 in dtypes
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_nan_of_the_model_names_the_clip(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(config_file), "training.epochs=1"]) == 0
    file = find_trained(load_config(config_file).output)
    model = build_model(load_config(config_file))
    load_trained(model, file)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    save_trained(model, file)
    assert evaluate.main(["--config", str(config_file)]) == 1
    message = capsys.readouterr().err
    assert "the model returned NaN for this clip: " in message
    assert "test 0.mp4" in message


def test_a_full_disk_leaves_earlier_checkpoints_alone(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If too little space is left at the start, the run ends before its first step."""
    full = (10**12, 10**12, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": full[2]}))
        assert train.main(["--config", str(config_file)]) == 1
    assert "are needed for checkpoints" in capsys.readouterr().err
    output = load_config(config_file).output
    assert not (output / "train.csv").exists()

    save = torch.save

    def fails(content: Any, path: Path) -> None:
        if content["step"] == 8:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(checkpoints_module.torch, "save", fails)
    assert train.main(["--config", str(config_file)]) == 1
    assert "No space left on device" in (err := capsys.readouterr().err)
    assert "the last one is" in err
    monkeypatch.undo()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000004"]
    assert train.main(["--config", str(config_file), "--resume"]) == 0


@pytest.mark.parametrize("what", ["model.safetensors", "ema.safetensors", "state.pt"])
def test_missing_foreign_and_broken_checkpoints_are_refused(
    config_file: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = load_config(config_file).output
    assert train.main(["--config", str(config_file), "--resume"]) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    words = ["--config", str(config_file), "training.epochs=1", "training.ema=0.9"]
    assert train.main(words) == 0
    assert train.main([*words, "training.lr=1", "--resume"]) == 1
    assert "is of another run: training.lr 0.001, now 1.0" in capsys.readouterr().err
    (Checkpoints(output, 2).all()[-1] / what).write_bytes(b"half")
    assert train.main([*words, "--resume"]) == 1
    assert "can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.batch=32"], "training.batch: expected at most the 16 videos"),
        (["training.accumulate=3"], "training.batch: expected a multiple of 1 processes times 3 parts, got 4"),
        (["model.backbone=resnet18", "model.img_size=null"], "model.backbone resnet18: "),
        (["model.backbone=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["model.depth=13"], "model.depth: expected at most 12 blocks"),
        (["model.blocks=[2]"], "blocks: expected indices from 0 to 1, got 2"),
        (["data.num_classes=1"], "label"),
        (["model.gate=am_flo"], "did you mean 'am_flow'"),
        (["data.train=/none.txt"], "none.txt"),
        (["data.kind=mmactoin"], "did you mean 'mmaction'"),
        (["model.start.trained=/none", "model.start.blocks=all"], "there is no file"),
    ],
)
def test_errors_before_the_first_step_are_printed_in_a_line(
    config_file: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--config", str(config_file), *changes]) == 1
    assert message in capsys.readouterr().err
    assert not (config_file.parent / "run" / "train.csv").exists()


def test_training_on_the_test_list_is_refused(
    videos: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--config", str(config_file), f"data.test={videos / 'train.txt'}"]) == 1
    assert "videos in both lists" in capsys.readouterr().err


def test_the_last_class_may_have_no_test_video(videos: Path, config_file: Path, tmp_path: Path) -> None:
    """It may still be predicted."""
    assert train.main(["--config", str(config_file), "training.epochs=1"]) == 0
    listed = tmp_path / "first.txt"
    listed.write_text("".join(f"{videos}/test {number}.mp4 0\n" for number in range(5)))
    assert evaluate.main(["--config", str(config_file), f"data.test={listed}"]) == 0
    output = load_config(config_file).output
    with (output / "test.csv").open() as file:
        assert {line["label"] for line in csv.DictReader(file)} == {"0"}


def test_evaluating_without_a_checkpoint_or_a_split_is_refused(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--config", str(config_file)]) == 1
    assert "expected a run, a checkpoint or a file" in capsys.readouterr().err
    assert evaluate.main(["--config", str(config_file), "data.test=null"]) == 1
    assert "data.test: the config has none" in capsys.readouterr().err
