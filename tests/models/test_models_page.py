"""The example in docs/models.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_example_prints_its_report_and_gives_logits(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert "temporal adapters in blocks 0, 11, ordinary in 1-10" in capsys.readouterr().out
