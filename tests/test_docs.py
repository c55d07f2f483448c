"""The examples in docs/training.md and docs/models.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "training.md"
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.M | re.S))


@pytest.mark.parametrize("title", ["Plain PyTorch", "timm", "transformers", "Live video"])
def test_example(title: str) -> None:
    """It runs to its end, and where there is something to train, it has a gradient."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[title], f"{PAGE.name}: {title}", "exec"), names)
    for name in ("layer", "head", "model"):
        for parameter_name, parameter in getattr(names.get(name), "named_parameters", list)():
            if "mask_token" not in parameter_name:  # of DINOv2, unused without a mask
                assert parameter.grad is not None, f"{name}.{parameter_name}"
                assert parameter.grad.isfinite().all()
    if title == "Live video":
        assert names["flow"].shape == (1, 6, 50)


def test_example_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints its report, and gives logits."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "models.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile(code, "models.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert "temporal adapters in blocks 0, 11, ordinary in 1-10" in capsys.readouterr().out
