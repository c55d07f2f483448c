"""The figure of a pair of frames: the frames, and a table of pictures with a column for each block."""

from __future__ import annotations

from math import ceil, log
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from amflow_models.cli.drawing import CUT, finished
from amflow_models.cli.pictures import Pair

FORMATS = (".png", ".svg", ".pdf")

_ROWS = (  # field of Pictures, label, unit, colours
    ("flow", "1000 (flow - 1)", 1e3, "inferno"),
    ("aligned", "1000 (flow - 1),\naligned", 1e3, "inferno"),
    ("columns", "change of\nattention to\na patch, L1", 1.0, "cividis"),
    ("rows", "change of\nattention from\na patch, L1", 1.0, "cividis"),
)
_PCA_LABEL = "components of\nthe change\nfrom a patch"
_ASPECT = 16 / 9  # of a figure, nearly: that of a slide
_WIDE, _HIGH = 6.5, 8.0  # inches of all pictures in a band of columns; and of all rows
_NARROW = 1.7  # of a picture, at least


def save_figure(pair: Pair, path: Path, title: str, *, dpi: int = 150, shared: bool = False) -> None:
    """Draws a pair of frames and writes it as PNG, SVG or PDF, as the suffix of `path` says.

    Args:
        pair: the frames and the pictures of each block.
        path: the file.
        title: the first line of the figure.
        dpi: dots per inch of a PNG.
        shared: one colour scale for all blocks of a row; otherwise each picture has its own.

    Raises:
        CommandError: the file can't be written.
    """
    figure = draw(pair, title, shared=shared)
    with finished(path) as part:
        figure.savefig(part, dpi=dpi)


def draw(pair: Pair, title: str, *, shared: bool = False) -> Any:
    """The matplotlib figure that `save_figure` writes. Many blocks are drawn in several bands of columns."""
    from matplotlib.figure import Figure

    blocks = list(pair.blocks)
    compared = all(drawn.aligned is not None for drawn in pair.blocks.values())
    rows = [row for row in _ROWS if compared or row[0] != "aligned"]
    aspect = pair.images[0].shape[1] / pair.images[0].shape[2]
    bands, columns, cell = _arrange(len(blocks), len(rows) + 1, aspect)
    high, wide = bands * (len(rows) + 1) * (cell * aspect + 0.12), columns * (cell + 0.45) + 0.9
    side = max(3.0, min(0.42 * high / aspect, 0.7 * wide))  # width of the frames
    figure = Figure(figsize=(side + wide, max(high, 2 * (side * aspect + 0.4)) + 1.1), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(side, wide))  # type: ignore[misc]
    for axes, image, number in zip(left.subplots(2, 1), pair.images, pair.numbers, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"frame {number}", fontsize=10)
        axes.set_axis_off()
    table = right.subplots(bands * (len(rows) + 1), columns, squeeze=False)
    for axes in table.flat:
        axes.set_axis_off()
    for band in range(bands):
        lines = table[band * (len(rows) + 1) :]
        shown = blocks[band * columns : (band + 1) * columns]
        for line, row in zip(lines, rows, strict=False):
            _draw_row(line, pair, shown, *row, shared=shared)
        for axes, block in zip(lines[len(rows)], shown, strict=False):
            _show(axes, pair.blocks[block].pca_colours().numpy())
        lines[len(rows)][0].set_ylabel(_PCA_LABEL, fontsize=8)
        for axes, block in zip(lines[0], shown, strict=False):
            axes.set_title(f"block {block}", fontsize=10)
    right.supxlabel(_caption(compared, shared, width=round(15 * wide)), fontsize=9)
    return figure


def _arrange(count: int, rows: int, aspect: float) -> tuple[int, int, float]:
    """Bands, columns of a band and inches of a column, such that the figure is about as wide as a slide."""

    def size(bands: int) -> tuple[int, float]:
        columns = ceil(count / bands)
        return columns, max(_NARROW, min(_WIDE / columns, _HIGH / (bands * rows * aspect)))

    def distance(bands: int) -> float:
        columns, cell = size(bands)
        return abs(log(1.45 * columns * (cell + 0.45) / (bands * rows * (cell * aspect + 0.12)) / _ASPECT))

    best = min((bands for bands in range(1, count + 1) if (bands - 1) * size(bands)[0] < count), key=distance)
    return best, *size(best)


def _caption(compared: bool, shared: bool, width: int) -> str:
    """What the colours mean, in lines of at most `width` characters."""
    scale = "The pictures of a row share one colour scale" if shared else "Each picture has its own colour scale"
    sentences = (
        f"{scale}, from its minimum to its {CUT:.1%} quantile"
        f"{'; the aligned flow has the scale of the flow' if compared else ''}. The last row has the three leading "
        "principal components of the change of attention from a patch, as lightness, blue to yellow, and green to red: "
        "patches whose attention changes in the same way have the same colour.",
    )
    return "\n".join(fill(sentence, width) for sentence in sentences)


def _draw_row(
    line: Any, pair: Pair, blocks: list[int], field: str, label: str, unit: float, colours: str, *, shared: bool
) -> None:
    """Draws one quantity of some blocks. The aligned flow is drawn on the scale of the flow, to compare the two."""
    scaled = {block: unit * getattr(drawn, _scale_of(field)) for block, drawn in pair.blocks.items()}
    for axes, block in zip(line, blocks, strict=False):
        low, high = limits(list(scaled.values()) if shared else [scaled[block]])
        image = _show(axes, unit * getattr(pair.blocks[block], field).numpy(), cmap=colours, vmin=low, vmax=high)
        if not shared or block == blocks[-1]:
            # In the margin of its picture: a bar that took its place from the picture would move it out of its column.
            bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.06, 1)), extend="max")
            bar.ax.tick_params(labelsize=7, length=2, pad=1)
            bar.locator = _few_ticks()
            bar.update_ticks()
    line[0].set_ylabel(label, fontsize=8)


def _scale_of(field: str) -> str:
    return "flow" if field == "aligned" else field


def limits(pictures: list[Tensor]) -> tuple[float, float]:
    """The ends of the colour scale of some pictures."""
    values = torch.cat([x.flatten() for x in pictures])
    low, high = values.min().item(), values.quantile(CUT).item()
    return low, max(high, low + 1e-12)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _show(axes: Any, picture: Any, **options: Any) -> Any:
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(picture, interpolation="nearest", **options)
