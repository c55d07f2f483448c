"""Finds, or else builds, the native library, and loads it: once per process, whoever comes first."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from amflow_kernels import _build

_lock = threading.Lock()
_state: tuple[Path | None, str | None] | None = None  # (library, None) or (None, reason), once known


def load() -> str | None:
    """Makes ``torch.ops.amflow_native`` available. Returns None, or the reason why it can't be had.

    The outcome, a failure too, is kept for the life of the process.
    """
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _find_or_build()
    return _state[1]


def binary() -> Path | None:
    """The library that `load` loaded."""
    return _state[0] if _state else None


def cache_dir() -> Path:
    """Where built libraries are kept: $XDG_CACHE_HOME/amflow_kernels or ~/.cache/amflow_kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "amflow_kernels"


def ahead_of_time(package: Path) -> Path:
    """Where setup.py leaves a library; the name tells whether it is of the sources that lie beside it."""
    return package / f"amflow_native_{_build.source_key()}.so"


def _find_or_build() -> tuple[Path | None, str | None]:
    try:
        library = ahead_of_time(Path(__file__).parent)
        if _is_whole(library):
            try:
                torch.ops.load_library(str(library))
                return library, None
            except OSError as error:
                _say(f"{library} does not load ({error.__cause__}); building another")
        key = _build.build_key()
        try:
            library = _cached(cache_dir() / key)
        except (OSError, RuntimeError) as error:  # read-only, full, no home: any folder will do, but a private one
            if isinstance(error, _build.BuildError):
                raise
            with tempfile.TemporaryDirectory(prefix="amflow_kernels_") as folder:
                _say(f"can't write to the cache folder ({error}); using {folder} for this process, then deleting it")
                library = _cached(Path(folder))
                torch.ops.load_library(str(library))  # once loaded, the file is not needed
        else:
            torch.ops.load_library(str(library))
    except (_build.BuildError, OSError, RuntimeError) as error:
        return None, str(error) + (f": {error.__cause__}" if error.__cause__ else "")
    return library, None


def _cached(folder: Path) -> Path:
    """The library in `folder`, built there first if it is missing or damaged. One process builds, others wait."""
    library = folder / _build.LIBRARY
    if _is_whole(library):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _file_lock(folder / "lock"):
        if _is_whole(library):  # another process built it while this one waited
            return library
        _say(f"compiling the CPU kernels, some 20 s, to be kept in {folder}")
        start = time.monotonic()
        scratch = Path(tempfile.mkdtemp(prefix="build_", dir=folder))
        try:
            install(_build.compile_library(scratch), library)
        except _build.BuildError as error:
            log = (scratch / _build.LOG).replace(folder / _build.LOG)
            raise _build.BuildError(f"{error}\nwhole log: {log}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _say(f"compiled in {time.monotonic() - start:.0f} s")
    return library


def install(built: Path, library: Path) -> None:
    """Puts a compiled library in its place together with its checksum; never half of it is seen there."""
    _replace(library.with_name(library.name + ".sha256"), _digest(built).encode())
    _replace(library, built.read_bytes())


def _is_whole(library: Path) -> bool:
    """Loading a truncated library kills the process, so its checksum is compared first."""
    try:
        return library.with_name(library.name + ".sha256").read_text() == _digest(library)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it even if that process is killed."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"amflow_kernels: {message}", file=sys.stderr, flush=True)
