"""Every file that a command writes is written whole or not at all."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from amflow_models import save_trained, weights
from amflow_models.files import write_text, written_whole
from amflow_models.training.metrics import draw_confusion
from matplotlib.figure import Figure
from training_runs import ROOT, environment

MODELS = ROOT / "models" / "amflow_models"


@pytest.mark.parametrize("before", [None, "mine"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(TypeError), written_whole(path) as part, part.open("w") as file:
        file.writelines(["half", b"half"])  # type: ignore[list-item]
    with written_whole(path):
        pass  # nothing was written
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({} if before is None else {"a.txt": before})


def test_a_success_replaces_it(tmp_path: Path) -> None:
    for text in ("one", "two, in UTF-8: ä"):
        write_text(tmp_path / "a.txt", text)
        assert {p.name: p.read_bytes().decode() for p in tmp_path.iterdir()} == {"a.txt": text}


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("mine")
    code = f"""
import os, signal
from pathlib import Path
from amflow_models.files import written_whole
with written_whole(Path({str(path)!r})) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "mine"


def test_a_picture_that_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Figure, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="No space left"):
        draw_confusion(torch.eye(2), ["a", "b"], tmp_path / "confusion.png")
    assert [*tmp_path.iterdir()] == []


def test_weights_that_fail_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    save_trained(torch.nn.Linear(2, 2), path)
    old = path.read_bytes()

    def fails(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        save_trained(torch.nn.Linear(2, 2), path)
    assert path.read_bytes() == old
    assert len([*tmp_path.iterdir()]) == 1


WRITERS = {"write_text", "write_bytes", "savefig"}
WHOLE = {"written_whole", "finished"}  # what gives a temporary file
ALLOWED = {
    ("training/checkpoints.py", "save"),  # into a temporary folder
    ("training/logs.py", "open"),  # appends a line
}


def unsafe_writers(source: str) -> list[str]:
    """The calls in a file that write to a path that no `written_whole` gave."""
    found: list[str] = []

    def look(node: ast.AST, safe: bool) -> None:
        if isinstance(node, ast.With):
            names = [ast.unparse(item.context_expr).partition("(")[0] for item in node.items]
            safe = safe or bool(WHOLE & set(names))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            constants = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            modes = [text for text in constants if isinstance(text, str) and len(text) < 4 and set(text) & set("wax")]
            methods = isinstance(node.func, ast.Attribute) and name in WRITERS
            functions = ast.unparse(node.func) in ("save_file", "torch.save")
            if not safe and (methods or functions or (name == "open" and modes)):
                found.append(name)
        for child in ast.iter_child_nodes(node):
            look(child, safe)

    look(ast.parse(source), False)
    return found


def test_every_module_writes_through_a_temporary_file() -> None:
    found = {
        (str(path.relative_to(MODELS)), name)
        for path in MODELS.rglob("*.py")
        for name in unsafe_writers(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("path.write_text('x')", ["write_text"]),
        ("open(path, 'w')", ["open"]),
        ("path.open('a')", ["open"]),
        ("open(path)", []),
        ("with written_whole(path) as part, part.open('w') as file:\n    file.write('x')", []),
        ("with written_whole(path) as part:\n    figure.savefig(part)", []),
        ("def f():\n    save_file(x, path)", ["save_file"]),
    ],
)
def test_the_rule_about_writers_sees_them(source: str, expected: list[str]) -> None:
    assert unsafe_writers(source) == expected
