"""Lists of videos, and the checks of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from amflow_models.data import SPLITS, Video, VideoList, check_lists, read_list
from amflow_models.data.__main__ import main
from amflow_models.data.lists import SMARTHOME_CROSS_SUBJECT, SMARTHOME_CROSS_VIEW
from PIL import Image

TRAIN_PERSONS = {3, 4, 6, 7, 9, 12, 13, 15, 17, 19, 25}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path


# Reading.


def test_mmaction(tmp_path: Path) -> None:
    names = write(tmp_path / "names.txt", "abseiling\nair drumming\n")
    path = write(tmp_path / "list.txt", "a.mp4 1\r\n\nwith space/b c.mp4   0\n/elsewhere/d.mp4\t1")
    listed = read_list("mmaction", path, classes=names)
    assert listed == VideoList(
        (
            Video(tmp_path / "a.mp4", 1),
            Video(tmp_path / "with space/b c.mp4", 0),
            Video(Path("/elsewhere/d.mp4"), 1),
        ),
        ("abseiling", "air drumming"),
        str(path),
    )
    moved = read_list("mmaction", str(path), root="/data")
    assert [str(v.path) for v in moved.videos] == ["/data/a.mp4", "/data/with space/b c.mp4", "/elsewhere/d.mp4"]
    assert moved.classes == ("0", "1")


def test_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All relative paths start from it; on the command line only those in lists do."""
    write(tmp_path / "names.txt", "walk")
    write(tmp_path / "list.txt", "a.mp4 0")
    (tmp_path / "mp4").mkdir()
    (tmp_path / "mp4/Walk_p03_r00_v01_c01.mp4").touch()
    listed = read_list("mmaction", "list.txt", root=tmp_path, classes="names.txt")
    assert (listed.videos[0].path, listed.classes) == (tmp_path / "a.mp4", ("walk",))
    assert len(read_list("smarthome", "mp4", root=tmp_path, split="cross_view1/train").videos) == 1
    write(tmp_path / "elsewhere/a.mp4", "")
    monkeypatch.chdir(tmp_path)
    assert (
        main(["check", "list.txt", "--kind", "mmaction", "--classes", "names.txt", "--root", "elsewhere", "--quick"])
        == 0
    )
    assert main(["check", "list.txt", "--kind", "mmaction", "--classes", "names.txt", "--quick"]) == 1
    assert "missing files" in capsys.readouterr().out


def test_mmaction_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "some/dir 163 1\nmy dir 12 0\n")
    assert read_list("mmaction_frames", path).videos == (
        Video(tmp_path / "some/dir", 1, 163),
        Video(tmp_path / "my dir", 0, 12),
    )


def test_pyslowfast(tmp_path: Path) -> None:
    lines = 'a.mp4 1\nb.mp4,2\nc d.mp4, 0\n"e f.mp4" 3\n"g,h.mp4",4\ni,j.mp4,5\n'
    listed = read_list("pyslowfast", write(tmp_path / "train.csv", lines), root="/r")
    names = ["a.mp4", "b.mp4", "c d.mp4", "e f.mp4", "g,h.mp4", "i,j.mp4"]
    assert [(v.path.name, v.label) for v in listed.videos] == list(zip(names, [1, 2, 0, 3, 4, 5], strict=True))


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("mmaction", "a.mp4 0\nb.mp4\n", "list.txt:2: expected 'path label', got 'b.mp4'"),
        ("mmaction", "a.mp4 0\n\nb.mp4 walk\n", "list.txt:3: label: expected a whole number, got 'walk'"),
        ("mmaction", "a.mp4 1.5", "list.txt:1: label: expected a whole number, got '1.5'"),
        ("mmaction_frames", "dir 12", "list.txt:1: expected 'folder total_frames label'"),
        ("mmaction_frames", "dir x 12", "list.txt:1: total_frames: expected a whole number, got 'x'"),
        ("mmaction_frames", "dir 0 1", "list.txt:1: total_frames: expected at least 1, got 0"),
        ("pyslowfast", "path,label\na.mp4,1", "list.txt:1: label: expected a whole number, got 'label'"),
    ],
)
def test_bad_lines(tmp_path: Path, kind: str, text: str, told: str) -> None:
    path = write(tmp_path / "list.txt", text)
    with pytest.raises(ValueError, match=r"list.txt") as error:
        read_list(kind, path)
    assert told in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.txt: can't be read"):
        read_list("mmaction", tmp_path / "no.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.txt: expected text in UTF-8"):
        read_list("mmaction", tmp_path / "binary.txt")
    path = write(tmp_path / "list.txt", "a.mp4 0")
    with pytest.raises(ValueError, match=r"names.txt:2: expected the name of class 1"):
        read_list("mmaction", path, classes=write(tmp_path / "names.txt", "a\n\nb\n"))


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "a.mp4 0")
    with pytest.raises(ValueError, match=r"kind: .*did you mean 'mmaction'"):
        read_list("mmacton", path)
    with pytest.raises(
        ValueError, match="split: expected none for a list of kind 'mmaction', got 'cross_subject/test'"
    ):
        read_list("mmaction", path, split="cross_subject/test")
    with pytest.raises(ValueError, match="labels: expected the JSON file"):
        read_list("ssv2", path)
    with pytest.raises(ValueError, match=r"split: .*did you mean 'cross_subject/test'"):
        read_list("smarthome", tmp_path, split="cross_subjekt/test")
    for nothing in (None, "cross_subject", "cross_subject/validation"):  # all its persons train or test
        with pytest.raises(ValueError, match="split: expected one of"):
            read_list("smarthome", tmp_path, split=nothing)


# Something-Something v2.

LABELS = {"Pushing something from left to right": "1", "Holding something": "0"}
ENTRIES = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
    {"id": 42326, "label": "pushing a cup", "template": "Pushing [something] from left to right"},
]


def write_ssv2(folder: Path, entries: Any, labels: Any) -> tuple[Path, Path]:
    return write(folder / "train.json", json.dumps(entries)), write(folder / "labels.json", json.dumps(labels))


def test_ssv2(tmp_path: Path) -> None:
    path, labels = write_ssv2(tmp_path, ENTRIES, LABELS)
    listed = read_list("ssv2", path, labels=labels, root="/videos")
    assert listed.videos == (Video(Path("/videos/78687.webm"), 0), Video(Path("/videos/42326.webm"), 1))
    assert listed.classes == ("Holding something", "Pushing something from left to right")


@pytest.mark.parametrize(
    ("entries", "labels", "told"),
    [
        (
            [ENTRIES[0], {"id": "7", "template": "Pushing [something] from left to rigth"}],
            LABELS,
            "train.json: entry 2, id 7: expected a template of .*, got 'Pushing something from left to rigth'; "
            "did you mean 'Pushing something from left to right'",
        ),
        ([{"id": "7"}], LABELS, "entry 1, id 7: expected a 'template', got none: the test split"),
        (["7"], LABELS, "train.json: entry 1: expected an object with 'id' and 'template', got '7'"),
        ({"a": 1}, LABELS, "train.json: expected a list of videos, got dict"),
        (ENTRIES, ["a"], "labels.json: expected templates and their numbers, got list"),
        (ENTRIES, {"a": "0", "b": "2"}, "labels.json: expected each number from 0 to 1 once"),
        (ENTRIES, {"a": "x"}, "labels.json: 'a': expected a whole number, got 'x'"),
    ],
)
def test_ssv2_mismatches(tmp_path: Path, entries: Any, labels: Any, told: str) -> None:
    path, labels = write_ssv2(tmp_path, entries, labels)
    with pytest.raises(ValueError, match=told):
        read_list("ssv2", path, labels=labels)


def test_ssv2_is_no_json(tmp_path: Path) -> None:
    path, labels = write_ssv2(tmp_path, ENTRIES, LABELS)
    write(path, "[\n{]")
    with pytest.raises(ValueError, match=r"train.json:2: expected JSON"):
        read_list("ssv2", path, labels=labels)


# Toyota Smarthome.


@pytest.fixture
def smarthome(tmp_path: Path) -> Path:
    """A clip of every activity by every person in front of every camera."""
    for activity in (*SMARTHOME_CROSS_SUBJECT, "Pour.Fromcup"):
        for person in (2, 3, 19, 20, 25):
            for camera in range(1, 8):
                (tmp_path / f"{activity}_p{person:02}_r00_v02_c{camera:02}.mp4").touch()
    write(tmp_path / "README.txt", "not a clip")
    return tmp_path


def test_smarthome(smarthome: Path) -> None:
    fields = {
        "cross_subject/train": ({3, 19, 25}, set(range(1, 8)), 31),
        "cross_subject/test": ({2, 20}, set(range(1, 8)), 31),
        "cross_view1/train": ({2, 3, 19, 20, 25}, {1}, 19),
        "cross_view1/validation": ({2, 3, 19, 20, 25}, {5}, 19),
        "cross_view1/test": ({2, 3, 19, 20, 25}, {2}, 19),
        "cross_view2/train": ({2, 3, 19, 20, 25}, {1, 3, 4, 6, 7}, 19),
        "cross_view2/validation": ({2, 3, 19, 20, 25}, {5}, 19),
        "cross_view2/test": ({2, 3, 19, 20, 25}, {2}, 19),
    }
    assert set(fields) == set(SPLITS)
    for split, (persons, cameras, count) in fields.items():
        listed = read_list("smarthome", smarthome, split=split)
        expected = {
            (activity, person, camera) for activity in listed.classes for person in persons for camera in cameras
        }
        found = []
        for video in listed.videos:
            activity, person, _, _, camera = video.path.stem.split("_")
            assert listed.classes[video.label] == activity
            found.append((activity, int(person[1:]), int(camera[1:])))
        assert len(listed.classes) == count
        assert len(found) == len(expected)
        assert set(found) == expected


def test_smarthome_classes() -> None:
    """Both in alphabetical order, which makes their numbers; the views see a part of the activities."""
    for names, count in ((SMARTHOME_CROSS_SUBJECT, 31), (SMARTHOME_CROSS_VIEW, 19)):
        assert len(set(names)) == count
        assert list(names) == sorted(names)
    assert set(SMARTHOME_CROSS_VIEW) < set(SMARTHOME_CROSS_SUBJECT)


@pytest.mark.parametrize("person", range(1, 26))
def test_smarthome_persons(tmp_path: Path, person: int) -> None:
    (tmp_path / f"Walk_p{person:02}_r00_v01_c01.mp4").touch()
    side = "train" if person in TRAIN_PERSONS else "test"
    for part in ("train", "test"):
        videos = read_list("smarthome", tmp_path, split=f"cross_subject/{part}").videos
        assert len(videos) == (part == side)


def test_smarthome_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder with clips like"):
        read_list("smarthome", tmp_path, split="cross_view1/test")
    for name in ("Walk_p03_r00_c03.mp4", "Walk_p03_r00_v02_c03 copy.mp4", "Walk_pxx_r00_v02_c03.mp4"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name}: expected a name like Cook.Cut_p03_r00_v02_c03.mp4"):
            read_list("smarthome", tmp_path, split="cross_view1/test")
        (tmp_path / name).unlink()
    (tmp_path / "Cook.Cutt_p03_r00_v02_c03.mp4").touch()
    with pytest.raises(ValueError, match=r"activity: .*did you mean 'Cook.Cut'"):
        read_list("smarthome", tmp_path, split="cross_view1/test")


# Checks.


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def copies(clip: Path, tmp_path: Path) -> Iterator[list[Path]]:
    """Four files with a video, one in a folder with a space in its name."""
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "my dir/c.mp4", "d.mp4")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(clip.read_bytes())
    return paths


def listing(*videos: tuple[Path, int], classes: tuple[str, ...] = ("walk", "run")) -> VideoList:
    return VideoList(tuple(Video(path, label) for path, label in videos), classes, "made up")


def kinds(lists: dict[str, VideoList], num_classes: int = 2, **options: bool) -> dict[tuple[str, str], int]:
    """Errors found, and how often."""
    report = check_lists(lists, num_classes, **options)
    return {(problem.where, problem.kind): problem.count for problem in report.problems if not problem.warning}


def test_no_problems(copies: list[Path]) -> None:
    a, b, c, d = copies
    report = check_lists({"train": listing((a, 0), (b, 1), (a, 0)), "test": listing((c, 0), (d, 1))}, 2)
    assert report.problems == ()
    report.raise_for_problems()
    assert "No problems found" in str(report)


def test_labels_out_of_range(copies: list[Path]) -> None:
    a, b, c, _ = copies
    found = kinds({"train": listing((a, -1), (b, 2), (c, 5))})
    assert found == {
        ("train", "labels below 0"): 1,
        ("train", "labels above 1"): 2,
        ("train", "classes without a video"): 2,
    }


def test_labels_from_one(copies: list[Path]) -> None:
    a, b, _, _ = copies
    with pytest.raises(ValueError, match="labels run from 1 to 2, and should from 0: subtract 1 from all"):
        check_lists({"train": listing((a, 1), (b, 2))}, 2).raise_for_problems()
    with pytest.raises(ValueError, match="above 1") as error:
        check_lists({"train": listing((a, 0), (b, 2))}, 2).raise_for_problems()
    assert "subtract" not in str(error.value)


def test_classes_without_a_video(copies: list[Path]) -> None:
    a, b, _, _ = copies
    report = check_lists({"train": listing((a, 0)), "test": listing((b, 0))}, 3)
    train, test = report.problems
    assert (train.where, train.count, train.examples, train.warning) == ("train", 2, ("run", "2"), False)
    assert (test.where, test.count, test.examples, test.warning) == ("test", 2, ("run", "2"), True)
    check_lists({"test": listing((b, 0))}, 3).raise_for_problems()


def test_empty_list() -> None:
    assert kinds({"train": listing()}) == {("train", "no videos in the list"): 1}


def test_files(copies: list[Path], tmp_path: Path) -> None:
    a, b, c, d = copies
    b.write_text("this is no video\n" * 100)
    c.write_bytes(b"")
    d.write_bytes(d.read_bytes()[: d.stat().st_size // 2])
    lists = {"train": listing((a, 0), (b, 1), (c, 1), (d, 1), (tmp_path / "no.mp4", 1))}
    assert kinds(lists) == {("train", "videos that can't be read"): 3, ("train", "missing files"): 1}
    assert kinds(lists, open_videos=False) == {("train", "missing files"): 1}
    told = str(check_lists(lists, 2))
    for part in ("b.mp4", "it is empty", "no.mp4"):
        assert part in told.replace("\n", "")


def test_folders(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"img_{number}.png")
    (tmp_path / "none").mkdir()

    def of(folder: str, frames: int, **options: bool) -> dict[tuple[str, str], int]:
        return kinds({"test": VideoList((Video(tmp_path / folder, 0, frames),), ("0",), "")}, 1, **options)

    for quick in (False, True):
        assert of("frames", 3, open_videos=not quick) == {}
        for folder in ("frames", "none"):
            short = {("test", "folders with fewer frames than the list says"): 1}
            assert of(folder, 4, open_videos=not quick) == short
        assert of("no", 4, open_videos=not quick) == {("test", "missing files"): 1}


def test_shared_videos(copies: list[Path], tmp_path: Path) -> None:
    """By the file that a path leads to, whatever it is called."""
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


def test_several_labels(copies: list[Path], tmp_path: Path) -> None:
    a, b, _, _ = copies
    link = tmp_path / "link.mp4"
    link.symlink_to(a)
    assert kinds({"train": listing((a, 0), (b, 1), (link, 1))}) == {("train", "videos with several labels"): 1}


def test_all_problems_at_once(copies: list[Path], tmp_path: Path) -> None:
    a, b, _, _ = copies
    with pytest.raises(ValueError, match="3 kinds of problems") as error:
        check_lists({"train": listing((a, 0), (b, 7)), "test": listing((a, 0), (b, 1))}, 2).raise_for_problems()
    for part in ("train: labels above 1: 1", "train: classes without a video: 1 (run)", "train, test: videos in both"):
        assert part in str(error.value)


# The command.


def test_command(
    copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
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


def test_command_smarthome(smarthome: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["check", str(smarthome), "--kind", "smarthome", "--quick", "--split"]
    assert main([*check, "cross_view2"]) == 0
    told = capsys.readouterr().out
    for part in ("cross_view2/train", "cross_view2/validation", "cross_view2/test", "for 19 classes"):
        assert part in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required"),
        (["check", "LIST"], "--kind"),
        (["check", "LIST", "--kind", "mmaction"], "--num-classes"),
        (["check", "LIST", "--kind", "nonsense"], "invalid choice"),
        (["check", "none.txt", "--kind", "mmaction", "--num-classes", "2"], "there is no none.txt"),
        (["check", "LIST", "--kind", "ssv2"], "--labels"),
        (["check", "LIST", "--kind", "smarthome"], "--split"),
        (["check", "LIST", "--kind", "smarthome", "--split", "cross_view1", "--labels", "."], "no use for it"),
    ],
)
def test_command_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    path = str(write(tmp_path / "list.txt", "a.mp4 0\n"))
    with pytest.raises(SystemExit) as status:
        main([path if argument == "LIST" else argument for argument in arguments])
    assert status.value.code == 2
    assert told in capsys.readouterr().err
