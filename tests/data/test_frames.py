"""Folders of frames: which pictures are the frames, and pictures of every mode and orientation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amflow_models.data import FrameFolder, FrameTemplate, UnreadableVideo, count_frames, open_video, read_frames_at
from PIL import Image


def save(folder: Path, *names: str) -> Path:
    """Saves a picture of one shade under each name: the number that ends it, or 200 in a name without."""
    folder.mkdir(exist_ok=True)
    for name in names:
        digits = "".join(c if c.isdigit() else " " for c in Path(name).stem).split()
        Image.new("L", (8, 6), int(digits[-1]) if digits else 200).save(folder / name)
    return folder


def shades(*arguments: Any) -> list[int]:
    """The shade of every frame of a folder."""
    with open_video(*arguments) as video:
        frames = video.read(range(len(video)))
    assert frames.shape[1:] == (3, 6, 8)
    assert frames.dtype == torch.uint8
    return frames[:, 0, 0, 0].tolist()


SERIES: dict[str, list[str]] = {
    "padded": ["img_00009.png", "img_00010.png", "img_00011.png"],
    "unpadded": ["img_9.png", "img_10.png", "img_100.png"],
    "more digits than zeros": ["99.png", "100.png", "101.png"],
    "another number in the names": ["clip2_frame01.png", "clip2_frame02.png"],
    "the number comes first": ["1_720p.png", "2_720p.png"],
    "one picture": ["img_00007.png"],
    "one picture without a number": ["picture.png"],
    "upper case": ["IMG1.PNG", "IMG2.PNG"],
}


@pytest.mark.parametrize("name", SERIES)
def test_the_only_series_of_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path, name: str) -> None:
    """Other files do not count, nor do hidden ones."""
    names = SERIES[name]
    save(tmp_path, *reversed(names))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "._img_00001.png").write_text("of another file system")
    assert [file.name for file in FrameFolder(tmp_path).files] == names
    assert count_frames(tmp_path) == len(names)


FLOW = [f"{name}_{number:05}.png" for name in ("flow_x", "flow_y") for number in (1, 2)]
SEVERAL: dict[str, list[str]] = {
    "optical flow": ["img_00001.png", "img_00002.png", "img_00003.png", *FLOW],
    "a thumbnail": ["img_1.png", "img_2.png", "thumbnail.png"],
    "two cameras": ["cam1_001.png", "cam1_002.png", "cam2_001.png", "cam2_002.png"],
    "two numbers that differ together": ["cam1_001.png", "cam2_002.png"],
    "two formats": ["img_1.png", "img_2.jpg"],
    "two ways to write a number": ["img_1.png", "img_01.png", "img_02.png"],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_folder_of_several_series_is_refused_without_a_template(tmp_path: Path, name: str) -> None:
    save(tmp_path, *SEVERAL[name])
    with pytest.raises(UnreadableVideo, match=r"several series .*expected a template that names the frames") as error:
        open_video(tmp_path)
    assert SEVERAL[name][-1] in str(error.value) or "..." in str(error.value)


@pytest.mark.parametrize(
    ("template", "start_index", "expected"),
    [
        ("img_{:05}.png", None, [1, 2, 3]),
        ("img_{:05d}.png", 1, [1, 2, 3]),
        ("flow_x_{:05}.png", None, [1, 2]),
    ],
)
def test_a_template_says_which_series_is_read_and_start_index_with_what_number(
    tmp_path: Path, template: str, start_index: int | None, expected: list[int]
) -> None:
    assert shades(save(tmp_path, *SEVERAL["optical flow"]), template, start_index) == expected
    assert count_frames(tmp_path, template, start_index) == len(expected)
    assert read_frames_at(tmp_path, [1], template, start_index)[0, 0, 0, 0] == expected[1]


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_frame_has_the_smallest_number(tmp_path: Path, first: int) -> None:
    save(tmp_path, *(f"img_{number:05}.png" for number in range(first, 4)), *FLOW)
    assert shades(tmp_path, "img_{:05}.png") == list(range(first, 4))


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("img_{:05}.jpg", {3: "img_00003.jpg", 123456: "img_123456.jpg"}),
        ("{:06}.png", {3: "000003.png"}),
        ("frame{}.png", {3: "frame3.png", 12: "frame12.png"}),
    ],
)
def test_templates_write_and_read_names(template: str, names: dict[int, str]) -> None:
    parsed = FrameTemplate.parse(template)
    assert str(parsed) == template
    for number, name in names.items():
        assert (parsed.name(number), parsed.number(name)) == (name, number)
    for other in ("img_3.jpg", "img_000003.jpg", "0000003.png", "frame03.png", "frame.png", "frame²3.png", "fra", ""):
        assert parsed.number(other) is None


@pytest.mark.parametrize(
    "template",
    ["img_00001.jpg", "img_{:5}.jpg", "img_{:05f}.jpg", "{}_{}.jpg", "{:05", "rgb/{:05}.jpg", "img_%05d.jpg"],
)
def test_bad_templates_are_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match=r"template: expected a file name with one number, like img_{:05}\.jpg, got"):
        open_video(save(tmp_path, "img_00001.png"), template)


def test_bad_start_indices_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "img_00001.png", "img_00002.png")
    with pytest.raises(ValueError, match="start_index: expected a template with it"):
        open_video(tmp_path, None, 1)
    with pytest.raises(ValueError, match="start_index: expected at least 0, got -1"):
        open_video(tmp_path, "img_{:05}.png", -1)
    with pytest.raises(UnreadableVideo, match=r"expected the first frame img_00000.png, the folder begins with"):
        open_video(tmp_path, "img_{:05}.png", 0)
    with pytest.raises(UnreadableVideo, match=r"expected the first frame img_00002.png, the folder begins with"):
        open_video(tmp_path, "img_{:05}.png", 2)
    with pytest.raises(UnreadableVideo, match=r"expected a folder with files like frame{}.png, found none"):
        open_video(tmp_path, "frame{}.png")


def test_bad_folders_and_images_say_why(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="found none"):
        open_video(tmp_path)
    with pytest.raises(UnreadableVideo, match="there is no such folder"):
        FrameFolder(tmp_path / "no")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "1.jpg"
    Image.fromarray(noise).save(path)
    half = path.read_bytes()
    for content in (half[: len(half) // 2], b"this is no picture"):
        path.write_bytes(content)
        with pytest.raises(UnreadableVideo, match=r"1.jpg can't be read as an image"):
            read_frames_at(tmp_path, [0])
    with pytest.raises(IndexError, match="indices"):
        read_frames_at(tmp_path, [1])


def test_frames_of_several_sizes_are_refused(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(UnreadableVideo, match="several sizes"):
        read_frames_at(tmp_path, [0, 1])
    with FrameFolder(tmp_path) as video, pytest.raises(UnreadableVideo, match="several sizes"):
        list(video.iterate([0, 1]))


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF orientation: from the stored picture
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file", ["1.jpg", "1.png", "deep.png"])
def test_pictures_are_turned_upright_by_their_exif_orientation(tmp_path: Path, file: str, orientation: int) -> None:
    stored = np.kron(np.random.default_rng(0).integers(0, 255, (3, 4), dtype=np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = stored.astype(np.uint16) * 257 if file == "deep.png" else stored
    Image.fromarray(picture).save(tmp_path / file, exif=exif, **({"quality": 100} if file == "1.jpg" else {}))
    (frame,) = read_frames_at(tmp_path, [0]).numpy().astype(int)
    expected = UPRIGHT[orientation](stored)
    assert frame.shape == (3, *expected.shape)
    assert abs(frame - expected).max() <= 2  # JPEG rounds


def grey16(folder: Path, **options: Any) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65279, 65535]], np.uint16)
    Image.fromarray(values).save(folder / "1.png", **options)


def palette(folder: Path, **options: Any) -> None:
    picture = Image.new("P", (4, 2), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(folder / "1.png", **options)


def filled(mode: str, colour: Any, file: str = "1.png", **options: Any) -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, (4, 2), colour).save(folder / file, **options)


GOOD: dict[str, tuple[Callable[[Path], None], Any]] = {  # the pixels of the first two rows, or the colour of all
    "16-bit grey": (grey16, [[0, 0, 1, 1], [128, 254, 254, 255]]),
    "16-bit grey without the transparent shade": (lambda folder: grey16(folder, transparency=7),
                                                  [[0, 0, 1, 1], [128, 254, 254, 255]]),
    "1 bit": (filled("1", 1), (255, 255, 255)),
    "grey": (filled("L", 9), (9, 9, 9)),
    "palette": (palette, (10, 20, 30)),
    "palette, another colour transparent": (lambda folder: palette(folder, transparency=0), (10, 20, 30)),
    "grey, opaque": (filled("LA", (9, 255)), (9, 9, 9)),
    "RGB, opaque": (filled("RGBA", (1, 2, 3, 255)), (1, 2, 3)),
    "RGB, another colour transparent": (filled("RGB", (1, 2, 3), transparency=(9, 9, 9)), (1, 2, 3)),
    "CMYK": (filled("CMYK", (0, 255, 255, 0), "1.jpg"), (255, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_pictures_of_every_mode_have_their_colours(tmp_path: Path, name: str) -> None:
    make, expected = GOOD[name]
    make(tmp_path)
    frame = read_frames_at(tmp_path, [0])[0].int()
    if isinstance(expected, tuple):
        expected = torch.tensor(expected)[:, None, None].expand(3, 2, 4)
    else:
        expected = torch.tensor(expected).expand(3, 2, 4)
    assert (frame - expected).abs().max() <= (2 if name == "CMYK" else 0)  # JPEG rounds


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "grey": (filled("LA", (9, 254)), "transparent pixels"),
    "RGB": (filled("RGBA", (1, 2, 3, 0)), "transparent pixels"),
    "palette": (lambda folder: palette(folder, transparency=1), "transparent pixels"),
    "RGB with a transparent colour": (filled("RGB", (1, 2, 3), transparency=(1, 2, 3)), "transparent pixels"),
    "16-bit grey with a transparent shade": (lambda folder: grey16(folder, transparency=257), "transparent pixels"),
    "32-bit integers": (filled("I", 70000, format="TIFF"), "its mode is I, expected one of"),
    "floats": (filled("F", 0.5, format="TIFF"), "its mode is F, expected one of"),
    "LAB": (filled("LAB", (1, 2, 3), format="TIFF"), "its mode is LAB, expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_without_certain_colours_are_refused(tmp_path: Path, name: str) -> None:
    """Transparent pixels show what is behind them; the range of others is unknown."""
    make, reason = REFUSED[name]
    make(tmp_path)
    with pytest.raises(UnreadableVideo, match=rf"1.png can't be read as an image \(.*{reason}"):
        read_frames_at(tmp_path, [0])
