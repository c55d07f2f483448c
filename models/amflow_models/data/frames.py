"""Folders of frames: which pictures of a folder are its frames, and the pictures themselves.

The names of a video's frames differ in one number and form a series: ``img_00001.jpg``, ``img_00002.jpg``. A folder may
hold other series, too, such as the optical flow that was computed from the frames; then a template says which one is
read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from amflow_models.data.reading import UnreadableVideo, VideoReader

_IMAGES = (".jpg", ".jpeg", ".png")
_TEMPLATE = re.compile(r"(?P<prefix>[^{}/]*)\{(?::(?:0(?P<width>[1-9][0-9]*))?d?)?\}(?P<suffix>[^{}/]*)")
_NUMBER = re.compile(r"([0-9]+)")
_DEEP = ("I;16", "I;16L", "I;16B")  # modes of 16-bit greyscale pictures
_CONVERTED = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # modes that Pillow converts to RGB as they should be


@dataclass(frozen=True)
class FrameTemplate:
    """The names of a series of frames: a number between two texts, with zeros before it up to a number of digits.

    ``str()`` writes it as `parse` reads it.
    """

    prefix: str
    width: int
    suffix: str

    @classmethod
    def parse(cls, template: str) -> FrameTemplate:
        """Reads a template in the syntax of ``str.format``: ``img_{:05}.jpg``, ``{:06d}.png``, ``frame{}.jpg``.

        Raises:
            ValueError: it is not a file name with one such number.
        """
        match = _TEMPLATE.fullmatch(template)
        if not match:
            raise ValueError(f"template: expected a file name with one number, like img_{{:05}}.jpg, got {template!r}")
        return cls(match["prefix"], int(match["width"] or 1), match["suffix"])

    def name(self, number: int) -> str:
        """The name of the frame with a number."""
        return f"{self.prefix}{number:0{self.width}}{self.suffix}"

    def number(self, name: str) -> int | None:
        """The number in a frame's name; None if it is no name of the series."""
        digits = name[len(self.prefix) : len(name) - len(self.suffix)]
        number = int(digits) if digits.isascii() and digits.isdigit() else None
        return number if number is not None and self.name(number) == name else None

    def __str__(self) -> str:
        return f"{self.prefix}{{{f':0{self.width}' if self.width > 1 else ''}}}{self.suffix}"


class FrameFolder(VideoReader):
    """A folder of frames: the pictures of one series, in the order of their numbers.

    Args:
        path: the folder.
        template: names of the frames, such as ``"img_{:05}.jpg"`` (`FrameTemplate.parse`). None: those of the jpg and
            png files of the folder, which must form a single series.
        start_index: number of the first frame, which must be the smallest one that the folder has: a frame before it
            would be left out, or the numbers are off by one. None: whatever the smallest number is.

    Attributes:
        files: the frames' files, in order.

    Raises:
        ValueError: the template can't be read, or a start_index is negative or comes without a template.
        UnreadableVideo: the folder does not exist, has no frame, has pictures of several series and there is no
            template, or its first frame is not `start_index`.
    """

    def __init__(self, path: str | Path, template: str | None = None, start_index: int | None = None) -> None:
        self.path = Path(path)
        self.files = frame_files(self.path, template, start_index)
        if not self.files:
            expected = f"files like {template}" if template else f"{', '.join(sorted(_IMAGES))} files"
            raise UnreadableVideo(path, f"expected a folder with {expected}, found none")

    def __len__(self) -> int:
        return len(self.files)

    def close(self) -> None:
        """Does nothing: files are open only while they are read."""

    def _frames(self, wanted: list[int]) -> Iterator[Tensor]:
        for index in wanted:
            yield self._read(self.files[index])

    def _read(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return torch.from_numpy(_upright_rgb(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
            raise UnreadableVideo(self.path, f"{file.name} can't be read as an image ({error})") from error


def check_naming(template: str | None, start_index: int | None) -> None:
    """Raises the ValueErrors of `FrameFolder`."""
    if template is not None:
        FrameTemplate.parse(template)
    if start_index is not None and template is None:
        raise ValueError(f"start_index: expected a template with it, got {start_index} and no template")
    if start_index is not None and start_index < 0:
        raise ValueError(f"start_index: expected at least 0, got {start_index}")


def frame_files(path: Path, template: str | None = None, start_index: int | None = None) -> list[Path]:
    """The files of a folder's frames, in order; an empty list if it has none.

    Args:
        path, template, start_index: as for `FrameFolder`.

    Raises:
        ValueError, UnreadableVideo: as for `FrameFolder`.
    """
    check_naming(template, start_index)
    if not path.is_dir():
        raise UnreadableVideo(path, "there is no such folder")
    try:
        names = os.listdir(path)
    except OSError as error:  # no permission
        raise UnreadableVideo(path, str(error)) from error
    if template is None:
        names = [name for name in names if name.lower().endswith(_IMAGES) and not name.startswith(".")]
        if len(names) < 2:
            return [path / name for name in names]
    series = _only_series(path, names) if template is None else FrameTemplate.parse(template)
    numbers = sorted(number for number in map(series.number, names) if number is not None)
    if start_index is not None and numbers and start_index != numbers[0]:
        first, there = series.name(start_index), series.name(numbers[0])
        raise UnreadableVideo(path, f"start_index: expected the first frame {first}, the folder begins with {there}")
    return [path / series.name(number) for number in numbers]


def _only_series(path: Path, names: Iterable[str]) -> FrameTemplate:
    """The template of two or more names. Raises UnreadableVideo if they are of several series."""
    parts = [_NUMBER.split(name) for name in sorted(names)]  # text and digits in turn
    examples = {tuple(split[::2]): "".join(split) for split in parts}
    if len(examples) == 1:
        differing = [place for place, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
        place = differing[0]
        width = min(len(split[place]) for split in parts)
        series = FrameTemplate("".join(parts[0][:place]), width, "".join(parts[0][place + 1 :]))
        others = [name for name in map("".join, parts) if series.number(name) is None]
        if not others:
            return series
        examples |= {(name,): name for name in others}
    shown = sorted(examples.values())
    raise UnreadableVideo(
        path,
        f"has pictures of several series ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''}): "
        "expected a template that names the frames, like img_{:05}.jpg",
    )


def _upright_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a picture as it is meant to be seen, uint8 (H, W, 3).

    Raises:
        ValueError: it has transparent pixels, or pixels without a known range.
    """
    if image.mode in _DEEP:
        grey = np.asarray(ImageOps.exif_transpose(image)).astype(np.int32)
        if "transparency" in image.info and (grey == image.info["transparency"]).any():
            raise ValueError("it has transparent pixels")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)  # 65535 / 257 = 255
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if (np.asarray(image.getchannel("A")) < 255).any():
            raise ValueError("it has transparent pixels")
        image = image.convert("RGB")
    if image.mode not in _CONVERTED:
        raise ValueError(f"its mode is {image.mode}, expected one of {', '.join((*_CONVERTED, *_DEEP))}")
    return np.array(image.convert("RGB"))
