"""Reading lists of videos in every format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from amflow_models.data import Video, VideoList, lists, read_list
from amflow_models.data import __main__ as command
from amflow_models.data.__main__ import main
from amflow_models.data.formats import ListFormat
from amflow_models.data.lists import FORMATS
from amflow_models.data.published import SMARTHOME_CROSS_SUBJECT, SMARTHOME_CROSS_VIEW, SMARTHOME_SPLITS
from amflow_models.training.build import read_lists
from amflow_models.training.config import Data
from list_files import write

TRAIN_PERSONS = {3, 4, 6, 7, 9, 12, 13, 15, 17, 19, 25}


def test_mmaction_lists(tmp_path: Path) -> None:
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


def test_root_starts_all_paths_in_python_and_those_in_lists_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_mmaction_lists_of_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "some/dir 163 1\nmy dir 12 0\n")
    assert read_list("mmaction_frames", path).videos == (
        Video(tmp_path / "some/dir", 1, 163),
        Video(tmp_path / "my dir", 0, 12),
    )


@pytest.mark.parametrize(("kind", "line"), [("mmaction", "a 1"), ("mmaction_frames", "a 9 1"), ("pyslowfast", "a,1")])
def test_lists_of_lines_take_the_names_of_the_frames(tmp_path: Path, kind: str, line: str) -> None:
    path = write(tmp_path / "list.txt", line)
    (video,) = read_list(kind, path, template="img_{:05}.jpg", start_index=1).videos
    assert (video.template, video.start_index) == ("img_{:05}.jpg", 1)
    (video,) = read_list(kind, path).videos
    assert (video.template, video.start_index) == (None, None)
    with pytest.raises(ValueError, match="template: expected a file name with one number"):
        read_list(kind, path, template="img_%05d.jpg")
    with pytest.raises(ValueError, match="start_index: expected a template with it"):
        read_list(kind, path, start_index=1)
    with pytest.raises(ValueError, match="template: expected none for a list of kind 'smarthome'"):
        read_list("smarthome", tmp_path, split="cross_view1/train", template="{}.jpg")
    data = Data(kind=kind, train=path, num_classes=2, frames=2, template="img_{:05}.jpg", start_index=0)
    (train,) = read_lists(SimpleNamespace(data=data), ("train",), check=False).values()
    assert (train.videos[0].template, train.videos[0].start_index) == ("img_{:05}.jpg", 0)


def test_pyslowfast_lists(tmp_path: Path) -> None:
    lines = 'a.mp4 1\nb.mp4,2\nc d.mp4, 0\n"e f.mp4" 3\n"g,h.mp4",4\ni,j.mp4,5\n'
    listed = read_list("pyslowfast", write(tmp_path / "train.csv", lines), root="/r")
    names = ["a.mp4", "b.mp4", "c d.mp4", "e f.mp4", "g,h.mp4", "i,j.mp4"]
    assert [(v.path.name, v.label) for v in listed.videos] == list(zip(names, [1, 2, 0, 3, 4, 5], strict=True))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
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
def test_errors_name_the_line(tmp_path: Path, kind: str, text: str, message: str) -> None:
    path = write(tmp_path / "list.txt", text)
    with pytest.raises(ValueError, match=r"list.txt") as error:
        read_list(kind, path)
    assert message in str(error.value)


def test_unreadable_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.txt: can't be read"):
        read_list("mmaction", tmp_path / "no.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.txt: expected text in UTF-8"):
        read_list("mmaction", tmp_path / "binary.txt")
    path = write(tmp_path / "list.txt", "a.mp4 0")
    with pytest.raises(ValueError, match=r"names.txt:2: expected the name of class 1"):
        read_list("mmaction", path, classes=write(tmp_path / "names.txt", "a\n\nb\n"))


def test_unknown_unneeded_and_missing_arguments_are_refused(tmp_path: Path) -> None:
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
    for nothing in (None, "cross_subject", "cross_subject/validation"):  # it has no validation list
        with pytest.raises(ValueError, match="split: expected one of"):
            read_list("smarthome", tmp_path, split=nothing)


LABELS = {"Pushing something from left to right": "1", "Holding something": "0"}


ENTRIES = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
    {"id": 42326, "label": "pushing a cup", "template": "Pushing [something] from left to right"},
]


def write_ssv2(folder: Path, entries: Any, labels: Any) -> tuple[Path, Path]:
    return write(folder / "train.json", json.dumps(entries)), write(folder / "labels.json", json.dumps(labels))


def test_something_something_lists(tmp_path: Path) -> None:
    path, labels = write_ssv2(tmp_path, ENTRIES, LABELS)
    listed = read_list("ssv2", path, labels=labels, root="/videos")
    assert listed.videos == (Video(Path("/videos/78687.webm"), 0), Video(Path("/videos/42326.webm"), 1))
    assert listed.classes == ("Holding something", "Pushing something from left to right")


@pytest.mark.parametrize(
    ("entries", "labels", "message"),
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
def test_something_something_errors_name_the_entry(tmp_path: Path, entries: Any, labels: Any, message: str) -> None:
    path, labels = write_ssv2(tmp_path, entries, labels)
    with pytest.raises(ValueError, match=message):
        read_list("ssv2", path, labels=labels)


def test_something_something_errors_name_the_line_of_bad_json(tmp_path: Path) -> None:
    path, labels = write_ssv2(tmp_path, ENTRIES, LABELS)
    write(path, "[\n{]")
    with pytest.raises(ValueError, match=r"train.json:2: expected JSON"):
        read_list("ssv2", path, labels=labels)


def test_smarthome_splits_are_the_published_ones(smarthome: Path) -> None:
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
    assert set(fields) == set(SMARTHOME_SPLITS)
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


def test_smarthome_classes_are_sorted_and_the_views_have_fewer() -> None:
    """Labels are positions in alphabetical order."""
    for names, count in ((SMARTHOME_CROSS_SUBJECT, 31), (SMARTHOME_CROSS_VIEW, 19)):
        assert len(set(names)) == count
        assert list(names) == sorted(names)
    assert set(SMARTHOME_CROSS_VIEW) < set(SMARTHOME_CROSS_SUBJECT)


@pytest.mark.parametrize("person", range(1, 26))
def test_smarthome_persons_are_in_one_of_both_splits(tmp_path: Path, person: int) -> None:
    (tmp_path / f"Walk_p{person:02}_r00_v01_c01.mp4").touch()
    side = "train" if person in TRAIN_PERSONS else "test"
    for part in ("train", "test"):
        videos = read_list("smarthome", tmp_path, split=f"cross_subject/{part}").videos
        assert len(videos) == (part == side)


def test_smarthome_file_names_are_checked(tmp_path: Path) -> None:
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


def test_a_list_format_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, the command and configs ask the registry, and compare no names of formats."""

    def read(given: Any) -> VideoList:
        return VideoList((Video(given.path / f"{given.split.rpartition('/')[2]}.mp4", 0),), ("walk",), str(given.path))

    monkeypatch.setitem(FORMATS, "ours", ListFormat(("root", "split"), read, names_classes=True, splits=("a/train",)))
    monkeypatch.setattr(lists, "KINDS", tuple(FORMATS))
    monkeypatch.setattr(command, "KINDS", tuple(FORMATS))
    monkeypatch.setattr(command, "_PROTOCOLS", ("a",))
    assert read_list("ours", tmp_path, split="a/train").videos[0].path == tmp_path / "train.mp4"
    with pytest.raises(ValueError, match="split: expected one of"):
        read_list("ours", tmp_path)
    (tmp_path / "train.mp4").touch()
    assert main(["check", str(tmp_path), "--kind", "ours", "--split", "a", "--quick"]) == 0
    data = Data(kind="ours", train=tmp_path, split="a", num_classes=1, frames=2)
    (train,) = read_lists(SimpleNamespace(data=data), ("train",)).values()
    assert train.classes == ("walk",)
