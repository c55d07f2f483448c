"""The README and the page of functions: what they show runs, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_the_readme_has_one_table_one_picture_one_example_and_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^\|---", text, re.M)) == 1
    assert text.count("![") == 1
    assert len(examples("README.md")) == 1
    assert len(re.findall(r"^    python3 -m venv", text, re.M)) == 2
    assert len(text.splitlines()) < 130


def test_the_example_of_the_readme_runs_and_its_comments_tell_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = examples("README.md")
    names: dict[str, Any] = {}
    exec(compile(code.replace("pretrained=True", "pretrained=False"), "README.md", "exec"), names)
    shapes = re.findall(r"^flows\[\"(.*)\"\]\.(\w+)  # \((.*?)\)", code, re.M)
    assert [field for _, field, _ in shapes] == ["flow", "grid"]
    for layer, field, shape in shapes:
        assert tuple(getattr(names["flows"][layer], field).shape) == tuple(map(int, shape.split(", ")))


def test_every_line_of_the_functions_at_a_glance_runs(capsys: pytest.CaptureFixture[str]) -> None:
    functions, classifier = examples("docs/functions.md")
    torch.manual_seed(0)
    B, T, heads, N, D = 1, 4, 2, 33, 16
    q, k, v = torch.randn(3, B, T, heads, N, D)
    names: dict[str, Any] = {"q": q, "k": k, "v": v, "x": torch.randn(B, T - 1, heads, N, 8), "T": T}
    exec(compile(functions, "functions.md", "exec"), names)
    assert names["flow"].shape == (B, 1, heads, N)
    assert names["stream"](q[:, 0], k[:, 0]) is None
    assert names["y"].shape == names["x"].shape
    assert "am_flow" in capsys.readouterr().out
    small = classifier.replace('"hiera_base_224"', '"hiera_tiny_224", None')
    exec(compile(small, "functions.md", "exec"), names)


def test_every_command_that_the_first_pages_name_exists() -> None:
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/functions.md", "docs/builds.md"))
    named = set(re.findall(r"\bamflow (demo|visualize|train|evaluate|predict|data|doctor)\b", text))
    assert {"demo", "visualize"} <= named <= set(COMMANDS)
