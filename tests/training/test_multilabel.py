"""Videos with several labels: lists, loss, mean average precision, whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from amflow_models import evaluate, load_classifier, train
from amflow_models.training.build import digest, read_lists
from amflow_models.training.config import load_config
from amflow_models.training.losses import Loss
from amflow_models.training.metrics import multi_label_scores
from amflow_models.training.multilabel import MultiLabelList
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy_with_logits
from training_runs import rows


@pytest.fixture
def words(videos: Path, config_file: Path) -> list[str]:
    """The words of the command for a run on videos that all have label 2, too, in one line or in another one."""
    folder = config_file.parent
    lines = (videos / "train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join([*(f"{line},2" for line in lines[:8]), *lines[8:]]) + "\n")
    with (folder / "train.txt").open("a") as file:
        file.writelines(f"{line[:-1]}2\n" for line in lines[8:])
    (folder / "test.txt").write_text((videos / "test.txt").read_text())
    lists = [f"data.{split}={folder / name}.txt" for split, name in
             (("train", "train"), ("validation", "test"), ("test", "test"))]  # fmt: skip
    return ["--config", str(config_file), *lists, f"data.root={videos}", "data.num_classes=3", "data.multi_label=true"]


def test_a_video_has_the_labels_of_its_line_or_of_all_its_lines(words: list[str]) -> None:
    """The digest, by which a resumed run knows its clips, depends on them."""
    config = load_config(words[1], words[2:])
    lists = read_lists(config, ("train",))
    listed = lists["train"]
    assert isinstance(listed, MultiLabelList)
    assert [video.path.name for video in listed.videos] == [f"train {number}.mp4" for number in range(16)]
    assert [video.label for video in listed.videos] == list(range(16))
    assert listed.table.tolist() == [[1, 0, 1], [0, 1, 1]] * 8
    before = digest(lists)
    listed.table[0, 0] = 0
    assert digest(lists) != before


def test_several_labels_are_refused_where_they_are_not_asked_for(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*words, "data.multi_label=false"]) == 1
    assert "videos with several labels: 32" in capsys.readouterr().err
    assert train.main([*words, "training.best=top1"]) == 1
    assert "training.best: expected 'map' or 'loss' with data.multi_label, got 'top1'" in capsys.readouterr().err
    assert train.main([*words, "training.balance=loss"]) == 1
    assert "training.balance: expected null with data.multi_label" in capsys.readouterr().err


def test_the_mean_average_precision_is_scikit_learns() -> None:
    """With equal scores, too; classes without videos are left out."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (8 * torch.rand(40, 5, generator=generator)).round() / 8
    labels = (torch.rand(40, 5, generator=generator) < 0.3).float()
    labels[:, 3] = 0
    found = multi_label_scores(probabilities, labels)
    expected = [average_precision_score(labels[:, k], probabilities[:, k]) for k in (0, 1, 2, 4)]
    assert found.average_precision[[0, 1, 2, 4]].tolist() == pytest.approx(expected)
    assert found.average_precision[3].isnan()
    assert found.map == pytest.approx(sum(expected) / 4)
    with pytest.raises(ValueError, match="at least one video with a label"):
        multi_label_scores(probabilities, 0 * labels)


def test_the_loss_is_the_binary_cross_entropy_of_smoothed_labels() -> None:
    table = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    loss = Loss(3, 0.1, multi_label=True, table=table)
    expected = binary_cross_entropy_with_logits(logits, table[[1, 0]] * 0.9 + 0.05)
    assert loss(logits, loss.targets(torch.tensor([1, 0]))).item() == pytest.approx(expected.item())


def test_a_run_with_several_labels_goes_from_lists_to_scores(words: list[str], videos: Path) -> None:
    """With mixup; the best checkpoint is that of the mean average precision."""
    assert train.main([*words, "training.epochs=1", "training.mixup=0.8"]) == 0
    output = load_config(words[1]).output
    (score,) = rows(output, "validation", ("map",))
    assert json.loads((output / "best.json").read_text())["score"] == {"map": pytest.approx(float(score[0]))}
    assert evaluate.main([*words, "--best", "--scores", str(output / "all.safetensors")]) == 0
    result = json.loads((output / "test.json").read_text())
    assert 0 <= result["map"] <= 1
    assert list(result["average_precision"]) == ["0", "1"]  # no test video has the third label
    assert load_file(output / "all.safetensors")["labels"].tolist() == [[1, 0, 0], [0, 1, 0]] * 2 + [[1, 0, 0]]
    assert not (output / "test_confusion.png").exists()
    probabilities = load_classifier(output, device="cpu")(videos / "test 0.mp4").probabilities
    assert probabilities.sum() != pytest.approx(1, abs=0.01)
