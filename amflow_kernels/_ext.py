"""Finds or builds the native libraries, and loads each once per process."""

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
_states: dict[str, tuple[Path | None, str | None]] = {}  # by name: (file, None) or (None, reason), once loaded


def load(library: _build.Library) -> str | None:
    """Registers a library's ops. Returns None, or the reason why the library is not available.

    The outcome, including failure, is remembered for the life of the process.
    """
    if library.name not in _states:
        with _lock:
            if library.name not in _states:
                _states[library.name] = _find_or_build(library)
    return _states[library.name][1]


def binary(library: _build.Library) -> Path | None:
    """The file that `load` loaded, or None."""
    return _states[library.name][0] if library.name in _states else None


def cache_dir() -> Path:
    """The folder for built libraries: $XDG_CACHE_HOME/amflow_kernels or ~/.cache/amflow_kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "amflow_kernels"


def presence(library: _build.Library) -> str:
    """Where a library is or comes from, in words, without building it."""
    loaded = binary(library)
    if loaded is not None:
        return str(loaded)
    file = ahead_of_time(library, Path(__file__).parent)
    if _is_whole(file):
        return str(file)
    return f"not built yet, sources in {_build.source_dir() / library.sources[0]}"


def ahead_of_time(library: _build.Library, package: Path) -> Path:
    """The file that setup.py installs; its name changes with the sources, so that a stale one is not loaded."""
    return package / f"{library.name}_{_build.source_key(library)}.so"


def _find_or_build(library: _build.Library) -> tuple[Path | None, str | None]:
    try:
        file = ahead_of_time(library, Path(__file__).parent)
        if _is_whole(file):
            try:
                torch.ops.load_library(str(file))
                return file, None
            except OSError as error:
                _say(f"{file} does not load ({error.__cause__}); building another")
        key = _build.build_key(library)
        try:
            file = _cached(library, cache_dir() / key)
        except (OSError, RuntimeError) as error:  # read-only, full, or no home: use a private folder
            if isinstance(error, _build.BuildError):
                raise
            with tempfile.TemporaryDirectory(prefix="amflow_kernels_") as folder:
                _say(f"can't write to the cache folder ({error}); using {folder} for this process, then deleting it")
                file = _cached(library, Path(folder))
                torch.ops.load_library(str(file))  # the file is not needed after loading
        else:
            torch.ops.load_library(str(file))
    except (_build.BuildError, OSError, RuntimeError) as error:
        return None, str(error) + (f": {error.__cause__}" if error.__cause__ else "")
    return file, None


def _cached(library: _build.Library, folder: Path) -> Path:
    """The library in `folder`, built first if it is missing or damaged. One process builds while others wait."""
    file = folder / library.file
    if _is_whole(file):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with _file_lock(folder / "lock"):
        if _is_whole(file):  # another process built it while this one waited
            return file
        _say(f"compiling {library.title}, to be kept in {folder}")
        start = time.monotonic()
        scratch = Path(tempfile.mkdtemp(prefix="build_", dir=folder))
        try:
            install(_build.compile_library(library, scratch, _say), file)
        except _build.BuildError as error:
            log = (scratch / _build.LOG).replace(folder / _build.LOG)
            raise _build.BuildError(f"{error}\nwhole log: {log}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _say(f"compiled in {time.monotonic() - start:.0f} s")
    return file


def install(built: Path, file: Path) -> None:
    """Copies a compiled library and its checksum to their place, each atomically."""
    _replace(file.with_name(file.name + ".sha256"), _digest(built).encode())
    _replace(file, built.read_bytes())


def _is_whole(file: Path) -> bool:
    """Whether the checksum matches: loading a truncated library would kill the process."""
    try:
        return file.with_name(file.name + ".sha256").read_text() == _digest(file)
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
    """A lock between processes; the operating system releases it even if its holder is killed."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"amflow_kernels: {message}", file=sys.stderr, flush=True)
