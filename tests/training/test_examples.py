"""The example of a complete run works; what it learns is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from amflow_models import evaluate, train

from examples.motion import draw, make_clips


@pytest.mark.demo
def test_the_motion_example_runs_from_clips_to_the_picture(
    tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of `run.sh`, on a few clips."""
    monkeypatch.chdir(tmp_path)
    make_clips.main(["data/motion", "--part", "0.02"])
    words = ["--config", str(pytestconfig.rootpath / "examples" / "motion" / "config.yaml"), "data.workers=0"]
    assert train.main(words) == 0
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "runs/motion/test.json").read_text())["videos"] == 8
    draw.main([*words[:2], "flow.png", *words[2:]])
    assert (tmp_path / "flow.png").read_bytes()[:4] == b"\x89PNG"
