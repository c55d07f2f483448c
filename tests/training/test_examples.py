"""The example of a complete run, cut down to a few clips: that it runs, not what it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from amflow_models import evaluate, train
from conftest import ROOT

from examples.motion import draw, make_clips


@pytest.mark.demo
def test_motion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips to files, training, test, picture, as `run.sh` does."""
    monkeypatch.chdir(tmp_path)
    make_clips.main(["data/motion", "--part", "0.02"])
    words = ["--config", str(ROOT / "examples" / "motion" / "config.yaml"), "training.precision=fp32", "data.workers=0"]
    assert train.main(words) == 0
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "runs/motion/test.json").read_text())["videos"] == 8
    draw.main([*words[:2], "flow.png", *words[2:]])
    assert (tmp_path / "flow.png").read_bytes()[:4] == b"\x89PNG"
