"""Checks of lists, and the command that runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from amflow_models.data import Video, VideoList, check_lists
from amflow_models.data.__main__ import main
from list_files import write
from PIL import Image
from video_files import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def copies(clip: Path, tmp_path: Path) -> list[Path]:
    """Four copies of a video, one of them in a folder with a space in its name."""
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "my dir/c.mp4", "d.mp4")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(clip.read_bytes())
    return paths


def listing(*videos: tuple[Path, int], classes: tuple[str, ...] = ("walk", "run")) -> VideoList:
    return VideoList(tuple(Video(path, label) for path, label in videos), classes, "made up")


def kinds(lists: dict[str, VideoList], num_classes: int = 2, **options: bool) -> dict[tuple[str, str], int]:
    """The errors of a report, and their counts."""
    report = check_lists(lists, num_classes, **options)
    return {(problem.where, problem.kind): problem.count for problem in report.problems if not problem.warning}


def test_good_lists_have_no_problems(copies: list[Path]) -> None:
    a, b, c, d = copies
    report = check_lists({"train": listing((a, 0), (b, 1), (a, 0)), "test": listing((c, 0), (d, 1))}, 2)
    assert report.problems == ()
    report.raise_for_problems()
    assert "No problems found" in str(report)


def test_labels_out_of_range_are_counted(copies: list[Path]) -> None:
    a, b, c, _ = copies
    errors = kinds({"train": listing((a, -1), (b, 2), (c, 5))})
    assert errors == {
        ("train", "labels below 0"): 1,
        ("train", "labels above 1"): 2,
        ("train", "classes without a video"): 2,
    }


def test_labels_that_count_from_one_are_recognised(copies: list[Path]) -> None:
    a, b, _, _ = copies
    with pytest.raises(ValueError, match="labels run from 1 to 2, and should from 0: subtract 1 from all"):
        check_lists({"train": listing((a, 1), (b, 2))}, 2).raise_for_problems()
    with pytest.raises(ValueError, match="above 1") as error:
        check_lists({"train": listing((a, 0), (b, 2))}, 2).raise_for_problems()
    assert "subtract" not in str(error.value)


def test_classes_without_a_video_are_errors_only_in_training_lists(copies: list[Path]) -> None:
    a, b, _, _ = copies
    report = check_lists({"train": listing((a, 0)), "test": listing((b, 0))}, 3)
    train, test = report.problems
    assert (train.where, train.count, train.cases, train.warning) == ("train", 2, ("run", "2"), False)
    assert (test.where, test.count, test.cases, test.warning) == ("test", 2, ("run", "2"), True)
    check_lists({"test": listing((b, 0))}, 3).raise_for_problems()


def test_an_empty_list_is_an_error() -> None:
    assert kinds({"train": listing()}) == {("train", "no videos in the list"): 1}


def test_missing_and_unreadable_files_are_counted(copies: list[Path], tmp_path: Path) -> None:
    a, b, c, d = copies
    b.write_text("this is no video\n" * 100)
    c.write_bytes(b"")
    d.write_bytes(d.read_bytes()[: d.stat().st_size // 2])
    lists = {"train": listing((a, 0), (b, 1), (c, 1), (d, 1), (tmp_path / "no.mp4", 1))}
    assert kinds(lists) == {("train", "videos that can't be read"): 3, ("train", "missing files"): 1}
    assert kinds(lists, open_videos=False) == {("train", "missing files"): 1}
    report = check_lists(lists, 2)
    examples = [example for problem in report.problems for example in problem.cases]
    for part in ("b.mp4: can't be read", "c.mp4: can't be read as a video (it is empty)", "no.mp4"):
        assert any(part in example for example in examples)
    assert "missing files" in str(report)


def test_folders_with_fewer_frames_than_their_list_says_are_errors(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"img_{number}.png")
    (tmp_path / "none").mkdir()

    def errors(folder: str, frames: int, **options: bool) -> dict[tuple[str, str], int]:
        return kinds({"test": VideoList((Video(tmp_path / folder, 0, frames),), ("0",), "")}, 1, **options)

    for quick in (False, True):
        assert errors("frames", 3, open_videos=not quick) == {}
        for folder in ("frames", "none"):
            short = {("test", "folders with fewer frames than the list says"): 1}
            assert errors(folder, 4, open_videos=not quick) == short
        assert errors("no", 4, open_videos=not quick) == {("test", "missing files"): 1}


def save_frames(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


@pytest.mark.parametrize("quick", [False, True])
def test_folders_with_more_frames_than_their_list_says_are_warnings(tmp_path: Path, quick: bool) -> None:
    """Pictures that do not belong to the frames do not count."""
    names = [f"img_{number:05}.png" for number in range(4)]
    save_frames(tmp_path / "a", *names, *(f"flow_x_{number:05}.png" for number in range(3)))

    def problems(frames: int, start: int | None) -> list[str]:
        video = Video(tmp_path / "a", 0, frames, "img_{:05}.png", 0, start)
        report = check_lists({"test": VideoList((video,), ("0",), "")}, 1, open_videos=not quick)
        report.raise_for_problems()
        return [str(problem) for problem in report.problems]

    assert problems(4, None) == problems(4, 0) == problems(3, 0) == problems(3, 1) == []
    assert problems(3, None) == [f"test: folders with more frames than the list says: 1 ({tmp_path / 'a'}: 4, not 3)"]


@pytest.mark.parametrize("quick", [False, True])
def test_folders_of_several_series_are_errors_without_a_template(tmp_path: Path, quick: bool) -> None:
    save_frames(tmp_path / "a", "img_1.png", "img_2.png", "flow_x_1.png", "flow_y_1.png")
    for template, errors in ((None, {("test", "videos that can't be read"): 1}), ("img_{}.png", {})):
        video = Video(tmp_path / "a", 0, 2, template)
        assert kinds({"test": VideoList((video,), ("0",), "")}, 1, open_videos=not quick) == errors


def test_classes_that_two_lists_name_differently_are_errors() -> None:
    """As where each list numbers its own classes, and one lacks a class."""
    lists = {
        name: VideoList((Video(Path(f"{name}.mp4"), 0),), classes, "")
        for name, classes in (("train", ("cut", "sit", "walk")), ("test", ("cut", "walk")), ("same", ("cut",)))
    }
    errors = {place: count for place, count in kinds(lists, 3, open_videos=False).items() if "names" in place[1]}
    assert errors == {("train, test", "classes with different names"): 1}


@pytest.mark.parametrize("quick", [False, True])
def test_empty_folders_are_errors(tmp_path: Path, quick: bool) -> None:
    save_frames(tmp_path / "a", "img_1.png")
    video = Video(tmp_path / "a", 0, None, "frame_{}.png")
    errors = kinds({"test": VideoList((video,), ("0",), "")}, 1, open_videos=not quick)
    assert errors == {("test", "videos that can't be read"): 1}


def test_the_command_takes_the_names_of_the_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_frames(tmp_path / "a", "img_1.png", "img_2.png", "flow_x_1.png")
    path = str(write(tmp_path / "list.txt", "a 2 0\n"))
    words = ["check", path, "--kind", "mmaction_frames", "--num-classes", "1"]
    assert main(words) == 1
    assert "template" in capsys.readouterr().out
    assert main([*words, "--template", "img_{}.png"]) == 0
    assert main([*words, "--template", "img_{}.png", "--start-index", "1"]) == 0
    assert main([*words, "--template", "img_{}.png", "--start-index", "2"]) == 1


def test_lists_that_share_a_file_are_errors_under_any_name(copies: list[Path], tmp_path: Path) -> None:
    a, b, c, d = copies
    link = tmp_path / "link.mp4"
    link.symlink_to(a)
    lists = {
        "train": listing((a, 0), (b, 1)),
        "validation": listing((tmp_path / "my dir" / ".." / "b.mp4", 0), (c, 1)),
        "test": listing((link, 0), (d, 1)),
    }
    assert kinds(lists) == {
        ("train, validation", "videos in both lists"): 1,
        ("train, test", "videos in both lists"): 1,
    }


def test_a_file_with_several_labels_is_an_error(copies: list[Path], tmp_path: Path) -> None:
    a, b, _, _ = copies
    link = tmp_path / "link.mp4"
    link.symlink_to(a)
    assert kinds({"train": listing((a, 0), (b, 1), (link, 1))}) == {("train", "videos with several labels"): 2}


def test_one_error_lists_all_problems(copies: list[Path], tmp_path: Path) -> None:
    a, b, _, _ = copies
    with pytest.raises(ValueError, match="3 kinds of problems") as error:
        check_lists({"train": listing((a, 0), (b, 7)), "test": listing((a, 0), (b, 1))}, 2).raise_for_problems()
    for part in ("train: labels above 1: 1", "train: classes without a video: 1 (run)", "train, test: videos in both"):
        assert part in str(error.value)


def test_the_commands_exit_status_and_output(
    copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is wrapped
    good = str(write(tmp_path / "train.txt", "a.mp4 0\nmy dir/c.mp4 1\n"))
    leaks = str(write(tmp_path / "val.txt", "a.mp4 0\nb.mp4 1\n"))
    wrong = str(write(tmp_path / "wrong.txt", "a.mp4\n"))
    check = ["check", "--kind", "mmaction", "--num-classes", "2"]
    assert main([*check, good]) == 0
    assert "No problems found" in capsys.readouterr().out
    assert main([*check, good, leaks]) == 1
    assert "videos in both lists" in capsys.readouterr().out
    assert main([*check, wrong]) == 1
    assert "wrong.txt:1: expected 'path label'" in capsys.readouterr().err
    copies[0].write_text("no video")
    assert main([*check, good]) == 1
    assert main([*check, good, "--quick"]) == 0
    names = str(write(tmp_path / "names.txt", "walk\nrun\n"))
    assert main(["check", good, "--kind", "mmaction", "--classes", names, "--quick"]) == 0


def test_the_command_writes_the_good_lines_and_the_bad_ones_with_reasons(
    copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new list is read as the old one, from its own folder or from the root; every bad name is in the file."""
    monkeypatch.setenv("COLUMNS", "300")
    copies[1].write_text("no video")
    lines = ["a.mp4 0", "b.mp4 1", "my dir/c.mp4 1", "d.mp4 7", *(f"no {number}.mp4 0" for number in range(5))]
    path = write(tmp_path / "train.txt", "\n".join(lines))
    clean, bad = tmp_path / "clean.txt", tmp_path / "clean.bad.txt"
    check = ["check", str(path), "--kind", "mmaction", "--num-classes", "2", "--write-clean", str(clean)]
    assert main(check) == 1
    assert f"{clean}: 2 good videos, kind mmaction" in capsys.readouterr().out
    assert clean.read_text() == "a.mp4 0\nmy dir/c.mp4 1\n"
    rejected = dict(line.split("\t") for line in bad.read_text().splitlines())
    assert list(rejected) == [str(tmp_path / name) for name in ("b.mp4", "d.mp4", *(f"no {n}.mp4" for n in range(5)))]
    assert rejected[str(copies[1])].startswith("videos that can't be read: can't be read as a video (Invalid data")
    assert rejected[str(copies[3])] == "labels above 1: 7"
    assert rejected[str(tmp_path / "no 4.mp4")] == "missing files"
    assert main(["check", str(clean), "--kind", "mmaction", "--num-classes", "2"]) == 0
    (tmp_path / "lists").mkdir()
    for folder, expected in (
        (tmp_path, "a.mp4 0\nmy dir/c.mp4 1\n"),
        (tmp_path / "my dir", f"{copies[0]} 0\nc.mp4 1\n"),
    ):
        videos = write(tmp_path / "absolute.txt", f"{copies[0]} 0\n{copies[2]} 1\n{copies[3]} 7\n")
        clean = tmp_path / "lists" / "clean.txt"
        main(["check", str(videos), *check[2:-1], str(clean), "--root", str(folder)])
        assert clean.read_text() == expected
    capsys.readouterr()
    for words, everything in (([], False), (["--all"], True)):
        main(["check", str(path), "--kind", "mmaction", "--num-classes", "2", *words])
        assert ("no 4.mp4" in capsys.readouterr().out) is everything


def test_a_clean_list_of_a_kind_that_names_classes_has_their_names(
    tmp_path: Path, copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copies[0].rename(tmp_path / "1.webm")
    labels = write(tmp_path / "labels.json", '{"Falling": "1", "Rising": "0"}')
    entries = write(tmp_path / "train.json", '[{"id": "1", "template": "Rising"}, {"id": "2", "template": "Falling"}]')
    clean = tmp_path / "clean.txt"
    words = ["check", str(entries), "--kind", "ssv2", "--labels", str(labels), "--write-clean", str(clean)]
    assert main(words) == 1
    assert clean.read_text() == "1.webm 0\n"
    assert (tmp_path / "clean.classes.txt").read_text() == "Rising\nFalling\n"


def test_a_clean_list_of_folders_keeps_the_numbers_of_frames(tmp_path: Path) -> None:
    for name in "ab":
        save_frames(tmp_path / name, "img_1.png", "img_2.png")
    path = write(tmp_path / "list.txt", "a 2 0\nb 3 0\n")
    clean = tmp_path / "clean.txt"
    main(["check", str(path), "--kind", "mmaction_frames", "--num-classes", "1", "--write-clean", str(clean)])
    assert clean.read_text() == "a 2 0\n"


def test_a_subset_may_lack_classes_in_training(copies: list[Path], tmp_path: Path) -> None:
    lists = {"train": listing((copies[0], 0))}
    assert kinds(lists) == {("train", "classes without a video"): 1}
    assert kinds(lists, subset=True) == {}
    path = str(write(tmp_path / "train.txt", "a.mp4 0\n"))
    words = ["check", path, "--kind", "mmaction", "--num-classes", "2"]
    assert main(words) == 1
    assert main([*words, "--subset"]) == 0


def test_the_command_accepts_several_labels_if_they_are_meant(copies: list[Path], tmp_path: Path) -> None:
    """All of them are kept in a clean list."""
    path, clean = write(tmp_path / "train.txt", "a.mp4 0,1\nno.mp4 0\n"), tmp_path / "clean.txt"
    words = ["check", str(path), "--kind", "mmaction", "--num-classes", "2", "--multi-label"]
    assert main([*words, "--write-clean", str(clean)]) == 1
    assert clean.read_text() == "a.mp4 0\na.mp4 1\n"
    words[1] = str(clean)
    assert main(words) == 0
    assert main(words[:-1]) == 1


def test_the_command_checks_all_splits_of_a_protocol(smarthome: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["check", str(smarthome), "--kind", "smarthome", "--quick", "--split"]
    assert main([*check, "cross_view2"]) == 0
    out = capsys.readouterr().out
    for part in ("cross_view2/train", "cross_view2/validation", "cross_view2/test", "for 19 classes"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["check", "LIST"], "--kind"),
        (["check", "LIST", "--kind", "mmaction"], "--num-classes"),
        (["check", "LIST", "--kind", "nonsense"], "invalid choice"),
        (["check", "none.txt", "--kind", "mmaction", "--num-classes", "2"], "there is no none.txt"),
        (["check", "LIST", "--kind", "ssv2"], "--labels"),
        (["check", "LIST", "--kind", "smarthome"], "--split"),
        (["check", "LIST", "--kind", "smarthome", "--split", "cross_view1", "--labels", "."], "no use for it"),
        (["check", "LIST", "--kind", "smarthome", "--split", "cross_view1", "--template", "{}.jpg"], "no use for it"),
        (
            ["check", "LIST", "LIST", "--kind", "mmaction", "--num-classes", "2", "--write-clean", "c"],
            "expected one list",
        ),
        (
            ["check", "LIST", "--kind", "mmaction", "--num-classes", "2", "--write-clean", "no/c"],
            "there is no folder no",
        ),
        (["check", "LIST", "--kind", "tar", "--start-index", "1"], "--start-index: --kind tar has no use for it"),
        (["check", "LIST", "--kind", "hmdb51", "--split", "cross_view1"], "--split: expected one of split1, split2"),
    ],
)
def test_wrong_usage_of_the_command_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = str(write(tmp_path / "list.txt", "a.mp4 0\n"))
    with pytest.raises(SystemExit) as status:
        main([path if argument == "LIST" else argument for argument in arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
