"""Lists that the tests write."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> Path:
    """Writes a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
