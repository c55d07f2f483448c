"""``amflow demo``: AM flow of a real clip in every block of a real DINOv2, timed, checked in float64 and drawn.

Needs ``pip install 'amflow-kernels[demo]'``; importing this module does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amflow_kernels.api import am_flow, explain
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.offline import DEPTH, IMAGENET_MEAN, IMAGENET_STD, PATCH_SIZE, demo_extra
from amflow_kernels.offline import dinov2_vit_small, read_frames

if TYPE_CHECKING:
    from rich.table import Table

ERROR_BUDGET = 5e-7  # of a flow with Nq = Nk and temperature 1, against float64 on the same q and k
_EAGER_BYTES = 512 * 2**20  # the eager path forms the maps; it gets as many frames at once as have maps of this size


class DemoError(Exception):
    """What went wrong, in one line for the person at the terminal."""


@dataclass(frozen=True)
class BlockResult:
    """AM flow in one block of the backbone over the whole clip; times are medians in seconds."""

    flow: Tensor  # (T - 1, heads, N) float32
    seconds: float
    eager_seconds: float
    error: float  # max |flow - flow in float64|


def run(video: Path, output: Path, *, size: int = 224, frames: int = 8, every: int = 2) -> list[BlockResult]:
    """Runs the demo on the beginning of a video: prints a table, writes a PNG, returns the results per block.

    Args:
        video: the clip, any file that FFmpeg reads.
        output: the PNG to write.
        size: side of the square input in pixels, a multiple of 14.
        frames: T, the number of frames taken, at least 2.
        every: one frame in so many is taken.

    Raises:
        DemoError: the video can't be used, the output can't be written, or an error exceeds `ERROR_BUDGET` (in
            which case the table and the PNG are there).
        ModuleNotFoundError: a package of the demo extra is missing; the message says how to install it.
    """
    _check_output(output, video)
    with demo_extra():
        import matplotlib  # noqa: F401 -- if it is missing, say so before the work and not after it
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, torch.inference_mode():

        @contextmanager
        def step(text: str, total: int = 1) -> Iterator[Callable[[], None]]:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
            progress.update(task, completed=total)

        with step(f"read {frames} frames"):
            clip = _read(video, frames, every, size)
        with step("load DINOv2 ViT-S/14"):
            model = dinov2_vit_small(size)
        with step("run the backbone"), record_qk(model) as qk:
            model(clip)
        with step("prepare the kernel"):
            choice = explain(*(x.unflatten(0, (1, frames)) for x in qk[0]))
        results = []
        with step("AM flow, eager, float64 oracle", DEPTH) as advance:
            for q, k in qk.values():
                results.append(_measure(q.unsqueeze(0), k.unsqueeze(0)))
                advance()
        with step("draw"):
            _draw(output, clip, torch.stack([result.flow for result in results]), f"{video.name}, 1 frame in {every}")

    tokens = f"{results[0].flow.shape[1]} heads, {results[0].flow.shape[2]} tokens"
    console = Console()
    console.print(_table(results, f"AM flow of {video.name}: {frames} frames at {size} px, {tokens}"))
    console.print(f"am_flow ran {choice.impl!r} ({choice.reason}); picture: {output}", soft_wrap=True)
    worst = max(range(DEPTH), key=lambda index: results[index].error)
    if not results[worst].error <= ERROR_BUDGET:  # a NaN fails, too
        raise DemoError(f"error {results[worst].error:.1e} in block {worst} exceeds the budget of {ERROR_BUDGET:.0e}")
    return results


def _check_output(output: Path, video: Path) -> None:
    existing = output if output.exists() else output.parent
    if output.is_dir():
        raise DemoError(f"{output}: can't be written, it is a folder")
    if not output.parent.is_dir():
        raise DemoError(f"{output}: can't be written, there is no folder {output.parent}")
    if not os.access(existing, os.W_OK):
        raise DemoError(f"{output}: can't be written, permission denied")
    if output.exists() and video.exists() and output.samefile(video):
        raise DemoError(f"{output}: is the video itself and would be overwritten")


def _read(video: Path, frames: int, every: int, size: int) -> Tensor:
    try:
        return read_frames(video, frames, every, size)
    except (FileNotFoundError, ValueError) as error:
        raise DemoError(str(error)) from error


def _measure(q: Tensor, k: Tensor) -> BlockResult:
    """q, k: (1, T, heads, N, D)."""
    flow = am_flow(q, k)
    oracle = _eager(q.double(), k.double())
    error = (flow - oracle).abs().max().item()
    return BlockResult(flow[0], _median_time(lambda: am_flow(q, k)), _median_time(lambda: _eager(q, k)), error)


def _eager(q: Tensor, k: Tensor) -> Tensor:
    """The reference, over as many frames at a time as memory allows; chunks share a frame, so no pair is lost."""
    map_bytes = q.shape[2] * q.shape[3] * k.shape[3] * q.element_size()
    pairs = max(1, _EAGER_BYTES // map_bytes - 1)
    starts = range(0, q.shape[1] - 1, pairs)
    chunks = [(q[:, t : t + pairs + 1], k[:, t : t + pairs + 1]) for t in starts]
    return torch.cat([am_flow(*chunk, impl="reference") for chunk in chunks], dim=1)


def _median_time(f: Callable[[], object]) -> float:
    """Median of five runs, or of fewer once they have taken a second."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 1:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return median(times)


def _table(results: list[BlockResult], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in ("block", "am_flow ms", "eager ms", "ratio", "max |error|", "spread", "min", "max"):
        table.add_column(name, justify="right")

    def times(seconds: float, eager: float) -> tuple[str, str, str]:
        return f"{1e3 * seconds:.1f}", f"{1e3 * eager:.1f}", f"{eager / seconds:.1f}x"

    for index, result in enumerate(results):
        flow = result.flow
        table.add_row(
            str(index),
            *times(result.seconds, result.eager_seconds),
            f"{result.error:.1e}",
            f"{flow.std(dim=-1).mean().item():.1e}",
            f"{flow.min().item():.4f}",
            f"{flow.max().item():.4f}",
            end_section=index == len(results) - 1,
        )
    total = times(sum(result.seconds for result in results), sum(result.eager_seconds for result in results))
    table.add_row("all", *total, f"{max(result.error for result in results):.1e}")
    table.caption = f"error against float64, budget {ERROR_BUDGET:.0e}; spread: standard deviation over tokens"
    return table


def _draw(output: Path, clip: Tensor, flow: Tensor, title: str) -> None:
    """One PNG of the frame pair that changes most.

    clip: (T, 3, size, size), normalised; flow: (blocks, T - 1, heads, N), the class token first.
    """
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (clip * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (T, size, size, 3)
    t = int((images[1:] - images[:-1]).abs().mean(dim=(1, 2, 3)).argmax())
    grid = clip.shape[-1] // PATCH_SIZE
    signal = flow[:, t].mean(dim=1) - 1  # (blocks, N), mean over heads
    cls, patches = signal[:, 0], signal[:, 1:].unflatten(1, (grid, grid))

    figure = Figure(figsize=(13, 8.2), layout="constrained")
    figure.suptitle(f"AM flow of {title}, in the 12 blocks of DINOv2 ViT-S/14", fontsize=14, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.9))
    for axes, name, index in zip(left.subplots(2, 1), ("t", "t + 1"), (t, t + 1), strict=True):
        axes.imshow(images[index].numpy())
        axes.set_title(f"frame {name} = {index}")
        axes.set_axis_off()
    grey = images[t].mean(dim=-1).numpy()
    size = clip.shape[-1]
    for block, axes in enumerate(right.subplots(3, 4).flat):
        heat = 1e3 * patches[block]
        top = heat.quantile(0.995).item()  # a few outlier tokens would otherwise darken all others
        axes.imshow(grey, cmap="gray", vmin=-0.3, vmax=1.3)
        image = axes.imshow(
            heat.numpy(),
            cmap="inferno",
            vmin=heat.min().item(),
            vmax=top,
            alpha=0.75,
            extent=(0, size, size, 0),
            interpolation="nearest",
        )
        axes.set_title(f"block {block}    class token {1e3 * cls[block].item():+.2g}", fontsize=9)
        axes.set_axis_off()
        bar = right.colorbar(image, ax=axes, shrink=0.8, pad=0.02, extend="max")
        bar.ax.tick_params(labelsize=7)
    right.supxlabel("1000 x (flow - 1), mean over heads; own colour scale per block, cut at the 99.5th percentile")
    try:
        figure.savefig(output, format="png", dpi=110)
    except OSError as error:
        raise DemoError(f"{output}: can't be written, {error.strerror}") from error
