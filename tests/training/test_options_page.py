"""The page of options matches the config."""

from __future__ import annotations

from pathlib import Path

import pytest
from amflow_models.training.options import SECTIONS, descriptions, updated

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_option_is_described_in_the_docstring_of_its_section(name: str) -> None:
    fields = {field for field in SECTIONS[name].model_fields if field not in SECTIONS} - {"start"}
    assert fields - descriptions(SECTIONS[name]).keys() == set()


def test_the_tables_of_the_page_are_those_of_the_config() -> None:
    """After a change: python -m amflow_models.training.options docs/options.md"""
    page = PAGE.read_text(encoding="utf-8")
    assert page == updated(page)
    assert "| `training.mixup_prob` | `1.0` |" in page
    assert "| `data.train` | required | list files; " in page
