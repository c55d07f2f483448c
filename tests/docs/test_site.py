"""The documentation site: its examples run, and its reference has every public name.

That every link leads somewhere is for ``mkdocs build --strict`` in .ci/run.
"""

from __future__ import annotations

import re
from pathlib import Path

import amflow_models
import amflow_models.data
import pytest
import torch

import amflow_kernels
from amflow_kernels import am_flow

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run_examples(page: str) -> list[dict[str, object]]:
    """The names that each example of a page defines."""
    results = []
    for code in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S):
        names: dict[str, object] = {}
        exec(compile(code, page, "exec"), names)
        results.append(names)
    return results


def test_the_example_of_live_video_runs() -> None:
    (names,) = run_examples("streaming.md")
    assert names["flow"].shape == (1, 6, 50)


@pytest.mark.slow
def test_the_examples_of_compiling_and_exporting_run_and_give_what_the_function_gives() -> None:
    torch.manual_seed(0)
    compiled, exported = run_examples("export.md")
    flow = am_flow(compiled["q"], compiled["k"], head_reduction="mean", center=True)
    assert torch.equal(compiled["tokens"], flow.argmax(-1))
    assert exported["score"].shape == (5, 6)
    x = torch.randn(2, 3, 4, 3, 20, 32)
    assert torch.equal(exported["program"].module()(*x), exported["MotionScore"]()(*x))


@pytest.mark.parametrize("package", [amflow_kernels, amflow_models], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: object) -> None:
    listed = re.findall(r"^::: (\S+)", "".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    assert len(listed) == len(set(listed))
    prefix = f"{package.__name__}."
    names = {name.removeprefix(prefix) for name in listed if name.startswith(prefix)}
    assert set(package.__all__) <= names
    assert not {name for name in names if "." not in name} - {*package.__all__, "data", "testing"}


@pytest.mark.slow
@pytest.mark.demo
def test_the_notebook_runs_offline_and_its_head_learns_which_quarter_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs, which needs Python 3.11")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", f"{DOCS.parent}:{DOCS.parent / 'models'}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(DOCS / "notebooks" / "first_flow.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    text = "".join(output.text for output in last.outputs if output.output_type == "stream")
    (right,) = re.findall(r"gets (\d+)% right", text)
    assert int(right) >= 80
