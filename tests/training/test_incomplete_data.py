"""Training and testing with lists that have missing videos or lack classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from amflow_models import evaluate, train
from amflow_models.training.build import read_lists
from amflow_models.training.config import load_config
from training_runs import rows


@pytest.fixture
def gaps(videos: Path, config_file: Path, tmp_path: Path) -> list[str]:
    """The words of the command for lists of which every fourth video is missing."""
    for split in ("train", "test"):
        lines = (videos / f"{split}.txt").read_text().splitlines()
        lines = [f"{videos}/{line}" if n % 4 else line.replace(split, "gone") for n, line in enumerate(lines)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    lists = {"train": "train", "validation": "test", "test": "test"}
    return ["--config", str(config_file), *(f"data.{split}={tmp_path / name}.txt" for split, name in lists.items())]


def test_missing_videos_are_errors_that_name_the_ways_out(gaps: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(gaps) == 1
    error = capsys.readouterr().err
    assert "train: missing files: 4" in error
    for way in ("data check --all", "--write-clean", "data.missing=skip", "data.subset=true"):
        assert way in error


def test_missing_videos_are_left_out_and_counted(
    gaps: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training has an epoch of the others; testing writes the names of all that are missing."""
    words = [*gaps, "data.missing=skip", "training.epochs=1"]
    assert train.main(words) == 0
    printed = capsys.readouterr()
    assert "train: 4 of 16 videos are missing: " in printed.err
    assert "validation: 2 of 5 videos are missing: " in printed.err
    assert "skipped" not in printed.out
    assert len(rows(tmp_path / "run")) == 3  # 12 videos in batches of 4
    assert evaluate.main(words) == 0
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    assert result["videos"] == 3
    assert [Path(path).name for path in result["missing"]] == ["gone 0.mp4", "gone 4.mp4"]


def test_a_list_whose_videos_are_all_missing_is_an_error(gaps: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("gone.mp4 0\n")
    with pytest.raises(ValueError, match="train: no videos in the list"):
        read_lists(load_config(gaps[1], [*gaps[2:], "data.missing=skip"]), ("train",))


def test_a_subset_trains_with_all_classes(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels stay as they are, also where they are far apart."""
    words = ["--config", str(config_file), "data.num_classes=400", "training.epochs=1"]
    assert train.main(words) == 1
    assert "train: classes without a video: 398" in capsys.readouterr().err
    assert train.main([*words, "data.subset=true"]) == 0
    assert "warning: train: classes without a video: 398" in capsys.readouterr().err


def test_a_checkpoint_brings_its_config_to_its_test(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changes come on top of it, and scores are written to the run, also where it was moved."""
    assert train.main(["--config", str(config_file), "training.epochs=1", "data.frames=2"]) == 0
    words = ["--checkpoint", str(tmp_path / "run"), "--output"]
    assert evaluate.main([*words, str(tmp_path / "tested"), "evaluation.crops=1"]) == 0
    assert json.loads((tmp_path / "tested" / "test.json").read_text())["videos"] == 5
    assert evaluate.main([*words, str(tmp_path / "other"), "data.frames=3"]) == 1
    assert "of other options: num_frames 2, expected 3" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "moved")
    assert evaluate.main(["--checkpoint", str(tmp_path / "moved")]) == 0
    assert (tmp_path / "moved" / "test.json").exists()
    assert not (tmp_path / "run").exists()
    assert evaluate.main([]) == 1
    assert "expected --config, or --checkpoint" in capsys.readouterr().err
