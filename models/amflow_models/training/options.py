"""The table of all options of a config, from the docstrings: ``python -m amflow_models.training.options FILE``.

The command writes the tables between the marks in a page of the docs anew.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from amflow_models.files import write_text
from amflow_models.training.config import Config, Data, Evaluation, Model, Start, Training
from amflow_models.training.resuming import FIXED, FREE, ROUNDING

SECTIONS: dict[str, type[BaseModel]] = {
    "": Config, "model": Model, "model.start": Start, "data": Data, "training": Training, "evaluation": Evaluation,
}  # fmt: skip
_MARKS = re.compile(r"(<!-- (options|resuming) -->\n).*?(<!-- end -->)", re.S)


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """The text about each field in a section's docstring; fields that are described together share one."""
    attributes = (inspect.getdoc(section) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.+?)(?=\n    \w|\n*\Z)", attributes, re.M | re.S):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def options_table() -> str:
    """A Markdown table of each option, its default and its meaning."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for prefix, section in SECTIONS.items():
        described = descriptions(section)
        for name, field in section.model_fields.items():
            if name in SECTIONS:  # a section of its own
                continue
            option = f"{prefix}.{name}" if prefix else name
            default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
            text = described[name].replace("|", "\\|")
            lines.append(f"| `{option}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def resuming_table() -> str:
    """A Markdown table of what a resumed run may change."""
    rows = {
        "nothing: the weights are the same, bit for bit": FREE,
        "the rounding of the same computation": (*ROUNDING, "the number of processes"),
        "the run: `--resume --allow-changes`": ("all other options", "the training list"),
        "the model: not in a resumed run; start another from its weights, `model.start`": FIXED,
    }
    lines = ["| what a change concerns | options |", "|---|---|"]
    for meaning, names in rows.items():
        listed = ", ".join(name if " " in name else f"`{name}`" for name in names)
        lines.append(f"| {meaning} | {listed} |")
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """The page with the tables between its marks as they are now."""
    tables = {"options": options_table(), "resuming": resuming_table()}
    return _MARKS.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)


def _yaml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value).strip('"')


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), updated(Path(sys.argv[1]).read_text(encoding="utf-8")))
