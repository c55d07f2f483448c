"""The examples in docs/training.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.M | re.S))


@pytest.mark.parametrize("title", ["Plain PyTorch", "timm", "torchvision", "open_clip", "transformers"])
def test_the_example_runs_and_all_that_it_trains_gets_a_gradient(title: str) -> None:
    if title == "open_clip":
        pytest.importorskip("open_clip", reason="needs open_clip_torch (the extra families)")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[title], f"{PAGE.name}: {title}", "exec"), names)
    for name in ("layer", "head", "model"):
        for parameter_name, parameter in getattr(names.get(name), "named_parameters", list)():
            if "mask_token" not in parameter_name:  # DINOv2 has one, and uses it only with a mask
                assert parameter.grad is not None, f"{name}.{parameter_name}"
                assert parameter.grad.isfinite().all()
