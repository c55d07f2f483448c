"""Training and testing as commands: configs, order of clips, checkpoints, resuming, processes side by side."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from amflow_models import VideoClassifier, create_backbone, evaluate, load_trained, train
from amflow_models.training import checkpoints as checkpoints_module
from amflow_models.training.average import Average
from amflow_models.training.build import build_model, image_size
from amflow_models.training.checkpoints import Checkpoints, find_trained
from amflow_models.training.config import CONFIGS, load_config
from amflow_models.training.loading import EvaluationBatches, TrainBatches
from amflow_models.training.metrics import scores
from amflow_models.training.parallel import distribute, make_accelerator
from conftest import ROOT
from safetensors.torch import load_file

TINY = {
    "model": {"backbone": "vit_tiny_patch16_224", "weights": None, "img_size": 32, "depth": 2, "bottleneck": 8},
    "data": {
        "kind": "mmaction", "train": "train.txt", "validation": "test.txt", "test": "test.txt", "num_classes": 2,
        "frames": 3, "stride": 1, "workers": 0,
    },
    "training": {"epochs": 2, "warmup_epochs": 0.5, "batch": 4, "precision": "fp32", "lr": 1e-3},
    "evaluation": {"clips": 2, "crops": 3, "batch": 4},
}  # fmt: skip
EXACT = ("step", "loss", "lr", "gradient_norm")  # of train.csv: the rest are times


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen videos to train on and five to test on, of a bright square that moves left or right."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 16), ("test", 5)):
        lines = []
        for number in range(count):
            label = number % 2
            with av.open(str(folder / f"{split} {number}.mp4"), "w") as file:
                stream = file.add_stream("libx264", rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for t in range(6):
                    frame = np.full((48, 64, 3), 40 + number, np.uint8)
                    x = 8 * t if label else 40 - 8 * t
                    frame[16:32, x : x + 16] = 220
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                file.mux(stream.encode())
            lines.append(f"{split} {number}.mp4 {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def config_file(videos: Path, tmp_path: Path) -> Path:
    """A run on these videos that takes seconds."""
    content = json.loads(json.dumps(TINY))
    for split in ("train", "validation", "test"):
        content["data"][split] = str(videos / content["data"][split])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **content}))
    return path


def rows(output: Path, name: str = "train", columns: tuple[str, ...] = EXACT) -> list[tuple[str, ...]]:
    with (output / f"{name}.csv").open() as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def command(config: Path, *words: str, processes: int = 1) -> list[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *launch, "-m", "amflow_models.train", "--config", str(config), *words]


def run(config: Path, *words: str, processes: int = 1) -> str:
    done = subprocess.run(
        command(config, *words, processes=processes), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def difference(a: Path, b: Path) -> float:
    """Of two files of weights, relative: where a gradient is nearly 0, AdamW makes a step of its rounding error."""
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys()
    squares = [((one[key] - other[key]).square().sum(), one[key].square().sum()) for key in one]
    return float((sum(x for x, _ in squares) / sum(x for _, x in squares)) ** 0.5)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'models'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# Configs.


def test_shipped_configs_are_valid() -> None:
    """As they are, and with changes; each has as many classes as its data set."""
    names = [path.stem for path in CONFIGS.glob("*.yaml")]
    assert len(names) >= 5
    for name in names:
        config = load_config(name)
        assert config.data.num_classes == {"k": 400, "s": 174, "t": 31}[name[0] if name[1] != "m" else "t"]
        assert load_config(name, [f"output=/elsewhere/{name}"]).output == Path(f"/elsewhere/{name}")


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
def test_shipped_configs_make_models(name: str, temporal: tuple[int, ...]) -> None:
    """AM flow is where the name says, and the size fits the backbone. Without memory for the weights."""
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
def test_bad_changes(config_file: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config_file, changes)


def test_numbers_as_people_write_them(config_file: Path) -> None:
    """YAML takes 3e-4 for a string."""
    config = load_config(config_file, ["training.lr=3e-4", "training.betas=[0.8, 1e-1]", "training.precision=bf16"])
    assert (config.training.lr, config.training.betas, config.training.precision) == (3e-4, (0.8, 0.1), "bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "can't be read as YAML"), ("- 1", "expected keys and values, got list"), ("output: x", "model: Field")],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="did you mean 'k400_vitb_am12'"):
        load_config("k400_vitb")


# The order of clips.


def test_processes_share_what_one_would_see() -> None:
    """In every step the parts of N processes are the batch of one; every clip comes once in an epoch."""
    whole = list(TrainBatches(22, 6, rank=0, world=1, seed=3, start=0, stop=9))
    parts = [list(TrainBatches(22, 6, rank=rank, world=3, seed=3, start=0, stop=9)) for rank in range(3)]
    assert whole == [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    for epoch in range(3):
        seen = [index for step in whole[3 * epoch : 3 * epoch + 3] for at, index in step if at == epoch]
        assert len(seen) == len(set(seen)) == 18
    assert whole[:3] != whole[3:6]
    assert list(TrainBatches(22, 6, rank=0, world=1, seed=3, start=4, stop=9)) == whole[4:]


@pytest.mark.parametrize(("count", "batch", "world"), [(1, 4, 1), (7, 2, 3), (12, 4, 2), (2, 8, 4)])
def test_all_are_tested(count: int, batch: int, world: int) -> None:
    parts = [list(EvaluationBatches(count, batch, rank=rank, world=world)) for rank in range(world)]
    assert {index for part in parts for step in part for _, index in step} == set(range(count))
    assert len({tuple(map(len, part)) for part in parts}) == 1  # nobody waits for a batch that does not come
    assert [len(part) for part in parts] == [len(EvaluationBatches(count, batch, rank=0, world=world))] * world


# Scores.


def test_scores() -> None:
    """Against counting by hand; a class without videos does not count."""
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    found = scores(probabilities, torch.tensor([0, 0, 1, 1]))
    assert (found.top1, found.top5, found.mean_class) == (0.75, 1.0, 0.75)
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    many = torch.arange(8.0).repeat(2, 1)
    assert scores(many, torch.tensor([3, 2])).top5 == 0.5
    with pytest.raises(ValueError, match="at least one video"):
        scores(probabilities[:0], torch.tensor([], dtype=torch.int64))


# Runs.


def test_train_and_evaluate(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From list files to scores; a run is not written over; a checkpoint holds the weights that were tested."""
    assert train.main(["--config", str(config_file), "training.ema=0.9", "training.accumulate=2"]) == 0
    output = load_config(config_file).output
    assert [row[0] for row in rows(output)] == [str(step) for step in range(1, 9)]
    assert rows(output, "validation", ("step",)) == [("4",), ("8",)]
    assert [path.name for path in Checkpoints(output, 2).all()] == ["step_00000004", "step_00000008"]
    assert list((output / "tensorboard").iterdir())
    for speed, waiting in rows(output, columns=("clips_per_second", "waiting")):
        assert float(speed) > 0
        assert 0 <= float(waiting) <= 1

    capsys.readouterr()
    assert evaluate.main(["--config", str(config_file)]) == 0
    told = json.loads((output / "test.json").read_text())
    assert told["videos"] == 5
    assert f"top-1 {told['top1']:.2%}" in capsys.readouterr().out
    with (output / "test.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [Path(line["video"]).name for line in lines] == [f"test {number}.mp4" for number in range(5)]
    assert sum(line["label"] == line["prediction"] for line in lines) / 5 == pytest.approx(told["top1"])
    assert (output / "test_confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert evaluate.main(["--config", str(config_file), "--ema", "--output", str(output / "ema")]) == 0
    assert json.loads((output / "ema" / "test.json").read_text())["loss"] != told["loss"]

    assert train.main(["--config", str(config_file)]) == 1
    assert "is of a run before: --resume goes on with it" in capsys.readouterr().err


def test_killed_and_resumed_to_the_bit(config_file: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, with loaders of its own and an average: the same losses and weights as without it."""
    words = [
        "training.epochs=4",
        "training.save_every=3",
        "training.ema=0.9",
        "training.precision=bf16",
        "data.workers=1",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config_file, *words, f"output={whole}")
    process = subprocess.Popen(
        command(config_file, *words, f"output={cut}"), env=environment(), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (cut / "checkpoints" / "step_00000006").exists() or len(rows(cut)) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = len(rows(cut))
    assert 7 <= reached < 16
    run(config_file, *words, f"output={cut}", "--resume")
    assert rows(cut) == rows(whole)
    assert rows(cut, "validation", ("step", "loss", "top1")) == rows(whole, "validation", ("step", "loss", "top1"))
    for name in ("model.safetensors", "ema.safetensors"):
        assert (find_trained(cut, name)).read_bytes() == find_trained(whole, name).read_bytes()


@pytest.mark.parametrize("at", [3, 4])
def test_interrupted(
    at: int, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in a step, or in an epoch's last one: it is ended and saved, and the run goes on as if nothing was."""
    output = load_config(config_file).output
    assert train.main(["--config", str(config_file), f"output={output}_whole"]) == 0
    step = train._Run._train_step

    def interrupted(self: Any, number: int, batch: Any) -> Any:
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_train_step", interrupted)
        assert train.main(["--config", str(config_file)]) == train.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [path.name for path in Checkpoints(output, 2).all()] == [f"step_0000000{at}"]
    assert f"interrupted after step {at}" in capsys.readouterr().out
    assert train.main(["--config", str(config_file), "--resume"]) == 0
    assert rows(output) == rows(Path(f"{output}_whole"))
    assert len(rows(output, "validation", ("step", "loss"))) == 2
    assert rows(output, "validation", ("step", "loss")) == rows(Path(f"{output}_whole"), "validation", ("step", "loss"))


def test_stopped_by_a_scheduler(config_file: Path) -> None:
    """SIGTERM, twice and to loaders as well: a checkpoint of the step that it came in."""
    output = load_config(config_file).output
    words = ["training.epochs=200", "data.workers=1"]
    process = subprocess.Popen(
        command(config_file, *words), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (output / "train.csv").exists() or len(rows(output)) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == train.INTERRUPTED
    last = Checkpoints(output, 2).all()[-1]
    assert last.name == f"step_{int(rows(output)[-1][0]):08d}"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_are_as_one(config_file: Path, tmp_path: Path, parallel: str) -> None:
    """The same global batch gives the same losses, and a checkpoint that one process can go on from."""
    recompute = "true" if parallel == "fsdp2" else "false"
    words = ["training.ema=0.9", "training.accumulate=2", f"training.parallel={parallel}",
             f"training.recompute={recompute}"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    run(config_file, *words, f"output={one}")
    told = run(config_file, *words, f"output={two}", processes=2)
    assert f"2 x cpu, the model is {'copied' if parallel == 'ddp' else 'sharded'}" in told
    for a, b in zip(rows(one), rows(two), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=2e-4)
    for a, b in zip(rows(one, "validation", ("loss",)), rows(two, "validation", ("loss",)), strict=True):
        assert float(a[0]) == pytest.approx(float(b[0]), rel=2e-4)
    for name in ("model.safetensors", "ema.safetensors"):
        assert difference(find_trained(one, name), find_trained(two, name)) < 1e-3
    _, last = Checkpoints(two, 2).all()
    last.rename(tmp_path / "last")
    if parallel == "ddp":
        assert (
            train.main(["--config", str(config_file), *words, f"output={two}", "--resume"]) == 0
        )  # now as one process
    else:
        run(config_file, *words, f"output={two}", "--resume", processes=2)
    assert difference(tmp_path / "last" / "model.safetensors", find_trained(two)) < 1e-3


def test_second_stage(config_file: Path, tmp_path: Path) -> None:
    """A run that starts from another's weights and gives more blocks AM flow: at first it predicts the same."""
    assert train.main(["--config", str(config_file), "model.blocks=[0]"]) == 0
    first = load_config(config_file).output
    words = ["model.blocks=all", f"model.start.trained={first}", "model.start.blocks=[0]", f"output={tmp_path / 'two'}"]
    before = build_model(load_config(config_file, ["model.blocks=[0]"])).eval()
    load_trained(before, find_trained(first))
    after = build_model(load_config(config_file, words), grown=False).eval()
    clips = torch.rand(2, 3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(before(clips), after(clips))
    assert after.report is not None
    assert after.report.temporal == (0, 1)
    assert train.main(["--config", str(config_file), *words]) == 0
    assert train.main(["--config", str(config_file), *words, "training.epochs=3", "--resume"]) == 1  # another run
    assert train.main(["--config", str(config_file), *words, "data.workers=1", "--resume"]) == 0


def test_other_backbone(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of another backbone fit by name and shape, and would give wrong scores."""
    assert train.main(["--config", str(config_file), "training.epochs=1"]) == 0
    words = ["--config", str(config_file), "model.pool=avg"]
    assert evaluate.main(words) == 1
    assert "was trained on another backbone: pool None, now 'avg'" in capsys.readouterr().err
    output = load_config(config_file).output
    start = [f"model.start.trained={output}", "model.start.blocks=all", f"output={output}_2"]
    assert train.main([*words, *start]) == 1
    assert "was trained on another backbone" in capsys.readouterr().err
    torch.save([1], Checkpoints(output, 2).all()[-1] / "state.pt")
    assert train.main(["--config", str(config_file), "training.epochs=1", "--resume"]) == 1
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["k400_vitb_am12", "ssv2_vitb_am12", "smarthome_vitb_first_last"])
def test_shipped_configs_run(name: str, tmp_path: Path) -> None:
    """On made-up clips, cut down in size and depth."""
    small = ["model.img_size=28", "model.depth=2", "model.backbone=vit_small_patch14_dinov2", "data.frames=2",
             "training.batch=2", "training.epochs=1", "training.precision=fp32", f"output={tmp_path}"]  # fmt: skip
    assert train.main(["--config", name, "--synthetic", *small]) == 0
    assert len(rows(tmp_path)) == 20


def test_made_up_clips(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs without its data, and without a first stage; recomputing blocks changes no loss."""
    words = ["--config", str(config_file), "--synthetic", "data.train=/none.txt", "training.epochs=1", "data.frames=4",
             "model.start.trained=/none", "model.start.blocks=[0]"]  # fmt: skip
    assert train.main(words) == 0
    output = load_config(config_file).output
    assert "40 videos" not in capsys.readouterr().out
    assert len(rows(output)) == 20
    assert train.main(["--config", str(config_file), "training.epochs=1", "--resume"]) == 1  # with real clips
    assert "was trained on other clips" in capsys.readouterr().err
    assert train.main([*words, "training.recompute=true", f"output={output}_2"]) == 0
    for a, b in zip(rows(output), rows(Path(f"{output}_2")), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-4)


def test_videos_that_cannot_be_read(videos: Path, config_file: Path, tmp_path: Path, capsys: Any) -> None:
    """Counted, named and left out; with data.strict an error."""
    lists = []
    for split in ("train", "test"):
        broken = tmp_path / f"broken {split}.mp4"
        broken.write_text("no video")
        listed = tmp_path / f"{split}.txt"
        listed.write_text((videos / f"{split}.txt").read_text() + f"{broken} 1\n")
        lists.append(f"data.{split}={listed}")
    lists.append(f"data.validation={listed}")  # that of the test, as in the config
    words = ["--config", str(config_file), *lists, f"data.root={videos}", "training.batch=17", "training.epochs=1"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "2 videos could not be read" in out
    assert "broken train.mp4" in out
    assert evaluate.main(words) == 0
    assert "not read: " in capsys.readouterr().err
    for workers in (0, 1):
        strict = [*words, "--strict", f"data.workers={workers}", f"output={tmp_path / 'strict'}"]
        assert train.main(strict) == 1
        (told,) = capsys.readouterr().err.splitlines()
        assert "broken train.mp4" in told
    assert evaluate.main([*words, "--strict"]) == 1
    assert "broken test.mp4" in capsys.readouterr().err


# Checkpoints.


def tiny() -> VideoClassifier:
    backbone = create_backbone("vit_tiny_patch16_224", None, 32)
    backbone.blocks = backbone.blocks[:1]
    return VideoClassifier(backbone, 2, 2, bottleneck=4)


def test_no_space(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Known to be too little: an error before the first step. Run out of later: what was saved before survives."""
    full = (10**12, 10**12, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": full[2]}))
        assert train.main(["--config", str(config_file)]) == 1
    assert "are needed for checkpoints" in capsys.readouterr().err
    output = load_config(config_file).output
    assert not (output / "train.csv").exists()

    save = torch.save

    def fails(content: Any, path: Path) -> None:
        if content["step"] == 8:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(checkpoints_module.torch, "save", fails)
    assert train.main(["--config", str(config_file)]) == 1
    assert "No space left on device" in (err := capsys.readouterr().err)
    assert "the last one is" in err
    monkeypatch.undo()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000004"]
    assert train.main(["--config", str(config_file), "--resume"]) == 0


@pytest.mark.parametrize("what", ["model.safetensors", "ema.safetensors", "state.pt"])
def test_broken_checkpoints(config_file: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = load_config(config_file).output
    assert train.main(["--config", str(config_file), "--resume"]) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    words = ["--config", str(config_file), "training.epochs=1", "training.ema=0.9"]
    assert train.main(words) == 0
    assert train.main([*words, "training.lr=1", "--resume"]) == 1
    assert "is of another run: training.lr 0.001, now 1.0" in capsys.readouterr().err
    (Checkpoints(output, 2).all()[-1] / what).write_bytes(b"half")
    assert train.main([*words, "--resume"]) == 1
    assert "can't be read" in capsys.readouterr().err


def test_average() -> None:
    model = tiny()
    average = Average(model, 0.75)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update()
    with average.applied():
        for name, p in model.named_parameters():
            if name in start:
                assert torch.allclose(p, start[name] + 0.25, atol=1e-6)
    for name, p in model.named_parameters():
        if name in start:
            assert torch.equal(p, start[name] + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.batch=32"], "training.batch: expected at most the 16 videos"),
        (["training.accumulate=3"], "training.batch: expected a multiple of 1 processes times 3 parts, got 4"),
        (["model.backbone=resnet18", "model.img_size=null"], "model.backbone resnet18: "),
        (["model.backbone=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["model.depth=13"], "model.depth: expected at most 12 blocks"),
        (["model.blocks=[2]"], "blocks: expected indices from 0 to 1, got 2"),
        (["data.num_classes=1"], "label"),
        (["model.gate=am_flo"], "did you mean 'am_flow'"),
        (["data.train=/none.txt"], "none.txt"),
        (["data.kind=mmactoin"], "did you mean 'mmaction'"),
        (["model.start.trained=/none", "model.start.blocks=all"], "there is no file"),
    ],
)
def test_bad_runs(config_file: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step, in a line."""
    assert train.main(["--config", str(config_file), *changes]) == 1
    assert message in capsys.readouterr().err
    assert not (config_file.parent / "run" / "train.csv").exists()


def test_training_on_the_test_list(videos: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(config_file), f"data.test={videos / 'train.txt'}"]) == 1
    assert "videos in both lists" in capsys.readouterr().err


def test_compiled_blocks_share_a_graph(config_file: Path) -> None:
    """However many there are: one of their own each would be more than are compiled, and the rest would run eagerly."""
    from torch._dynamo.utils import counters

    config = load_config(config_file, ["training.compile=true", "model.depth=3"])
    torch._dynamo.reset()
    counters.clear()
    model = build_model(config)
    clips = torch.rand(1, 3, 3, 32, 32)
    expected = model(clips)
    compiled = distribute(model, config.training, make_accelerator("fp32"))
    found = compiled(clips)
    assert torch.allclose(found, expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the first block's input needs no gradient
    found.sum().backward()
    torch._dynamo.reset()


def test_class_without_a_test_video(videos: Path, config_file: Path, tmp_path: Path) -> None:
    """A list that names no class may end before the last one, which may still be predicted."""
    assert train.main(["--config", str(config_file), "training.epochs=1"]) == 0
    listed = tmp_path / "first.txt"
    listed.write_text("".join(f"{videos}/test {number}.mp4 0\n" for number in range(5)))
    assert evaluate.main(["--config", str(config_file), f"data.test={listed}"]) == 0
    output = load_config(config_file).output
    with (output / "test.csv").open() as file:
        assert {line["label"] for line in csv.DictReader(file)} == {"0"}


def test_rates() -> None:
    """Linear to the peak, half a cosine to 0."""
    found = [train._rate(step, 10, 4, 2.0) for step in range(1, 11)]
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[6] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert found[-1] == pytest.approx(0)
    assert train._rate(1, 2, 0, 1.0) == pytest.approx(0.5)


def test_no_videos_to_evaluate(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--config", str(config_file)]) == 1
    assert "expected a run, a checkpoint or a file" in capsys.readouterr().err
    assert evaluate.main(["--config", str(config_file), "data.test=null"]) == 1
    assert "data.test: the config has none" in capsys.readouterr().err
