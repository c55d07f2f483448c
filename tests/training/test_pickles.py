"""Nothing that is loaded is unpickled: a file that would run code is refused in a clear line, wherever it is put."""

from __future__ import annotations

import argparse
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from amflow_models import create_backbone, evaluate, load_aligning_encoders, load_classifier, load_trained, train
from amflow_models.cli.main import main
from amflow_models.data import read_list
from amflow_models.training.checkpoints import Checkpoints
from amflow_models.training.config import load_config
from training_runs import write_config

OBJECTS = "is damaged, or holds Python objects besides tensors and plain values"
TINY = "vit_tiny_patch16_224"


class Malicious:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the pickles create, if they run; they do where pickle reads them."""
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Malicious(mark)))
    mark.unlink()
    return mark


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of the command for a finished run, whose checkpoint has an average."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(videos, folder)
    words = ["--config", str(config), "training.epochs=1", "training.ema=0.5"]
    assert train.main(words) == 0
    return words


@pytest.fixture
def run(trained: list[str], tmp_path: Path) -> list[str]:
    """The same for a copy of it."""
    shutil.copytree(Path(trained[1]).parent / "run", tmp_path / "run")
    return [*trained, f"output={tmp_path / 'run'}"]


def checkpoint(run: list[str]) -> Path:
    return Checkpoints(Path(run[-1].removeprefix("output=")), 2).all()[-1]


def write_pickle(path: Path, mark: Path, form: str) -> None:
    """A malicious file: a bare pickle, one by torch.save, or one in which only an entry is malicious."""
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(mark)))
    else:
        torch.save(Malicious(mark) if form == "torch" else {"x": torch.ones(2), "y": Malicious(mark)}, path)


FORMS = ("pickle", "torch", "entry")


def refused(capsys: pytest.CaptureFixture[str], mark: Path, path: Path) -> str:
    """The error, which names the file and gives no advice to load it all the same."""
    error = capsys.readouterr().err
    assert not mark.exists()
    assert str(path) in error
    assert "weights_only" not in error
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
def test_a_checkpoint(run: list[str], mark: Path, name: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed, tested, and loaded for predictions."""
    path = checkpoint(run)
    write_pickle(path / name, mark, form)
    capsys.readouterr()
    assert train.main([*run, "--resume"]) == 1
    error = refused(capsys, mark, path)
    assert OBJECTS in error if name == "state.pt" else "can't be read as safetensors" in error
    if name == "state.pt":
        return  # nothing else reads it, as the weights say how they were trained
    ema = ["--ema"] if name.startswith("ema") else []
    assert evaluate.main([*run, *ema]) == 1
    refused(capsys, mark, path)
    assert main(["predict", str(path), "video.mp4", *ema]) == 1
    refused(capsys, mark, path)


def test_the_optimizers_state(run: list[str], mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(run)
    state = torch.load(path / "state.pt", weights_only=True)
    state["optimizer"]["state"]["head.weight"]["step"] = Malicious(mark)
    torch.save(state, path / "state.pt")
    capsys.readouterr()
    assert train.main([*run, "--resume"]) == 1
    assert OBJECTS in refused(capsys, mark, path)


def test_a_checkpoint_of_version_0_1(run: list[str], mark: Path, tmp_path: Path) -> None:
    """There only `state.pt` says how it was trained."""
    kept = Path(__file__).parent / "checkpoint_of_0.1" / "checkpoints" / "step_00000002"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes((kept / "model.safetensors").read_bytes())
    write_pickle(tmp_path / "old" / "state.pt", mark, "entry")
    with pytest.raises(ValueError, match=OBJECTS):
        load_classifier(tmp_path / "old")
    assert not mark.exists()


@pytest.mark.parametrize("form", FORMS)
def test_weights_to_start_from(trained: list[str], tmp_path: Path, mark: Path, form: str,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "start.pt"
    write_pickle(path, mark, form)
    capsys.readouterr()
    words = [*trained, f"output={tmp_path / 'new'}", f"model.start.trained={path}", "model.start.blocks=all"]
    assert train.main(words) == 1
    assert "can't be read as safetensors" in refused(capsys, mark, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("old_timm", [False, True])
def test_a_backbones_weights(
    tmp_path: Path, mark: Path, form: str, suffix: str, old_timm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to timm 1.0.25, its `load_state_dict` unpickles what is not safetensors."""
    path = tmp_path / f"weights{suffix}"
    write_pickle(path, mark, form)
    if old_timm and suffix == ".pth":
        monkeypatch.setattr(timm.models, "load_state_dict", unpickle)
    with pytest.raises(ValueError, match=r"weights\.") as error:
        create_backbone(TINY, path, 32)
    assert not mark.exists()
    assert "weights_only" not in str(error.value)
    if suffix == ".pth":
        assert f"{path}: {OBJECTS}" in str(error.value)


def unpickle(path: Any, *_: Any, **__: Any) -> Any:
    return torch.load(path, weights_only=False)


def test_weights_of_the_hub(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As old versions of timm load a file that is not safetensors."""
    path = tmp_path / "downloaded.bin"
    write_pickle(path, mark, "entry")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: unpickle(path))
    with pytest.raises(ValueError, match=f"the pretrained weights of {TINY}: {OBJECTS}"):
        create_backbone(TINY, "hub", 224)
    assert not mark.exists()


def test_a_backbones_weights_with_arguments_of_the_command_line_are_read(tmp_path: Path) -> None:
    """Published checkpoints often have an `argparse.Namespace`, which runs nothing."""
    model = timm.create_model(TINY, img_size=32, num_classes=0)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "weights.pth")
    loaded = create_backbone(TINY, tmp_path / "weights.pth", 32)
    assert torch.equal(loaded.get_parameter("cls_token"), model.get_parameter("cls_token"))


def test_loaders_for_python(trained: list[str], tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_pickle(path, mark, "entry")
    model = torch.nn.Linear(2, 2)
    for load in (
        lambda: load_trained(model, path),
        lambda: load_aligning_encoders(path),
        lambda: load_classifier(path),
    ):
        with pytest.raises(ValueError, match="can't be read as safetensors"):
            load()
    assert not mark.exists()


def test_a_config_in_yaml(trained: list[str], mark: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In a file, and in a change on the command line."""
    call = f'!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ["{mark}"]]'
    config = tmp_path / "config.yaml"
    config.write_text(f"{Path(trained[1]).read_text()}\nseed: {call}\n")
    for words in (["--config", str(config)], [*trained, f"seed={call}"]):
        for command in (train.main, evaluate.main):
            capsys.readouterr()
            assert command(words) == 1
            assert "can't be read as YAML" in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(ValueError, match=r"config\.yaml: can't be read as YAML"):
        load_config(config)


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "cls", "json"])
def test_a_member_of_a_tar_file(tmp_path: Path, mark: Path, suffix: str) -> None:
    """webdataset decodes some by pickle."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.cls").write_text("0")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "a.mp4", "a.mp4")
        if suffix not in ("cls", "json"):
            archive.add(tmp_path / "a.cls", "a.cls")
        write_pickle(tmp_path / f"a.{suffix}", mark, "pickle")
        archive.add(tmp_path / f"a.{suffix}", f"a.{suffix}")
    try:
        read_list("tar", tmp_path / "shard.tar")
    except ValueError as error:
        assert f"a.{suffix}" in str(error)  # noqa: PT017 -- some are refused, others not looked at
    assert not mark.exists()
