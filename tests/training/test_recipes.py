"""The usual recipes: augmentation of batches, repeated clips, stochastic depth, the average, the best checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import LoggerType
from amflow_models import evaluate, train
from amflow_models.blocks import AdaptedBlock
from amflow_models.training import parallel
from amflow_models.training.augmentation import BatchAugmentation
from amflow_models.training.build import build_model
from amflow_models.training.checkpoints import Checkpoints
from amflow_models.training.config import load_config
from amflow_models.training.loading import TrainBatches
from amflow_models.training.losses import Loss, class_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from training_runs import RECIPES, rows, same_weights

CPU = torch.device("cpu")


def augmented(config_file: Path, *changes: str, clips: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, Any]:
    """Clips and targets of classes 0, 1, 0, 1, ... after augmentation in step 3."""
    targets = torch.eye(2).repeat(len(clips) // 2, 1)
    return BatchAugmentation(load_config(config_file, changes), CPU)(clips.clone(), targets, step=3, first=first)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_two_neighbours_are_mixed_with_the_shares_of_their_targets(config_file: Path, name: str) -> None:
    """And alike in all frames: a clip that stands still stays so."""
    clips = torch.stack([torch.full((3, 3, 16, 16), float(value)) for value in (0, 1, 2, 3)])
    mixed, targets = augmented(config_file, f"training.{name}=1", clips=clips)
    for pair in (0, 2):
        share = targets[pair, 0].item()
        assert 0 < share < 1
        assert targets[pair : pair + 2].flatten().tolist() == pytest.approx([share, 1 - share, 1 - share, share])
        means = [pair * share + (pair + 1) * (1 - share), pair * (1 - share) + (pair + 1) * share]
        assert mixed[pair : pair + 2].mean((1, 2, 3, 4)).tolist() == pytest.approx(means, abs=1e-5)
    assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
    assert (len(mixed[0].unique()) == 2) == (name == "cutmix")
    unmixed, targets = augmented(config_file, f"training.{name}=1", "training.mixup_prob=0", clips=clips)
    assert torch.equal(unmixed, clips)
    assert torch.equal(targets, torch.eye(2).repeat(2, 1))


def test_a_box_is_erased_at_the_same_place_in_all_frames(config_file: Path) -> None:
    clips = torch.zeros(8, 3, 3, 16, 16)
    erased, targets = augmented(config_file, "data.random_erasing=0.5", clips=clips)
    boxes = erased != 0
    assert 0 < boxes.flatten(1).any(1).sum() < 8
    assert torch.equal(boxes, boxes[:, :1, :1].expand_as(boxes))
    assert erased[boxes].unique().numel() == boxes.sum()  # noise, which differs from frame to frame
    assert torch.equal(targets, torch.eye(2).repeat(4, 1))


def test_augmentation_does_not_depend_on_how_a_batch_is_divided(config_file: Path) -> None:
    """Nor on what was drawn before."""
    clips = torch.randn(8, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changes = RECIPES[:3]
    whole, targets = augmented(config_file, *changes, clips=clips)
    parts = [augmented(config_file, *changes, clips=clips[at : at + 4], first=at) for at in (0, 4)]
    assert not torch.equal(whole, clips)
    assert torch.equal(whole, torch.cat([part for part, _ in parts]))
    assert torch.equal(targets, torch.cat([part for _, part in parts]))


def test_the_loss_is_pytorchs_with_smoothed_labels() -> None:
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    loss = Loss(7, 0.1)
    expected = cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss(logits, loss.targets(labels)).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_each_video_occurs_with_several_augmentations_side_by_side(world: int) -> None:
    """An epoch keeps its number of clips; two that may be mixed are never of the same video."""
    parts = [
        [*TrainBatches(12, 4, rank=rank, world=world, seed=1, start=0, stop=6, repeats=2)] for rank in range(world)
    ]
    steps = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    for step in steps:
        (a, b, a_again, b_again) = step
        assert a[1] == a_again[1] != b[1] == b_again[1]
        assert {a[0], a_again[0]} == {b[0], b_again[0]}
        assert a[0] != a_again[0]  # a data set's "epoch" decides the augmentation
    first, second = steps[:3], steps[3:]
    assert len({index for step in first for _, index in step}) == 6
    assert not {key for step in first for key in step} & {key for step in second for key in step}


def test_without_repeats_the_order_of_earlier_versions_stays() -> None:
    """So that their runs are resumed to the bit."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5 * 1_000_003 + 1)).tolist()
    batches = TrainBatches(6, 3, rank=0, world=1, seed=5, start=2, stop=4)
    assert [key for step in batches for key in step] == [(1, index) for index in order]


def test_stochastic_depth_leaves_out_adapters_of_whole_clips(config_file: Path) -> None:
    """In training only, and more often in later blocks; the others are scaled, so that the mean stays."""
    model = build_model(load_config(config_file, ["model.drop_path=0.5"]))
    blocks = [block for block in model.modules() if isinstance(block, AdaptedBlock)]
    assert [float(block.adapter.drop_path) for block in blocks] == [0.25, 0.5]
    adapter = blocks[1].adapter
    torch.nn.init.normal_(adapter.up.weight)
    x = torch.randn(8 * 3, 5, adapter.down.in_features)
    flow = torch.zeros(8, 2, 5)
    whole = adapter.eval().branch(x, 3, flow).unflatten(0, (8, 3))
    torch.manual_seed(0)
    dropped = adapter.train().branch(x, 3, flow).unflatten(0, (8, 3))
    kept = [bool(clip.any()) for clip in dropped]
    assert 0 < sum(kept) < 8
    for clip, expected, there in zip(dropped, whole, kept, strict=True):
        assert torch.allclose(clip, 2 * expected if there else torch.zeros(()), rtol=1e-5)
    assert set(model.state_dict()) == set(build_model(load_config(config_file)).state_dict())


def test_dropout_acts_on_the_heads_input_in_training(config_file: Path) -> None:
    model = build_model(load_config(config_file, ["model.dropout=0.5"]))
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        model.train(training)(torch.rand(1, 3, 3, 32, 32))
    zeros = [int((x == 0).sum()) for x in seen]
    assert zeros[0] > 50
    assert zeros[1] == 0


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_tested(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the average's score where there is one; all probabilities are written for ensembles."""
    output = load_config(config_file).output
    scores = iter([0.5, 0.2, 0.9, 0.4, 0.1, 0.3])  # weights, average; the average's best is the second

    def scored(self: Any) -> dict[str, float]:
        return dict.fromkeys(("loss", "top1", "top5", "mean_class"), next(scores))

    monkeypatch.setattr(train._Run, "_scores", scored)
    words = ["--config", str(config_file), "training.epochs=6", "training.validate_every=2", "training.ema=0.9",
             "training.keep=1", "training.batch=16"]  # fmt: skip
    assert train.main(words) == 0
    assert [line[0] for line in rows(output, "validation", ("step",))] == ["2", "4", "6"]
    assert json.loads((output / "best.json").read_text()) == {"step": 4, "score": {"top1": 0.4}}
    assert [path.name for path in Checkpoints(output, 1).all()] == ["step_00000004", "step_00000006"]

    dump = output / "scores.safetensors"
    assert evaluate.main([*words, "--best", "--ema", "--scores", str(dump)]) == 0
    assert "step_00000004/ema.safetensors" in json.loads((output / "test.json").read_text())["checkpoint"]
    with safe_open(dump, "pt") as file:
        probabilities, labels = file.get_tensor("probabilities"), file.get_tensor("labels")
        assert file.get_tensor("indices").tolist() == list(range(5))
        paths, classes = (json.loads(file.metadata()[name]) for name in ("videos", "classes"))
    assert [Path(path).name for path in paths] == [f"test {number}.mp4" for number in range(5)]
    assert len(classes) == 2
    assert probabilities.sum(1).tolist() == pytest.approx([1] * 5)
    top1 = (probabilities.argmax(1) == labels).double().mean().item()
    assert json.loads((output / "test.json").read_text())["top1"] == pytest.approx(top1)
    (output / "best.json").unlink()
    assert evaluate.main([*words, "--best"]) == 1
    assert "expected a run with a best checkpoint" in capsys.readouterr().err


def test_clips_to_mix_must_be_even(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(config_file), "training.mixup=0.8", "training.batch=5"]) == 1
    assert "times 2 clips to mix, got 5" in capsys.readouterr().err


def test_class_weights_are_inverse_to_the_numbers_of_videos() -> None:
    """Their mean over the videos is 1, and the loss weights its clips with them."""
    labels = torch.tensor([0, 0, 0, 2])
    weights = class_weights(labels, 4)
    assert weights.tolist() == pytest.approx([2 / 3, 0, 2, 0])
    assert weights[labels].mean().item() == pytest.approx(1)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    loss = Loss(4, 0.0, weights)
    expected = (cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    assert loss(logits, loss.targets(labels)).item() == pytest.approx(expected.item())


def test_a_balanced_sampler_draws_classes_equally_often_and_each_clip_anew() -> None:
    """A clip that is drawn twice in an epoch has two augmentations."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    shares = class_weights(labels, 2)[labels]
    batches = TrainBatches(100, 10, rank=0, world=1, seed=0, start=0, stop=20, shares=shares)
    keys = [key for step in batches for key in step]
    assert len(keys) == len(set(keys)) == 200
    drawn = labels[torch.tensor([index for _, index in keys])]
    assert 70 < int(drawn.sum()) < 130
    resumed = TrainBatches(100, 10, rank=0, world=1, seed=0, start=13, stop=20, shares=shares)
    assert [key for step in resumed for key in step] == keys[130:]


@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_a_run_on_classes_of_unequal_size_is_balanced(config_file: Path, videos: Path, balance: str) -> None:
    """Not by what it learns, but by what it is trained on."""
    lines = [line for line in (videos / "train.txt").read_text().splitlines() if line.endswith("0")]
    few = config_file.parent / "train.txt"
    few.write_text("\n".join([*lines[:3], f"{videos / 'train 1.mp4'} 1"]))
    words = [f"data.train={few}", f"data.root={videos}", "data.validation=null", "data.test=null"]
    run = train._Run(load_config(config_file, [*words, f"training.balance={balance}"]), False, False, False)
    try:
        if balance == "loss":
            assert run.loss.weight is not None
            assert run.loss.weight.tolist() == pytest.approx([2 / 3, 2])
        else:
            assert run.batches.shares is not None
            assert run.batches.shares.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    finally:
        run.log.close()


def test_fp16_needs_a_gpu(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert train.main(["--config", str(config_file), "training.precision=fp16"]) == 1
    assert "training.precision: fp16 needs a GPU, and there is none here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gradient_scaler_leaves_out_overflows_and_is_resumed(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accelerate's scaler of fp16, here around fp32: overflows lower its scale and end no run."""
    make = train.make_accelerator

    def with_scaler(*args: Any, **options: Any) -> Any:
        accelerator = make(*args, **options)
        accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=2
        )
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", with_scaler)
    loss = Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda *args: 16 * loss(*args))
    output = load_config(config_file).output
    words = ["--config", str(config_file), "training.accumulate=2", "training.save_every=1", "training.keep=9",
             "data.validation=null"]  # fmt: skip
    assert train.main(words) == 0
    saved = Checkpoints(output, 9).all()
    scales = [torch.load(path / "state.pt", weights_only=True)["scaler"]["scale"] for path in saved]
    assert scales == [2.0**exponent for exponent in (67, 67, 68, 68, 69, 69, 70, 70)]
    norms = [float(norm) for (norm,) in rows(output, columns=("gradient_norm",))]
    assert [norm < float("inf") for norm in norms] == [False, *[True] * 7]
    biases = [load_file(path / "model.safetensors")["head.bias"].any() for path in saved]
    assert biases == [False, *[True] * 7]
    last = (saved[-1] / "model.safetensors").rename(tmp_path / "last.safetensors")
    for path in saved[3:]:
        path.rename(output / path.name)  # as if it had been cut off after the third step
    assert train.main([*words, "--resume"]) == 0
    assert same_weights(saved[-1] / "model.safetensors", last)


@pytest.mark.slow
def test_wandb_is_told_the_values_and_named_where_it_is_missing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By accelerate's tracker, with a stub of the package."""
    words = ["--config", str(config_file), "training.wandb=motion", "training.epochs=1"]
    monkeypatch.setattr(parallel, "is_wandb_available", lambda: False)
    assert train.main(words) == 1
    assert "training.wandb: the package wandb is missing: pip install wandb" in capsys.readouterr().err

    told: list[Any] = []
    stub: Any = ModuleType("wandb")
    stub.init = lambda **options: (
        SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished"))
        if not told.append(options)
        else None
    )
    stub.config = SimpleNamespace(update=lambda values, **_: told.append(values))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(parallel, "is_wandb_available", lambda: True)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    assert train.main(words) == 0
    started, config, *lines, finished = told
    assert started["project"] == "motion"
    assert started["resume"] == "allow"
    assert config["model"]["backbone"] == "vit_tiny_patch16_224"
    assert [step for step, values in lines if "train/loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in lines if "validation/top1" in values] == [4]
    assert finished == "finished"
