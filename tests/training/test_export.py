"""A trained classifier as one exported file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models import load_classifier, train
from amflow_models.cli.main import main
from amflow_models.training.config import load_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_an_exported_classifier_is_loaded_and_computes_the_same(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For any number of clips; the file names its preprocessing. The example of the page reads it."""
    assert (
        train.main(["--config", str(config_file), "training.epochs=1", "training.ema=0.9", "model.drop_path=0.2"]) == 0
    )
    run = load_config(config_file).output
    capsys.readouterr()
    file = tmp_path / "model.pt2"
    assert main(["export", str(run), "-o", str(file), "--ema", "--best"]) == 0
    printed = json.loads(capsys.readouterr().out)
    extra = {"preprocessing.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    found = json.loads(extra["preprocessing.json"])
    assert found == printed
    assert {name: found[name] for name in ("size", "frames", "stride", "sampling", "classes")} == {
        "size": 32, "frames": 3, "stride": 1, "sampling": "dense", "classes": ["0", "1"],
    }  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["probabilities"].shape == (4, 2)
    mean, std = (torch.tensor(found[name]).view(3, 1, 1) for name in ("mean", "std"))
    model = load_classifier(run, ema=True, device="cpu").model
    for count in (1, 2, 5):
        images = torch.randint(256, (count, 3, 3, 32, 32), dtype=torch.uint8)
        clips = (images / 255 - mean) / std
        with torch.no_grad():
            assert torch.allclose(program(clips), model(clips), atol=1e-5)


def test_an_export_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any work: a name of another format, a run that is not there."""
    assert main(["export", str(tmp_path), "-o", "model.onnx"]) == 1
    assert "output: expected a name that ends in .pt2, got model.onnx" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "model.pt2")]) == 1
    assert "expected a run, a checkpoint or a file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
