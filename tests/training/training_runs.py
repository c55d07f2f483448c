"""A run that takes seconds, and what the tests look at in its output."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model": {"backbone": "vit_tiny_patch16_224", "weights": None, "img_size": 32, "depth": 2, "bottleneck": 8},
    "data": {
        "kind": "mmaction", "train": "train.txt", "validation": "test.txt", "test": "test.txt", "num_classes": 2,
        "frames": 3, "stride": 1, "workers": 0,
    },
    "training": {"epochs": 2, "warmup_epochs": 0.5, "batch": 4, "precision": "fp32", "lr": 1e-3},
    "evaluation": {"clips": 2, "crops": 3, "batch": 4},
}  # fmt: skip
RECIPES = [
    "training.mixup=0.8", "training.cutmix=1", "data.random_erasing=0.5", "data.repeats=2", "model.dropout=0.2",
    "model.drop_path=0.3", "training.ema=0.9", "training.base_batch=8", "training.skip_not_finite=1",
]  # fmt: skip
EXACT = ("step", "loss", "lr", "gradient_norm")  # columns of train.csv that are not times


def write_config(videos: Path, folder: Path) -> Path:
    """The config file of a run on these videos, whose output is `folder/run`."""
    content = json.loads(json.dumps(TINY))
    for split in ("train", "validation", "test"):
        content["data"][split] = str(videos / content["data"][split])
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), **content}))
    return path


def rows(output: Path, name: str = "train", columns: tuple[str, ...] = EXACT) -> list[tuple[str, ...]]:
    """Columns of a run's CSV file."""
    with (output / f"{name}.csv").open() as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def command(config: Path, *words: str, processes: int = 1) -> list[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *launch, "-m", "amflow_models.train", "--config", str(config), *words]


def run(config: Path, *words: str, processes: int = 1) -> str:
    """Trains in other processes; returns their output."""
    done = subprocess.run(
        command(config, *words, processes=processes), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two files hold the same bits. Their metadata may differ: it has the config, with the run's folder."""
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def difference(a: Path, b: Path) -> float:
    """Relative difference of two files of weights, as a whole.

    Single weights may differ more: where a gradient is nearly 0, AdamW makes a step of its rounding error.
    """
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys()
    squares = [((one[key] - other[key]).square().sum(), one[key].square().sum()) for key in one]
    return float((sum(x for x, _ in squares) / sum(x for _, x in squares)) ** 0.5)
