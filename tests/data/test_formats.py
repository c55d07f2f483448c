"""Reading data sets as they are found on disk, each from a small tree that is made up."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from amflow_models.data import UnreadableVideo, Video, VideoDataset, VideoList, check_lists, open_video, read_list
from amflow_models.data.__main__ import main
from amflow_models.data.video import open_listed
from amflow_models.data.videos import Videos
from amflow_models.training.loading import EvaluationBatches, TrainBatches, loader
from list_files import write
from PIL import Image
from video_files import decode_all, write_video


def touch(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name, "")


def found(listed: VideoList, folder: Path) -> list[tuple[str, int]]:
    """Paths below a folder, and labels."""
    return [(video.path.relative_to(folder).as_posix(), video.label) for video in listed.videos]


# Folders of frames


def save_frames(folder: Path, first: int, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        Image.new("L", (8, 8), 10 * number).save(folder / f"img_{number:05}.png")


@pytest.mark.parametrize("first", [0, 1])
def test_parts_of_folders_start_at_the_number_of_frames_before_them(tmp_path: Path, first: int) -> None:
    """Whether the names count from 0 or 1."""
    save_frames(tmp_path / "long video", first, 10)
    path = write(tmp_path / "list.txt", "long video 0 4 1\nlong video 6 4 0\n")
    listed = read_list("mmaction_frames_offset", path, template="img_{:05}.png", start_index=first)
    assert listed.videos == (
        Video(tmp_path / "long video", 1, 4, "img_{:05}.png", first, 0),
        Video(tmp_path / "long video", 0, 4, "img_{:05}.png", first, 6),
    )
    assert not check_lists({"test": listed}, 2).problems
    for train in (False, True):
        dataset = VideoDataset(
            listed, frames=4, size=8, train=train, sampling="dense", stride=1, augment=False, scale=(1, 1)
        )
        shades = [dataset[0, index]["clips"][0, :, 0, 4, 4].tolist() for index in range(2)]
        assert shades == [[10 * (first + start + t) for t in range(4)] for start in (0, 6)]


def test_parts_beyond_the_end_of_their_folder_are_errors(tmp_path: Path) -> None:
    """As where starts count from 1."""
    save_frames(tmp_path / "a", 1, 10)
    listed = read_list("mmaction_frames_offset", write(tmp_path / "list.txt", "a 1 10 0\n"))
    with pytest.raises(UnreadableVideo, match="says 10 from frame 1 on; starts count from 0, do those of the list"):
        VideoDataset(listed, frames=2, size=8, train=False, strict=True)[0, 0]
    (problem,) = check_lists({"test": listed}, 1).problems
    assert "has 10 frames, and its list says 10 from frame 1 on" in problem.cases[0]
    assert not problem.warning


@pytest.mark.parametrize(("first", "start_index"), [(0, 1), (1, 0)])
def test_a_start_index_that_is_off_by_one_is_an_error(tmp_path: Path, first: int, start_index: int) -> None:
    """With 1 for frames from 0, the first frame would be left out."""
    save_frames(tmp_path / "a", first, 5)
    with pytest.raises(UnreadableVideo, match=f"start_index: expected the first frame img_0000{start_index}.png"):
        open_video(tmp_path / "a", "img_{:05}.png", start_index)


# Kinetics

CSV = """label,youtube_id,time_start,time_end,split,is_cc
walking the dog,-abc_defghi,8,18,train,0
"answering, questions",QqR3tEXt_00,0,10,train,0
walking the dog,zzzzzzzzzzz,118,128,train,0
"""
KINETICS: dict[str, list[str]] = {
    "class folders": [
        "walking the dog/-abc_defghi_000008_000018.mp4",
        "answering, questions/QqR3tEXt_00_000000_000010.mp4",
        "walking the dog/zzzzzzzzzzz_000118_000128.mp4",
    ],
    "one folder": [
        "-abc_defghi_000008_000018.mp4",
        "QqR3tEXt_00_000000_000010.mkv",
        "zzzzzzzzzzz_000118_000128.webm",
    ],
    "splits, without times": ["train/-abc_defghi.mp4", "train/QqR3tEXt_00.mp4", "train/zzzzzzzzzzz.mp4"],
}


@pytest.mark.parametrize("layout", KINETICS)
def test_kinetics_csv_finds_videos_in_every_layout(tmp_path: Path, layout: str) -> None:
    touch(tmp_path / "videos", *KINETICS[layout], "train/._-abc_defghi.mp4", "other/not_listed_0.mp4", "notes.txt")
    listed = read_list("kinetics", write(tmp_path / "train.csv", CSV), root=tmp_path / "videos")
    assert found(listed, tmp_path / "videos") == list(zip(KINETICS[layout], [1, 0, 1], strict=True))
    assert listed.classes == ("answering, questions", "walking the dog")
    assert listed.ignored == 1


def test_kinetics_videos_that_are_missing_are_named_where_they_are_expected(tmp_path: Path) -> None:
    names = write(tmp_path / "label_map.txt", "walking the dog\nyawning\nanswering, questions\n")
    touch(tmp_path, KINETICS["class folders"][0])
    listed = read_list("kinetics", write(tmp_path / "train.csv", CSV), classes=names)
    assert found(listed, tmp_path) == list(zip(KINETICS["class folders"], [0, 2, 0], strict=True))
    problems = {
        problem.kind: problem.count for problem in check_lists({"train": listed}, 3, open_videos=False).problems
    }
    assert problems == {"missing files": 2, "classes without a video": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV.replace("label,", "name,"), "train.csv: expected a column 'label', got none: test splits"),
        (CSV.replace("time_end", "end"), "train.csv: expected the columns label,youtube_id,time_start,time_end, got"),
        (CSV.replace("118", "1.5"), "train.csv:4: time_start: expected a whole number, got '1.5'"),
        (CSV + "yawning,abc\n", "train.csv:5: expected label,youtube_id,.*, got 'yawning,abc'"),
    ],
)
def test_kinetics_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "train.csv", text)
    with pytest.raises(ValueError, match=message):
        read_list("kinetics", path)


def test_kinetics_videos_with_two_files_and_unknown_classes_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", CSV)
    touch(tmp_path, KINETICS["class folders"][0], f"replacement/{KINETICS['one folder'][0]}")
    with pytest.raises(ValueError, match=r"train.csv:2: expected one file of this video below .*replacement.*walking"):
        read_list("kinetics", path)
    with pytest.raises(ValueError, match=r"train.csv:2: label: .*did you mean 'walking a dog'"):
        read_list("kinetics", path, classes=write(tmp_path / "map.txt", "walking a dog\nanswering, questions\n"))
    with pytest.raises(ValueError, match="root: expected the folder of the videos, there is no"):
        read_list("kinetics", path, root=tmp_path / "nowhere")


# UCF-101 and HMDB-51

CLASSES = "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n"


def test_ucf101_splits(tmp_path: Path) -> None:
    """Only the training lists have numbers, from 1."""
    labels = write(tmp_path / "classInd.txt", CLASSES)
    train = write(tmp_path / "trainlist01.txt", "ApplyEyeMakeup/v_a_g08_c01.avi 1\r\nHandstandPushups/v_b.avi 2\r\n")
    test = write(tmp_path / "testlist01.txt", "HandstandPushups/v_c_g01_c01.avi\r\n\r\nApplyEyeMakeup/._v_d.avi\n")
    listed = read_list("ucf101", train, labels=labels, root=tmp_path / "UCF-101")
    assert found(listed, tmp_path / "UCF-101") == [
        ("ApplyEyeMakeup/v_a_g08_c01.avi", 0),
        ("HandstandPushups/v_b.avi", 1),
    ]
    assert listed.classes == ("ApplyEyeMakeup", "HandstandPushups")
    tested = read_list("ucf101", test, labels=labels)
    assert (found(tested, tmp_path), tested.ignored) == ([("HandstandPushups/v_c_g01_c01.avi", 1)], 1)


@pytest.mark.parametrize(
    ("line", "classes", "message"),
    [
        ("ApplyEyeMakeup/a.avi 2", CLASSES, r"list.txt:1: expected the number 1 of .*classInd.txt, got 2"),
        ("ApplyEyeMakup/a.avi 1", CLASSES, r"list.txt:1: class: .*did you mean 'ApplyEyeMakeup'"),
        ("a.avi 1", CLASSES, r"list.txt:1: expected 'class/video' or 'class/video number', got 'a.avi 1'"),
        ("ApplyEyeMakeup/a.avi", "0 ApplyEyeMakeup\n", r"classInd.txt:1: expected '1 name', got '0 ApplyEyeMakeup'"),
    ],
)
def test_ucf101_errors_name_the_line(tmp_path: Path, line: str, classes: str, message: str) -> None:
    labels = write(tmp_path / "classInd.txt", classes)
    with pytest.raises(ValueError, match=message):
        read_list("ucf101", write(tmp_path / "list.txt", line), labels=labels)


def write_hmdb51(folder: Path) -> None:
    for split in (1, 2):
        write(
            folder / f"brush_hair_test_split{split}.txt",
            f"A & B_f_nm_1.avi {split} \nb(2).avi 0 \nc.avi {3 - split} \n",
        )
        write(folder / f"wave_test_split{split}.txt", f"d.avi {split} \n")
        write(folder / f"._wave_test_split{split}.txt", "\0\0")


def test_hmdb51_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hmdb51(tmp_path / "splits")
    parts = {
        "split1/train": [("brush_hair/A & B_f_nm_1.avi", 0), ("wave/d.avi", 1)],
        "split1/test": [("brush_hair/c.avi", 0)],
        "split2/train": [("brush_hair/c.avi", 0)],
        "split2/test": [("brush_hair/A & B_f_nm_1.avi", 0), ("wave/d.avi", 1)],
    }
    for split, expected in parts.items():
        listed = read_list("hmdb51", tmp_path / "splits", split=split, root=tmp_path / "videos")
        assert found(listed, tmp_path / "videos") == expected
        assert (listed.classes, listed.ignored) == (("brush_hair", "wave"), 1)
    touch(tmp_path / "videos", *(name for name, _ in parts["split2/test"] + parts["split1/test"]))
    command = ["check", str(tmp_path / "splits"), "--kind", "hmdb51", "--split", "split1", "--quick"]
    assert main([*command, "--root", str(tmp_path / "videos")]) == 0
    assert main(command) == 1
    assert "missing files" in capsys.readouterr().out


def test_hmdb51_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with files like brush_hair_test_split1.txt, found none"):
        read_list("hmdb51", tmp_path, split="split1/train")
    write(tmp_path / "wave_test_split1.txt", "a.avi 1\nb.avi 3\n")
    with pytest.raises(ValueError, match=r"wave_test_split1.txt:2: expected 'video 0', .*, got 'b.avi 3'"):
        read_list("hmdb51", tmp_path, split="split1/train")


# Something-Something v2

ENTRIES = [{"id": number, "template": "Holding [something]"} for number in ("78687", "42326", "7")]


@pytest.mark.parametrize("suffix", [".webm", ".mp4", ""])
def test_something_something_videos_are_files_or_folders_of_frames(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "train.json", json.dumps(ENTRIES))
    labels = write(tmp_path / "labels.json", json.dumps({"Holding something": "0"}))
    videos = tmp_path / "videos"
    for number in ("78687", "42326"):
        if suffix:
            touch(videos, f"{number}{suffix}", f"._{number}{suffix}")
        else:
            save_frames(videos / number, 1, 2)
            touch(videos, f"._{number}")
    listed = read_list("ssv2", path, labels=labels, root=videos, template="img_{:05}.png", start_index=1)
    naming = ("img_{:05}.png", 1) if not suffix else (None, None)
    assert listed.videos == tuple(Video(videos / f"{entry['id']}{suffix}", 0, None, *naming) for entry in ENTRIES)
    assert listed.ignored == 2
    (missing,) = (
        problem for problem in check_lists({"test": listed}, 1, open_videos=False).problems if not problem.warning
    )
    assert (missing.kind, missing.cases) == ("missing files", (str(videos / f"7{suffix}"),))


def test_something_something_videos_in_two_formats_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", json.dumps(ENTRIES))
    labels = write(tmp_path / "labels.json", json.dumps({"Holding something": "0"}))
    touch(tmp_path, "42326.webm", "42326.mp4")
    with pytest.raises(ValueError, match=r"entry 2, id 42326: expected one file or folder .*42326.mp4, .*42326.webm"):
        read_list("ssv2", path, labels=labels)


# Files of macOS


def test_files_of_macos_are_left_out_and_counted(tmp_path: Path) -> None:
    for kind, text in (
        ("mmaction", "a.mp4 0\nsub/._a.mp4 0\n._b.mp4 1\n"),
        ("pyslowfast", '"a.mp4",0\n"sub/._a.mp4",0\n._b.mp4,1\n'),
        ("mmaction_frames", "a.mp4 3 0\nsub/._a.mp4 3 0\n._b.mp4 3 1\n"),
    ):
        listed = read_list(kind, write(tmp_path / "list.txt", text))
        assert (found(listed, tmp_path), listed.ignored, listed.classes) == ([("a.mp4", 0)], 2, ("0",))
    touch(tmp_path, "a.mp4")
    (problem,) = check_lists({"test": listed}, 1, open_videos=False).problems
    assert str(problem) == "test: files of macOS (._*), which are no videos, left out: 2"
    assert problem.warning


def test_smarthome_folders_may_have_files_of_macos(tmp_path: Path) -> None:
    touch(tmp_path, "Walk_p03_r00_v01_c01.mp4", "._Walk_p03_r00_v01_c01.mp4")
    listed = read_list("smarthome", tmp_path, split="cross_view1/train")
    assert (len(listed.videos), listed.ignored) == (1, 1)


# Tar files


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with three tar files of 4, 4 and 3 clips, and the clips; labels are 0, 1, 2, 0, 1, ..."""
    folder = tmp_path_factory.mktemp("shards")
    numbers, clips = itertools.count(), []
    for shard, count in enumerate((4, 4, 3)):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as archive:
            for number in itertools.islice(numbers, count):
                clip = write_video(folder / "clip.mp4", frames=8 + number).read_bytes()
                (folder / "clip.mp4").unlink()
                clips.append(clip)
                add(archive, f"._{number}.mp4", b"\0")
                if number % 2:
                    add(archive, f"k.x/{number}.mp4", clip)
                    add(archive, f"k.x/{number}.json", json.dumps({"label": number % 3, "name": "a"}).encode())
                else:
                    add(archive, f"{number}.cls", f"{number % 3}\n".encode())
                    add(archive, f"{number}.mp4", clip)
    return folder, clips


def test_tar_files_are_lists_of_videos(shards: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    folder, clips = shards
    listed = read_list("tar", folder)
    assert [video.label for video in listed.videos] == [number % 3 for number in range(11)]
    assert (listed.classes, listed.ignored) == (("0", "1", "2"), 11)
    for number, video in enumerate(listed.videos):
        shard = folder / f"train-00{number // 4}.tar"
        assert video.path == shard / (f"k.x/{number}.mp4" if number % 2 else f"{number}.mp4")
        assert video.file == shard
        (tmp_path / "a.mp4").write_bytes(clips[number])
        with open_listed(video) as opened:
            assert torch.equal(opened.read(range(len(opened))), decode_all(tmp_path / "a.mp4"))
    assert not [problem for problem in check_lists({"test": listed}, 3).problems if not problem.warning]
    for pattern, count in (("train-{000..002}.tar", 11), ("train-{001..001}.tar", 4), ("train-002.tar", 3)):
        assert len(read_list("tar", folder / pattern).videos) == count
        assert main(["check", str(folder / pattern), "--kind", "tar", "--num-classes", "3"]) == 0


@pytest.mark.parametrize("train", [False, True])
def test_every_clip_of_tar_files_is_read_once_by_processes_and_workers(
    shards: tuple[Path, list[bytes]], train: bool
) -> None:
    """By two processes with two workers each; items are those of one process."""
    listed = read_list("tar", shards[0])
    dataset = VideoDataset(listed, frames=2, size=16, train=train)

    def items(rank: int, world: int, workers: int) -> dict[int, torch.Tensor]:
        batches: Any = EvaluationBatches(11, 2 * world, rank=rank, world=world)
        if train:  # two epochs, of ten clips each
            batches = TrainBatches(11, 2, rank=rank, world=world, seed=0, start=0, stop=10)
        seen: dict[int, torch.Tensor] = {}
        for number, batch in enumerate(loader(dataset, batches, workers, torch.device("cpu"))):
            for index, clip in zip(batch["index"].tolist(), batch["clips"], strict=True):
                key = index + 100 * (number // 5) if train else index
                assert key not in seen
                seen[key] = clip
        return seen

    alone = items(0, 1, 0)
    parts = [items(rank, 2, 2) for rank in range(2)]
    repeated = set(parts[0]) & set(parts[1])
    assert repeated == (set() if train else {10})  # the last clip of 11, so that both have equally many
    together = parts[0] | parts[1]
    assert len(together) == (20 if train else 11)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[key], together[key]) for key in alone)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.mp4": b"v"}, r"a.tar: expected a.cls or a.json with the label of a.mp4, found none"),
        ({"a.mp4": b"v", "a.webm": b"v", "a.cls": b"0"}, r"a.tar: expected one video a, found a.mp4 and a.webm"),
        ({"a.mp4": b"v", "a.cls": b"walk"}, r"a.tar: a.cls: expected a whole number, got 'walk'"),
        ({"a.mp4": b"v", "a.json": b'{"class": 1}'}, r"a.tar: a.json: expected {'label': number}, got"),
        ({"a.mp4": b"v", "a.json": b"{"}, r"a.tar: a.json: expected {'label': number}, got"),
    ],
)
def test_bad_tar_files_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    with pytest.raises(ValueError, match=message):
        read_list("tar", tmp_path / "a.tar")


def test_other_files_are_not_read_as_tar_files(shards: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    content = (shards[0] / "train-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    write(tmp_path / "text.tar", 100 * "no tar file\n")
    with tarfile.open(tmp_path / "compressed.tar", "w:gz") as archive:
        add(archive, "a.mp4", b"v")
    for name in ("cut.tar", "text.tar", "compressed.tar", "missing.tar"):
        with pytest.raises(ValueError, match=f"{name}: can't be read as an uncompressed tar file"):
            read_list("tar", tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a range that ascends, got \{5..2\}"):
        read_list("tar", tmp_path / "{5..2}.tar")
    with pytest.raises(ValueError, match=r"expected a folder with files like 000.tar, found none"):
        read_list("tar", write(tmp_path / "empty/a.txt", "").parent)


def test_unreadable_clips_of_tar_files_are_named(shards: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {"a.mp4": shards[1][0][:900], "b.mp4": b""}.items():
            add(archive, name, content)
            add(archive, f"{name[0]}.cls", b"0")
    videos = read_list("tar", tmp_path / "a.tar").videos
    for video, message in zip(
        videos, ("a.tar/a.mp4: can't be read as a video", "a.tar/b.mp4: .*it is empty"), strict=True
    ):
        with pytest.raises(UnreadableVideo, match=message):
            open_listed(video)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UnreadableVideo, match=r"a.tar/a.mp4: there is no .*a.tar"):
        open_listed(videos[0])


# Lists in memory


def test_lists_keep_what_they_are_made_of() -> None:
    made = [
        Video(Path("/a/é b.mp4"), 3),
        Video(Path("frames"), 0, 12, "img_{:05}.jpg", 1, 4),
        Video(Path("frames"), -1, 12, None, None, 0),
        Video(Path("x.tar/y.mp4"), 1 << 40, span=(1 << 40, 5)),
        Video(Path("bad\udcff.mp4"), 2),  # a name that is no text
    ]
    videos = Videos(made)
    assert list(videos) == [videos[index] for index in range(5)] == made
    assert videos == tuple(made)
    assert videos != made[:4]
    assert videos[-1] == made[-1]
    assert videos[1:4] == made[1:4]
    with pytest.raises(IndexError):
        videos[5]
    many = Videos(Video(Path(f"{number}.mp4"), number) for number in range(10_000))
    assert all(video == Video(Path(f"{number}.mp4"), number) for number, video in enumerate(many))
    assert (list(Videos([])), len(many)) == ([], 10_000)
    assert VideoList(tuple(made), (), "") == VideoList(videos, (), "")


@pytest.mark.slow
def test_loader_processes_that_are_not_forked_share_lists() -> None:
    """What one process changes, the other sees."""
    videos = Videos([Video(Path("a.mp4"), 1)])
    context: Any = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=relabel, args=(videos,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert videos[0].label == 7


def relabel(videos: Videos) -> None:
    videos._numbers[0, 0] = 7
