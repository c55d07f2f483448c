"""The page about one's own data: its commands and its code run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from amflow_models.cli.main import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_data.md"


@pytest.mark.slow
@pytest.mark.demo
def test_the_five_commands_lead_from_a_folder_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    make_clips, predict = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    commands = re.findall(r"^amflow .*$", PAGE.read_text(), re.M)
    assert len(commands) == 5
    exec(compile(make_clips, PAGE.name, "exec"), {})
    assert len([*Path("videos").rglob("*.mp4")]) == 12
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert {path.name for path in Path("predicted").iterdir()} == {"0.mp4", "1.mp4"}
    assert {"test.json", "test.csv", "test_confusion.png"} <= {path.name for path in Path("runs/own_data").iterdir()}
    exec(compile(predict, PAGE.name, "exec"), {})
    assert re.fullmatch(r"(left|right): \S+%\n(left|right): \S+%\n", capsys.readouterr().out)
