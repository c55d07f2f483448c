"""The motion table: its runner, its arms and its report, at the smallest size that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.motion import __main__ as command
from benchmarks.motion import report
from benchmarks.motion.arms import ARMS
from benchmarks.motion.tasks import TASKS
from benchmarks.motion.train import SETTINGS, SLOW, _backbone, train

pytestmark = pytest.mark.demo
ROOT = Path(__file__).resolve().parents[2]
SMOKE = SETTINGS["smoke"]
FAST = ("probe_all", "constant_long", "am_flow_aligned", "lstm")  # a probe, more steps, few tasks, not tested


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(out: Path, *arms: str, workers: int = 1) -> list[str]:
    """The words of a command that runs arms on two tasks."""
    tasks = ["--tasks", "which_pan", "camera"]
    return ["run", "--setting", "smoke", "--out", str(out), *tasks, "--workers", str(workers), "--arms", *arms]


def test_an_interrupted_table_continues_without_repeating_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "motion.json"
    command.main(words(out, "probe_all"))
    first = json.loads(out.read_text())["runs"]
    assert sorted((row["arm"], row["task"]) for row in first) == [("probe_all", "camera"), ("probe_all", "which_pan")]
    capsys.readouterr()
    command.main(words(out, "probe_all", "am_flow_aligned"))  # which is for which_pan only
    runs = json.loads(out.read_text())["runs"]
    assert runs[:2] == first
    assert [(row["arm"], row["task"]) for row in runs[2:]] == [("am_flow_aligned", "which_pan")]
    assert "1 runs, 1 at a time" in capsys.readouterr().out


def test_a_table_of_another_setting_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "motion.json"
    out.write_text(json.dumps({"setting": {"size": 98}, "machine": {}, "runs": []}))
    with pytest.raises(
        ValueError, match=r"motion.json: expected results of setting \{'size': 56, .* got \{'size': 98\}"
    ):
        command.main(words(out, "probe_all"))


@pytest.mark.slow
def test_runs_go_side_by_side_when_started_as_a_command(tmp_path: Path) -> None:
    out = tmp_path / "motion.json"
    module = [sys.executable, "-m", "benchmarks.motion", *words(out, "probe_all", "am_flow_aligned", workers=2)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}"}
    subprocess.run(module, check=True, cwd=ROOT, env=env, timeout=300)
    assert sorted((row["arm"], row["task"]) for row in json.loads(out.read_text())["runs"]) == [
        ("am_flow_aligned", "which_pan"),
        ("probe_all", "camera"),
        ("probe_all", "which_pan"),
    ]


def test_the_report_has_a_row_for_chance_and_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the committed table, whose figures docs/models.md gives."""
    plot = tmp_path / "motion.png"
    command.main(["report", str(command.RESULTS / "motion_cpu.json"), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert "| chance | | 14 | 25 | 50 | 25 | 50 |" in printed
    assert all(f"| {arm.label} |" in printed for arm in ARMS.values())
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_a_function_of_its_seed() -> None:
    rows = [train("direction", "am_flow", seed, SMOKE) for seed in (0, 0, 1)]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert rows[0] != {**rows[2], "seed": 0}
    assert [len(row["curve"]) for row in rows] == [6, 6, 6]
    assert rows[0]["trainable"] > 0


@pytest.mark.parametrize("arm", [pytest.param(arm, marks=() if arm in FAST else pytest.mark.slow) for arm in ARMS])
def test_every_arm_trains_on_a_task_that_it_is_for(arm: str) -> None:
    spec = ARMS[arm]
    task = (spec.tasks or tuple(TASKS))[-1]
    row = train(task, arm, 0, SMOKE)
    assert 0 <= row["validation"] <= 1
    assert row["test"] is None if spec.choice else 0 <= row["test"] <= 1
    assert row["curve"][-1][0] == (1 if spec.options is None else SMOKE.steps * spec.budget * SLOW.get(task, 1))


def test_the_frozen_backbone_of_later_runs_is_unchanged() -> None:
    before = {name: p.clone() for name, p in _backbone(SMOKE, "cpu").named_parameters()}
    train("which_pan", "am_flow", 0, SMOKE)
    after = dict(_backbone(SMOKE, "cpu").named_parameters())
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_intervals_are_those_of_students_t_over_seeds_and_of_a_proportion_for_one_run() -> None:
    centre, half = report.interval([0.5, 0.6, 0.7], 100)
    assert centre == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    centre, half = report.interval([0.5], 100)
    assert centre == 0.5
    assert half == pytest.approx(1.96 * 0.05, rel=0.03)  # Wilson's is a little narrower
    assert report.interval([1.0, 1.0, 1.0], 100)[1] > 0.01
