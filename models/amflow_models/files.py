"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary file's path to write to; the file takes the name `path` when the ``with`` block ends.

    It lies in the same folder and has the same suffix. If the block raises, or writes nothing, an existing file of that
    name stays as it was; so it does if the process is killed or the machine stops.

    Args:
        path: the file to write.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if part.exists():
            flush(part)
            part.replace(path)
            flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # not all file systems support it for folders
            os.fsync(file)
    finally:
        os.close(file)
