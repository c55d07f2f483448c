"""Lists that are made of a folder of videos, and the command that makes them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from amflow_models.data import Video, read_list
from amflow_models.data.__main__ import main
from amflow_models.data.making import list_folder, split_videos, write_list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten videos of class "run", five of class "walk on", one of class "fall"; nothing looks into them."""
    folder = tmp_path / "videos"
    touch(folder, *(f"run/{number}.mp4" for number in range(10)), *(f"walk on/{number}.avi" for number in range(5)))
    touch(folder, "fall/only one.webm")
    return folder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def read(path: Path) -> list[tuple[str, int]]:
    """The names and labels in a list, as the reader finds them."""
    listed = read_list("mmaction", path)
    return [(str(video.path.relative_to(path.parent)), video.label) for video in listed.videos]


def test_a_list_has_all_videos_with_the_number_of_their_folder(folder: Path, tmp_path: Path) -> None:
    assert main(["list", str(folder), "-o", str(tmp_path / "train.txt")]) == 0
    assert read(tmp_path / "train.txt") == [
        ("videos/fall/only one.webm", 0),
        *((f"videos/run/{number}.mp4", 1) for number in range(10)),
        *((f"videos/walk on/{number}.avi", 2) for number in range(5)),
    ]
    assert (tmp_path / "classes.txt").read_text() == "fall\nrun\nwalk on\n"


def test_videos_elsewhere_have_absolute_paths(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    assert main(["list", str(folder), "-o", str(tmp_path / "lists" / "train.txt")]) == 0
    assert (tmp_path / "lists" / "train.txt").read_text().startswith(f"{folder}/fall/only one.webm 0\n")


def test_what_is_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files by their suffixes, folders of pictures, in subfolders too; other files are counted."""
    folder = tmp_path / "videos"
    touch(folder, "a/x.MP4", "a/deep/er/y.mkv", "a/._x.MP4", "a/notes.txt", "a/.DS_Store", "a/deep/thumbnail.jpg",
          "b/frames/img_1.jpg", "b/frames/img_2.jpg", "b/readme", ".hidden/z.mp4", "__MACOSX/a.mp4",
          "stray.mp4")  # fmt: skip
    (folder / "a" / "circle").symlink_to(folder / "a")
    found = list_folder(folder)
    names = [str(video.path.relative_to(folder)) for video in found.videos]
    assert names == ["a/deep/er/y.mkv", "a/x.MP4", "b/frames"]
    assert found.classes == ("a", "b")
    assert found.others == Counter({"._*": 1, ".txt": 1, ".jpg": 1, ".*": 1, "without suffix": 1,
                                    "in no folder of a class, .mp4": 1})  # fmt: skip
    assert main(["list", str(folder), "-o", str(tmp_path / "train.txt")]) == 0
    assert "left out, as no videos: .* (1), ._* (1), .jpg (1), .txt (1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([0.2], {1: [8, 2], 2: [4, 1], 0: [1, 0]}),
        ([0.01], {1: [9, 1], 2: [4, 1], 0: [1, 0]}),
        ([0.2, 0.3], {1: [5, 2, 3], 2: [2, 1, 2], 0: [1, 0, 0]}),
        ([0.49, 0.5], {1: [1, 4, 5], 2: [1, 2, 2], 0: [1, 0, 0]}),
    ],
)
def test_every_class_is_divided_alike(folder: Path, shares: list[float], counts: dict[int, list[int]]) -> None:
    """Each part has at least one video of a class if it has enough, and the first part always has one."""
    videos = list_folder(folder).videos
    parts = split_videos(videos, shares, folder, 0)
    assert sorted((video for part in parts for video in part), key=videos.index) == list(videos)
    for label, expected in counts.items():
        assert [sum(video.label == label for video in part) for part in parts] == expected


def test_a_division_is_reproducible_wherever_the_folder_is(folder: Path, tmp_path: Path) -> None:
    def validation(root: Path, seed: int) -> list[str]:
        parts = split_videos(list_folder(root).videos, [0.3], root, seed)
        return [str(video.path.relative_to(root)) for video in parts[1]]

    first = validation(folder, 0)
    assert validation(folder, 0) == first
    assert validation(folder, 1) != first
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert validation(moved, 0) == first


def test_a_division_into_no_share_or_all_is_refused(folder: Path) -> None:
    for shares in ([0.0], [1.0], [0.5, 0.5]):
        with pytest.raises(ValueError, match="shares: expected shares above 0, below 1 together"):
            split_videos(list_folder(folder).videos, shares, folder, 0)


def test_the_parts_are_written_beside_the_list(folder: Path, tmp_path: Path) -> None:
    assert main(["list", str(folder), "-o", str(tmp_path / "train.txt"), "--split", "0.2", "0.2"]) == 0
    lists = [read(tmp_path / name) for name in ("train.txt", "validation.txt", "test.txt")]
    assert [len(part) for part in lists] == [10, 3, 3]
    assert len({name for part in lists for name, _ in part}) == 16


def test_lists_beside_each_other_have_the_same_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second folder that lacks a class would number the others anew."""
    touch(tmp_path / "more", "run/1.mp4", "walk on/2.mp4")
    assert main(["list", str(folder), "-o", str(tmp_path / "train.txt")]) == 0
    words = ["list", str(tmp_path / "more"), "-o", str(tmp_path / "validation.txt")]
    assert main(words) == 1
    assert "classes.txt: names other classes" in capsys.readouterr().err
    assert not (tmp_path / "validation.txt").exists()
    assert main([*words, "--classes", str(tmp_path / "classes.txt")]) == 0
    assert [label for _, label in read(tmp_path / "validation.txt")] == [1, 2]
    touch(tmp_path / "more", "runn/3.mp4")
    assert main([*words, "--classes", str(tmp_path / "classes.txt")]) == 1
    assert "the given classes have no 'runn'; did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected a folder for each class in it, found no folders"),
        (["a.mp4"], "expected a folder for each class in it, found no folders"),
        (["a/x.mp4", "b/notes.txt"], "b: expected videos of this class, found none"),
        (["train/a/x.mp4", "val/a/y.mp4"], "expected folders of classes, found train, val"),
        (["a/x\n.mp4"], "a name with line breaks"),
        ([" a/x.mp4"], "spaces at its ends"),
    ],
)
def test_folders_that_give_no_list_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    touch(folder, *names)
    assert main(["list", str(folder), "-o", str(tmp_path / "train.txt")]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name == "train.txt"] == []


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this name is not UTF-8"):
        write_list(tmp_path / "train.txt", [Video(tmp_path / os.fsdecode(b"\xff.mp4"), 0)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "{tmp}/train.txt", "--split", "1"], "--split: expected a share between 0 and 1, got '1'"),
        (["-o", "{tmp}/train.txt", "--split", ".1", ".1", ".1"], "--split: expected one share for validation"),
        (["-o", "{tmp}/validation.txt", "--split", ".1"], "validation.txt is another file that is written"),
        (["-o", "{tmp}/no/train.txt"], "there is no folder"),
        ([], "-o/--output"),
    ],
)
def test_wrong_usage_is_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["list", str(folder), *(word.format(tmp=tmp_path) for word in words)])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
