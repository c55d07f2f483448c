"""What a run says about its time: the estimate after the first steps, and the warning of slow bf16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from amflow_models import train
from amflow_models.training import timing
from amflow_models.training.timing import Pace


def test_a_run_prints_an_estimate_once_and_warns_of_emulated_bf16(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ten steps; the shares of a step add up to all of it, and AM flow has one."""
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: False)
    words = ["--config", str(config_file), "training.epochs=3", "training.precision=bf16", "data.validation=null"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    (found,) = re.findall(r"after 10 steps: \S+ s a step, about \S+ for the 2 that are left, .*", out)
    shares = {name: int(share) for share, name in re.findall(r"(\d+)% ([^,.]+)", found)}
    assert list(shares) == ["waiting for data", "backbone and adapters", "AM flow"]
    assert sum(shares.values()) in (99, 100, 101)
    (times,) = re.findall(r"a clip takes (\S+) s, and in fp32 (\S+) s \(\S+ times as long\)", out)
    assert all(float(time) > 0 for time in times)


@pytest.mark.parametrize(
    ("waiting", "flow", "named", "advice"),
    [
        (0.6, 0.9, "waiting for data", "data.workers"),
        (0.2, 0.1, "backbone and adapters", "training.compile"),
        (0.2, 0.9, "AM flow", "model.blocks"),
    ],
)
def test_the_largest_share_of_a_step_is_named_with_advice(waiting: float, flow: float, named: str, advice: str) -> None:
    """Neither the first step counts, which compiles, nor the profiled one."""
    pace = Pace(torch.device("cpu"), main=True)
    for number in range(1, 11):
        assert pace.report(5) is None
        with pace.step():
            pass
        pace.add(*((50.0, 100.0) if number in (1, timing._PROFILED) else (2 * waiting, 2.0)))
    pace.flow = flow
    report = pace.report(5)
    assert report is not None
    assert f"2 s a step, about 0:00:10 for the 5 that are left, besides validation. Of a step: {waiting:.0%}" in report
    assert f"Most of it is {named}: " in report
    assert advice in report.partition("Most of it")[2]


def test_only_the_main_process_profiles() -> None:
    pace = Pace(torch.device("cpu"), main=False)
    for _ in range(10):
        with pace.step():
            pass
        pace.add(1.0, 2.0)
    assert pace.report(5) is None
    assert pace.flow is None


def test_the_share_of_am_flow_is_that_of_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op within another one counts once."""
    from amflow_kernels import am_flow

    pace = Pace(torch.device("cpu"), main=True)
    x = torch.randn(1, 2, 1, 8, 4)
    for number in range(1, 4):
        with pace.step():
            if number == timing._PROFILED:
                am_flow(x, x)
    assert pace.flow is not None
    assert 0 < pace.flow <= 1
