"""Configs of runs: the shipped ones, changes, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from amflow_models.training.build import build_model, image_size
from amflow_models.training.config import CONFIGS, load_config


def test_shipped_configs_are_valid() -> None:
    """Without and with changes; each has the number of classes of its data set, and the precision is automatic."""
    names = [path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "own_data"]
    assert len(names) >= 5
    for name in names:
        config = load_config(name)
        assert config.training.precision == "auto"
        assert config.data.num_classes == {"k": 400, "s": 174, "t": 31}[name[0] if name[1] != "m" else "t"]
        assert load_config(name, [f"output=/elsewhere/{name}"]).output == Path(f"/elsewhere/{name}")


def test_the_number_of_classes_is_that_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the config for one's own data, which has no number; a given number counts."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data: .*classes\.txt: can't be read"):
        load_config("own_data")
    assert load_config("own_data", ["data.num_classes=7"]).data.num_classes == 7
    Path("classes.txt").write_text("walk\nrun\n")
    assert load_config("own_data").data.num_classes == 2
    Path("elsewhere").mkdir()
    Path("elsewhere/names.txt").write_text("a\nb\nc\n")
    assert load_config("own_data", ["data.root=elsewhere", "data.classes=names.txt"]).data.num_classes == 3


@pytest.mark.parametrize(
    ("name", "temporal"),
    [
        ("k400_vitb_am12", range(12)),
        ("ssv2_vitb_am12", range(12)),
        ("smarthome_vitb_first_last", (0, 11)),
        ("k400_hierab_am16_stage1", (5, 6, 19, 20)),
        ("k400_hierab_am16_stage2", range(5, 21)),
    ],
)
def test_shipped_configs_place_am_flow_as_their_names_say(name: str, temporal: tuple[int, ...]) -> None:
    """And the size fits the backbone. On the meta device, without memory for weights."""
    with torch.device("meta"):
        model = build_model(config := load_config(name), synthetic=True)
        assert model.report is not None
        assert model.report.temporal == tuple(temporal)
        clips = torch.empty(1, config.data.frames, 3, *2 * [image_size(config, model)])
        assert model(clips).shape == (1, config.data.num_classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.learning_rate=1"], "training.learning_rate: there is no such key"),
        (["training.warm_up_epochs=1"], "did you mean 'warmup_epochs'"),
        (["model.start.block=all", "model.start.trained=x"], "model.start.block: there is no such key; did you mean"),
        (["trainin.lr=1"], "did you mean 'training'"),
        (["data.frames=1"], "data.frames: .*greater than or equal to 2, got 1"),
        (["training.lr=fast"], "training.lr: .*got 'fast'"),
        (["training.lr=.inf"], "training.lr: .*finite"),
        (["model.pool=avgg"], "model.pool: .*'avg' or 'token'"),
        (["training"], "expected section.key=value, got 'training'"),
        (["training.lr.x=1"], "training.lr.x: lr is no section"),
        (["training.lr=[1"], "the value can't be read as YAML"),
    ],
)
def test_bad_changes_name_their_key(config_file: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config_file, changes)


def test_numbers_may_be_written_without_a_point(config_file: Path) -> None:
    """YAML reads 3e-4 as a string."""
    config = load_config(config_file, ["training.lr=3e-4", "training.betas=[0.8, 1e-1]", "training.precision=bf16"])
    assert (config.training.lr, config.training.betas, config.training.precision) == (3e-4, (0.8, 0.1), "bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "can't be read as YAML"), ("- 1", "expected keys and values, got list"), ("output: x", "model: Field")],
)
def test_bad_config_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="did you mean 'k400_vitb_am12'"):
        load_config("k400_vitb")
