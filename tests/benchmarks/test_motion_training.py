"""The motion table: its runner, its arms and its report, at a size that proves nothing but that they work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks.motion import __main__ as command
from benchmarks.motion import report
from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS
from benchmarks.motion.train import SETTINGS, SLOW, _backbone, train

SMOKE = SETTINGS["smoke"]


def test_a_table_is_made_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a command with processes of its own; what is in the file is not run again."""
    out, plot = tmp_path / "motion.json", tmp_path / "motion.png"
    words = ["run", "--setting", "smoke", "--out", str(out), "--tasks", "which_pan", "camera", "--workers"]
    module = [sys.executable, "-m", "benchmarks.motion", *words, "2", "--arms", "probe_all", "am_flow_aligned"]
    subprocess.run(
        module, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}"}, timeout=300
    )
    table = json.loads(out.read_text())
    assert sorted((row["arm"], row["task"]) for row in table["runs"]) == [
        ("am_flow_aligned", "which_pan"), ("probe_all", "camera"), ("probe_all", "which_pan"),
    ]  # fmt: skip
    command.main([*words, "1", "--arms", "probe_all", "am_flow"])
    again = json.loads(out.read_text())
    assert again["runs"][:3] == table["runs"]
    assert len(again["runs"]) == 5
    assert "2 runs, 1 at a time" in capsys.readouterr().out
    command.main(["report", str(out), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert ARMS["am_flow_aligned"].label in printed
    assert "| chance | | 14 | 50 |" in printed
    assert plot.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="is of another setting"):
        command.main(["run", "--setting", "cpu", "--out", str(out)])


def test_a_run_is_a_function_of_its_seed() -> None:
    rows = [train("direction", "am_flow", seed, SMOKE) for seed in (0, 0, 1)]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert [len(row["curve"]) for row in rows] == [6, 6, 6]
    torch.manual_seed(0)
    assert rows[0]["trainable"] > 0


def test_every_arm_trains() -> None:
    """One step of each on a task that it is for; only the head and adapters can change."""
    frozen = dict(_backbone(SMOKE, "cpu").named_parameters())
    assert frozen
    for arm, spec in ARMS.items():
        task = (spec.tasks or tuple(TASKS))[-1]
        row = train(task, arm, 0, SMOKE)
        assert 0 <= row["validation"] <= 1
        assert row["test"] is None if spec.choice else 0 <= row["test"] <= 1
        assert row["curve"][-1][0] == (1 if spec.options is None else SMOKE.steps * spec.budget * SLOW.get(task, 1))


def test_intervals() -> None:
    """Student's t over seeds, and a proportion's for one run."""
    centre, half = report.interval([0.5, 0.6, 0.7], 100)
    assert centre == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    centre, half = report.interval([0.5], 100)
    assert centre == 0.5
    assert half == pytest.approx(1.96 * 0.05, rel=0.03)  # Wilson's is a little less
    assert report.interval([1.0, 1.0, 1.0], 100)[1] > 0.01
