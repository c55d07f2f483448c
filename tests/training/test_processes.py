"""Several processes beside one: replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest
from amflow_models import train
from amflow_models.training.checkpoints import Checkpoints, find_trained
from training_runs import difference, rows, run, write_config

FILES = ("model.safetensors", "ema.safetensors")
WORDS = {
    "ddp": ["training.ema=0.9", "training.accumulate=2", "training.parallel=ddp"],
    "fsdp2": ["training.ema=0.9", "training.accumulate=2", "training.parallel=fsdp2", "training.recompute=true"],
}


@pytest.fixture(scope="module")
def one(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert train.main(["--config", str(write_config(videos, folder)), *WORDS["ddp"]]) == 0
    return folder / "run"


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_like_one_which_can_resume_them(one: Path, config_file: Path, parallel: str) -> None:
    """The same batches give the same losses and checkpoints, but for rounding."""
    two = config_file.parent / "run"
    out = run(config_file, *WORDS[parallel], processes=2)
    assert f"2 x cpu, the model is {'copied' if parallel == 'ddp' else 'sharded'}" in out
    for a, b in zip(rows(one), rows(two), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=2e-4)
    for a, b in zip(rows(one, "validation", ("loss",)), rows(two, "validation", ("loss",)), strict=True):
        assert float(a[0]) == pytest.approx(float(b[0]), rel=2e-4)
    for name in FILES:
        assert difference(find_trained(one, name), find_trained(two, name)) < 1e-3
    last = _remove_last(two)
    assert train.main(["--config", str(config_file), *WORDS[parallel], "--resume"]) == 0
    assert difference(last / "model.safetensors", find_trained(two)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_resume_their_own_run(config_file: Path, parallel: str) -> None:
    two = config_file.parent / "run"
    run(config_file, *WORDS[parallel], processes=2)
    last = _remove_last(two)
    run(config_file, *WORDS[parallel], "--resume", processes=2)
    for name in FILES:
        assert difference(last / name, find_trained(two, name)) < 1e-3


def _remove_last(output: Path) -> Path:
    """Moves the last checkpoint out of a run; returns where it is."""
    _, last = Checkpoints(output, 2).all()
    return last.rename(output.parent / "last")
