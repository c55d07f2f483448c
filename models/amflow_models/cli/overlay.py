"""Overlay videos: each frame beside the same frame under the AM flow of each block, with labels and colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from amflow_models.cli.drawing import COLOURS, CUT, overlay, video_writer
from amflow_models.cli.offline import iterate_frames
from amflow_models.cli.pictures import Flows

LARGEST = (1920, 1080)  # pixels of a video, at most
FOLDER_RATE = Fraction(25)  # frames per second of a folder of frames, which does not tell its own
_TITLE, _LABEL, _BAR, _GAP = 60, 26, 24, 8  # pixels: heights of the title, of a tile's label and colour bar; distance


def write_flows(
    flows: Sequence[Flows],
    output: Path,
    video: Path,
    *,
    size: tuple[int, int],
    every: int,
    rate: Fraction | None,
    title: str,
) -> None:
    """Writes the overlay video of pairs of frames, at the speed of the video that they come from.

    All flows are known before the first frame is drawn, so each block has one colour scale in the whole video: from 0
    to the `CUT` quantile. Frames are read again, at the size at which they are drawn.

    Args:
        flows: those of neighbouring frames, in order.
        output: the file to write.
        video: the video that they come from.
        size: height and width of the model's input, whose aspect the tiles have.
        every: step between the frames that were taken.
        rate: frames per second of the video, None if unknown.
        title: the first line at the top; the second tells the frames and the time.

    Raises:
        CommandError: the output can't be written.
    """
    largest = {block: _largest(flows, block) for block in flows[0].blocks}
    labels, ends = ["frame"], [0.0]
    for block, shown in flows[0].blocks.items():
        for name in ("", " aligned")[: 2 if shown[1] is not None else 1]:
            labels.append(f"block {block}{name}")
            ends.append(1e3 * largest[block])
    sheet = Sheet(labels, ends, size)
    frames = iterate_frames(video, every, sheet.tile, start=flows[0].numbers[0])
    with video_writer(output, (rate or FOLDER_RATE) / every) as write:
        for pair, (number, image) in zip(flows, frames, strict=False):
            tiles = [image]
            for block, shown in pair.blocks.items():
                tiles += [overlay(image, flow, largest[block]) for flow in shown if flow is not None]
            time = f"   {float(number / rate):.2f} s" if rate else ""
            write(sheet.draw(tiles, f"{title}\nframes {pair.numbers[0]} and {pair.numbers[1]}{time}"))


def _largest(flows: Sequence[Flows], block: int) -> float:
    values = np.concatenate([pair.blocks[block][0].flatten().numpy() for pair in flows])
    return max(float(np.quantile(values, CUT)), 1e-12)


class Sheet:
    """Tiles in rows, each with a label above and a colour bar below, under a title. Sides fit a video.

    Args:
        labels: a text for each tile.
        ends: the value at the end of each tile's colour bar, which begins at 0; 0 is a tile without.
        size: height and width whose aspect the tiles have.

    Attributes:
        tile: height and width of a tile.
        size: height and width of the sheet.
    """

    def __init__(self, labels: Sequence[str], ends: Sequence[float], size: Sequence[int]) -> None:
        from PIL import Image, ImageDraw

        count, aspect = len(labels), size[0] / size[1]
        around = _LABEL + _BAR + _GAP
        fits = []
        for across in range(1, count + 1):
            down = -(-count // across)
            width = (LARGEST[0] - _GAP) // across - _GAP
            height = (LARGEST[1] - _TITLE) // down - around
            fits.append((int(min(width, height / aspect)), across))
        wide, self._across = max(fits)
        self.tile = max(2, round(wide * aspect)), max(2, wide)
        down = -(-count // self._across)
        sides = _TITLE + down * (self.tile[0] + around), _GAP + self._across * (self.tile[1] + _GAP)
        self.size = (sides[0] + sides[0] % 2, sides[1] + sides[1] % 2)  # video frames have even sides
        self._empty = Image.new("RGB", self.size[::-1], "black")
        pen = ImageDraw.Draw(self._empty)
        for n, (label, end) in enumerate(zip(labels, ends, strict=True)):
            top, left = self._corner(n)
            pen.text((left, top - 4), label, "white", _font(18), anchor="ld")
            if end:
                self._draw_bar(pen, top + self.tile[0] + 4, left, end)

    def _corner(self, n: int) -> tuple[int, int]:
        """Top and left of a tile."""
        row, column = divmod(n, self._across)
        return (
            _TITLE + _LABEL + row * (self.tile[0] + _LABEL + _BAR + _GAP),
            _GAP + column * (self.tile[1] + _GAP),
        )

    def _draw_bar(self, pen: Any, top: int, left: int, end: float) -> None:
        from matplotlib import colormaps
        from PIL import Image

        text = f"{end:.2g}"
        room = 16, 14 + int(pen.textlength(text, _font(15)))  # pixels of the texts at both ends
        width = max(1, self.tile[1] - sum(room))
        colours = colormaps[COLOURS](np.linspace(0, 1, width))[None, :, :3]
        bar = Image.fromarray((255 * colours).round().astype(np.uint8)).resize((width, 12))
        self._empty.paste(bar, (left + room[0], top + 4))
        pen.text((left, top + 10), "0", "white", _font(15), anchor="lm")
        pen.text((left + self.tile[1], top + 10), text, "white", _font(15), anchor="rm")

    def draw(self, tiles: Sequence[Tensor], title: str) -> Any:
        """The sheet with tiles, each (3, height, width) in [0, 1] of the size `tile`: uint8 (height, width, 3)."""
        from PIL import Image, ImageDraw

        sheet = self._empty.copy()
        pen = ImageDraw.Draw(sheet)
        pen.text((_GAP, 4), title, "white", _font(20), spacing=4)
        for n, tile in enumerate(tiles):
            top, left = self._corner(n)
            sheet.paste(Image.fromarray((255 * tile).round().byte().permute(1, 2, 0).numpy()), (left, top))
        return np.asarray(sheet)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
