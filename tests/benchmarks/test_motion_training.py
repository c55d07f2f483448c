"""The motion table: its runner, its arms and its report, at the smallest size that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.motion import __main__ as command
from benchmarks.motion import report
from benchmarks.motion.arms import ARMS, RATE_OF
from benchmarks.motion.tasks import TASKS
from benchmarks.motion.train import SETTINGS, Job, _backbone, train

pytestmark = pytest.mark.demo
ROOT = Path(__file__).resolve().parents[2]
SMOKE = SETTINGS["smoke"]
FAST = ("probe_all", "unordered", "flow_times_difference")  # a probe, one task, all tasks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(out: Path, *arms: str, workers: int = 1) -> list[str]:
    """The words of a command that runs arms on two tasks."""
    tasks = ["--tasks", "which_pan", "direction"]
    return ["run", "--setting", "smoke", "--out", str(out), *tasks, "--workers", str(workers), "--arms", *arms]


def test_an_interrupted_table_continues_without_repeating_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "motion.json"
    command.main(words(out, "probe_all"))
    first = json.loads(out.read_text())["runs"]
    assert sorted((row["arm"], row["task"]) for row in first) == [
        ("probe_all", "direction"),
        ("probe_all", "which_pan"),
    ]
    capsys.readouterr()
    command.main(words(out, "probe_all", "unordered"))  # which is for direction only
    runs = json.loads(out.read_text())["runs"]
    assert runs[:2] == first
    assert [(row["arm"], row["task"]) for row in runs[2:]] == [("unordered", "direction")]
    assert "1 runs, 1 at a time" in capsys.readouterr().out


def test_learning_rates_and_lengths_are_compared_on_validation_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuning.json"
    tune = ["tune", "--setting", "smoke", "--out", str(out), "--workers", "1", "--arms", "constant"]
    command.main([*tune, "--rates", "1e-3", "2e-3"])
    command.main([*tune, "--rates", "1e-3", "2e-3", "--steps", "3", "6"])
    runs = json.loads(out.read_text())["runs"]
    assert [(row["rate"], row["steps"]) for row in runs] == [(1e-3, 6), (2e-3, 6), (1e-3, 3), (2e-3, 3)]
    assert {(row["test"], row["seed"]) for row in runs} == {(None, command.TUNING_SEED)}
    assert command.TUNING_SEED not in range(max(setting.seeds for setting in SETTINGS.values()))
    printed = capsys.readouterr().out
    assert "| | steps | 0.001 | 0.002 |" in printed
    assert [line.count("|") for line in printed.splitlines() if "| constant gate |" in line] == [5, 5, 5]


def test_the_best_validated_rate_of_a_length_is_chosen_and_of_equal_ones_that_which_learned_soonest() -> None:
    def row(arm: str, rate: float, steps: int, validation: float, curve: list[float]) -> dict[str, Any]:
        points = list(enumerate(curve))
        return {"arm": arm, "rate": rate, "steps": steps, "validation": validation, "curve": points}

    rows = [
        row("am_flow", 1e-3, 9, 0.9, [0.2, 0.4]),
        row("am_flow", 2e-3, 9, 0.9, [0.2, 0.5]),
        row("am_flow", 4e-3, 9, 0.8, [0.2, 0.9]),
        row("am_flow", 8e-3, 5, 1.0, [0.2, 0.9]),
        row("am_flow", 8e-3, 12, 1.0, [0.2, 0.9]),
        row("constant", 1e-3, 9, 0.3, [0.2, 0.3]),
    ]
    assert report.chosen_rates({"runs": rows}, 9) == {"am_flow": 2e-3, "constant": 1e-3}


def test_arms_have_the_rates_that_the_committed_tuning_chose() -> None:
    saved = json.loads((command.RESULTS / "motion_tuning_cpu.json").read_text())
    chosen = report.chosen_rates(saved, SETTINGS["cpu"].steps)
    adapters = {arm: spec.rate for arm, spec in ARMS.items() if spec.options is not None}
    assert adapters == {arm: chosen[RATE_OF.get(arm, arm)] for arm in adapters}


def test_a_run_that_differs_in_anything_is_another_run() -> None:
    assert set(command.DISTINCT) == set(Job._fields) - {"tested"}


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
    module = [sys.executable, "-m", "benchmarks.motion", *words(out, "probe_all", "unordered", workers=2)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}"}
    subprocess.run(module, check=True, cwd=ROOT, env=env, timeout=300)
    assert sorted((row["arm"], row["task"]) for row in json.loads(out.read_text())["runs"]) == [
        ("probe_all", "direction"),
        ("probe_all", "which_pan"),
        ("unordered", "direction"),
    ]


def test_the_report_has_a_row_for_chance_and_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the committed table, which docs/models.md shows."""
    table = json.loads((command.RESULTS / "motion_cpu.json").read_text())
    tuned = json.loads((command.RESULTS / "motion_tuning_cpu.json").read_text())
    plot = tmp_path / "motion.png"
    command.main(["report", str(command.RESULTS / "motion_cpu.json"), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert "| chance | | 25 | 50 |" in printed
    assert all(f"| {ARMS[row['arm']].label} |" in printed for row in table["runs"])
    page = (ROOT / "docs" / "models.md").read_text()
    assert all(f"\n\n{part}\n\n" in page for part in (*printed.strip().split("\n\n"), report.tuning(tuned)))
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_arms_are_compared_seed_by_seed() -> None:
    def row(arm: str, seed: int, test: float, steps: int) -> dict[str, Any]:
        return {"task": "which", "arm": arm, "seed": seed, "test": test, "steps_to_90": steps}

    rows = [
        *(row("constant", seed, test, 100) for seed, test in enumerate((0.7, 0.8, 0.9, 0.5))),
        *(row("am_flow", seed, test, steps) for seed, test, steps in ((3, 0.6, 9), (0, 0.8, 90), (2, 0.9, 80))),
        row("frame_difference", 1, 0.9, 50),
    ]
    printed = report.differences({"setting": {"test": 100}, "runs": rows})
    half = 4.303 * 10 / 3  # of 10, 0 and 10 points, whose deviation is 10 / sqrt(3)
    assert f"| AM flow - constant gate | +6.7 ± {half:.1f} (-15 ± 64) |" in printed  # seed 3 of the second is at chance
    assert "| frame difference - constant gate |  |" in printed  # one seed has no interval
    assert len(printed.splitlines()) == 2 + len(report.COMPARED)


def test_a_run_is_a_function_of_its_seed() -> None:
    rows = [train(Job("direction", "am_flow", seed, 1e-3, 6), SMOKE) for seed in (0, 0, 1)]
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
    row = train(Job(task, arm, 0, spec.rate, SMOKE.steps), SMOKE)
    assert 0 <= row["validation"] <= 1
    assert 0 <= row["test"] <= 1
    assert row["curve"][-1][0] == (1 if spec.options is None else SMOKE.steps)


@pytest.mark.parametrize("steps", [3, 10, 20])
def test_a_run_may_be_short(steps: int) -> None:
    assert len(train(Job("direction", "am_flow", 0, 1e-3, steps), SMOKE)["curve"]) == steps


def test_the_frozen_backbone_of_later_runs_is_unchanged() -> None:
    before = {name: p.clone() for name, p in _backbone(SMOKE, "cpu").named_parameters()}
    train(Job("which_pan", "am_flow", 0, 1e-3, SMOKE.steps), SMOKE)
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
