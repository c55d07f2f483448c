"""Loading a trained classifier, its predictions for videos and frames of any length, and `amflow predict`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from amflow_models import TrainedClassifier, evaluate, load_classifier, save_trained, train
from amflow_models.cli.main import main
from amflow_models.data import VideoFile, open_video
from amflow_models.training.checkpoints import Checkpoints
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_runs import write_config

NAMES = ("moves left", "moves right")


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config file and the run that it made, whose classes have names."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    config = write_config(videos, folder)
    words = [f"data.classes={folder / 'classes.txt'}", "training.epochs=1", "training.ema=0.5"]
    assert train.main(["--config", str(config), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(run: Path) -> TrainedClassifier:
    return load_classifier(run / "run")


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 20 frames with noise, in which every window differs."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            frame = random.integers(0, 255, (48, 64, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def test_names_of_classes_travel_with_the_checkpoint(run: Path, classifier: TrainedClassifier) -> None:
    """Also into a file of weights that is taken out of it."""
    assert classifier.classes == NAMES
    (checkpoint,) = Checkpoints(run / "run", 2).all()
    alone = run / "alone.safetensors"
    alone.write_bytes((checkpoint / "model.safetensors").read_bytes())
    for path in (checkpoint, alone):
        assert load_classifier(path).classes == NAMES


def test_the_prediction_is_that_of_the_test(run: Path, videos: Path, classifier: TrainedClassifier) -> None:
    """One window of a video as long as a training clip is what `amflow evaluate` sees."""
    words = ["--config", str(run / "config.yaml"), "evaluation.clips=1", "--output", str(run / "tested")]
    assert evaluate.main(words) == 0
    with (run / "tested" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # the list gives no names to classes, and the checkpoint does
        prediction = classifier(row["video"], window=6)
        ((name, probability),) = prediction.top(1)
        assert (name, f"{probability:.6f}") == (row["prediction"], row["probability"])
        assert row["label"] in NAMES


def test_a_list_with_other_names_than_the_checkpoint_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "other.txt").write_text("\n".join(reversed(NAMES)) + "\n")
    words = ["--config", str(run / "config.yaml"), f"data.classes={run / 'other.txt'}", "--output", str(run / "other")]
    assert evaluate.main(words) == 1
    assert "class 0 is 'moves right', and was 'moves left'" in capsys.readouterr().err
    assert not (run / "other").exists()


def test_every_form_of_frames_gives_the_same_prediction(classifier: TrainedClassifier, long_video: Path) -> None:
    with open_video(long_video) as reader:
        frames = reader.read(range(20))
    arrays = frames.permute(0, 2, 3, 1).numpy()
    expected = classifier(long_video)
    assert expected.probabilities.sum() == pytest.approx(1, abs=1e-6)
    for given in (frames, arrays, list(arrays), [Image.fromarray(array) for array in arrays], list(frames)):
        assert torch.equal(classifier(given).probabilities, expected.probabilities)


def test_windows_cover_the_video_and_their_mean_is_the_prediction(
    classifier: TrainedClassifier, long_video: Path
) -> None:
    prediction = classifier(long_video)
    assert [window.frames for window in prediction.windows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [10, 11, 12],
                                                               [13, 14, 15], [16, 17, 18]]  # fmt: skip
    mean = torch.stack([window.probabilities for window in prediction.windows]).mean(0)
    assert torch.equal(prediction.probabilities, mean)
    assert [len(window.frames) for window in classifier(long_video, window=20).windows] == [3]
    assert classifier(long_video, window=100).windows[0].frames == [8, 9, 10]


def test_a_video_that_is_shorter_than_a_clip_repeats_frames(classifier: TrainedClassifier) -> None:
    frame = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    assert classifier(frame).windows[0].frames == [0, 0, 0]


def test_uniform_sampling_sees_the_whole_video_by_default(run: Path, long_video: Path) -> None:
    classifier = load_classifier(run / "run")
    data = classifier.config.data.model_copy(update={"sampling": "uniform"})
    classifier.config = classifier.config.model_copy(update={"data": data})
    assert [window.frames for window in classifier(long_video).windows] == [[3, 10, 16]]
    assert [window.frames for window in classifier(long_video, window=10).windows] == [[1, 5, 8], [11, 15, 18]]


def test_only_one_window_of_frames_is_read_at_a_time(
    classifier: TrainedClassifier, long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    iterate = VideoFile.iterate

    def watched(self: VideoFile, indices: Any) -> Iterator[Tensor]:
        for number, frame in zip(indices, iterate(self, indices), strict=True):
            read.append(number)
            yield frame

    monkeypatch.setattr(VideoFile, "iterate", watched)
    for window in classifier.windows(long_video):
        assert read[-1] == window.frames[-1]


def test_flow_of_a_window_is_that_of_its_pairs_of_frames(classifier: TrainedClassifier, long_video: Path) -> None:
    still = torch.full((6, 3, 32, 32), 100, dtype=torch.uint8)
    (window, *_) = classifier.windows(still, flow=True)
    assert window.flow is not None
    assert window.flow.shape == (2, 2, 2)
    assert (window.flow == 0).all()
    (window, *_) = classifier.windows(long_video, flow=True)
    assert window.flow is not None
    assert (window.flow != 0).all()
    assert torch.equal(window.probabilities, classifier(long_video).windows[0].probabilities)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(4, 3, 8, 8), r"expected a tensor of RGB frames, uint8 \(N, 3, H, W\), got torch.float32"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "expected at least one frame, got none"),
        ([], "expected at least one frame, got none"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"frame 0 is uint8 \(3, 8, 8\)"),
        ([np.zeros((8, 8, 3), np.float32)] * 3, r"frame 0 is float32 \(8, 8, 3\)"),
        (Path("nowhere.mp4"), "nowhere.mp4: there is no such file"),
    ],
)
def test_what_is_no_video_is_refused(classifier: TrainedClassifier, video: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(video)


def test_wrong_arguments_are_refused(classifier: TrainedClassifier) -> None:
    with pytest.raises(TypeError, match="video: expected a path or frames, got int"):
        classifier(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        classifier("x.mp4", window=0)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        classifier(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)).top(0)


def test_loading_leaves_the_global_random_numbers_alone(run: Path) -> None:
    before = torch.get_rng_state()
    load_classifier(run / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_average_of_the_weights_is_another_classifier(run: Path, long_video: Path) -> None:
    plain, average = (load_classifier(run / "run", ema=ema) for ema in (False, True))
    assert not torch.equal(plain(long_video).probabilities, average(long_video).probabilities)


def test_the_best_checkpoint_is_taken_if_asked_for(
    run: Path, long_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is only one here, which the run marked as the best."""
    best = load_classifier(run / "run", best=True)
    assert torch.equal(best(long_video).probabilities, load_classifier(run / "run")(long_video).probabilities)
    (checkpoint,) = Checkpoints(run / "run", 2).all()
    assert main(["predict", str(checkpoint), str(long_video), "--best"]) == 1
    assert "expected a run with a best checkpoint" in capsys.readouterr().err


def test_weights_of_no_run_are_refused(run: Path, classifier: TrainedClassifier, tmp_path: Path) -> None:
    save_trained(classifier.model, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors: expected weights that `amflow train` wrote"):
        load_classifier(tmp_path / "bare.safetensors")
    (checkpoint,) = Checkpoints(run / "run", 2).all()
    odd = {"adapters": '{"classifier": []}'}
    save_file(load_file(checkpoint / "model.safetensors"), tmp_path / "odd.safetensors", odd)
    with pytest.raises(ValueError, match=r"odd\.safetensors: what it says about its classifier can't be read"):
        load_classifier(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"nowhere: expected a run, a checkpoint or a file"):
        load_classifier(tmp_path / "nowhere")


def test_a_checkpoint_of_version_0_1_has_numbers_for_names() -> None:
    loaded = load_classifier(Path(__file__).parent / "checkpoint_of_0.1")
    assert loaded.classes == tuple(str(number) for number in range(loaded.config.data.num_classes))


def test_the_command_prints_a_table_for_each_video(
    run: Path, videos: Path, long_video: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["predict", str(run / "run"), str(long_video), str(videos / "test 0.mp4"), "--top", "1"]) == 0
    out = capsys.readouterr().out
    for part in ("long.mp4, 6 windows", "test 0.mp4, 2 windows"):
        assert part in out
    assert out.count("moves") == 2
    assert out.count("%") == 2


def test_the_command_prints_json(
    run: Path, classifier: TrainedClassifier, long_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each video; one that can't be read does not stop the others."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(long_video.read_bytes()[:2000])
    assert main(["predict", str(run / "run"), str(broken), str(long_video), "--json"]) == 1
    printed = capsys.readouterr()
    bad, good = map(json.loads, printed.out.splitlines())
    assert bad["video"] == str(broken)
    assert bad["error"] in printed.err
    prediction = classifier(long_video)
    assert [(row["class"], row["probability"]) for row in good["top"]] == prediction.top(5)
    assert [(w["first_frame"], w["last_frame"]) for w in good["windows"]][-1] == (16, 18)


def test_the_command_writes_an_overlay_video(run: Path, long_video: Path, videos: Path, tmp_path: Path) -> None:
    """A frame for each frame that the model saw: the picture beside its flow."""
    path = tmp_path / "out.mp4"
    words = ["predict", str(run / "run"), str(long_video)]
    assert main([*words, "-o", str(path)]) == 0
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(256, 512, 3)] * 18
    assert frames[0][:16, :256].max() > 200  # the text
    assert main([*words, str(videos / "test 1.mp4"), "-o", str(tmp_path / "several")]) == 0
    assert sorted(p.name for p in (tmp_path / "several").iterdir()) == ["long.mp4", "test 1.mp4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{long}", "{long}", "-o", "{tmp}/out.mp4"], "--output: expected a folder for 2 videos"),
        (["{long}", "{long}", "-o", "{tmp}"], "several of the videos would be written to"),
        (["{long}", "-o", "{long}"], "is the video itself"),
        (["{long}", "-o", "{tmp}/nowhere/out.mp4"], "there is no folder"),
        (["{long}", "--weights", "no.pth"], "there is no file no.pth"),
    ],
)
def test_wrong_usage_of_the_command_is_reported_in_one_line(
    run: Path, long_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [word.format(long=long_video, tmp=tmp_path) for word in words]
    assert main(["predict", str(run / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("amflow: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_overlay_of_a_video_that_breaks_off_is_not_written(
    run: Path, long_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before stays."""
    path = tmp_path / "out.mp4"
    path.write_text("mine")
    iterate = VideoFile.iterate

    def breaking(self: VideoFile, indices: Any) -> Iterator[Tensor]:
        for number, frame in zip(indices, iterate(self, indices), strict=True):
            if number > 10:
                raise ValueError(f"{self.path}: is damaged")
            yield frame

    monkeypatch.setattr(VideoFile, "iterate", breaking)
    assert main(["predict", str(run / "run"), str(long_video), "-o", str(path)]) == 1
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
