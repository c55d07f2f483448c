"""``amflow demo``: AM flow of a real clip in every block of a real DINOv2, timed, checked in float64 and drawn.

Running it needs ``pip install 'amflow-kernels[demo]'``; importing this module needs only torch.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amflow_kernels.api import am_flow, explain
from amflow_kernels.integrations.timm import record_qk
from amflow_models.cli.arguments import DEFAULT, VIDEO_HELP, add_frame_arguments, at_least, video_path
from amflow_models.cli.backbone import OFFLINE_MODEL, WEIGHTS_HELP, choose_weights, load
from amflow_models.cli.drawing import finished
from amflow_models.cli.errors import CommandError, needs_extra
from amflow_models.cli.offline import DEPTH, IMAGENET_MEAN, IMAGENET_STD, PATCH_SIZE, input_size, read_frames

if TYPE_CHECKING:
    from rich.table import Table

# Largest error of a flow with Nq = Nk and temperature 1, against float64 on the same q and k.
ERROR_BUDGET = 5e-7
# Some blocks have logits above 300, for which no float32 code keeps to 5e-7: they may have twice the error of eager
# float32.
_EAGER_ALLOWANCE = 2
# The eager path forms the maps; it gets as many frames at a time as have maps of this size.
_EAGER_BYTES = 512 * 2**20
_CLIP, _FIRST_MOVING = "bigbuckbunny", 25  # the default clip, and its frame at second 1, when someone begins to move


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status 0. Failures raise what `run` raises."""
    args = _parser().parse_args(arguments)
    start = args.start if args.start is not None else 0 if args.video else _FIRST_MOVING
    run(
        video_path(args.video or _CLIP),
        args.output,
        weights=args.weights,
        size=args.size,
        crop=args.crop,
        frames=args.frames,
        every=args.every,
        start=start,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow demo",
        description="Runs DINOv2 ViT-S/14 over a video and computes AM flow in each of its 12 blocks. Prints times, "
        "errors against float64 and the size of the signal, and draws the flow of the two frames that differ most. "
        "Fails if an error exceeds the budget.",
    )
    parser.add_argument("video", nargs="?", metavar="VIDEO", help=f"{VIDEO_HELP} (default: {_CLIP} from second 1)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("amflow_demo.png"),
        metavar="PNG",
        help=f"the picture to write {DEFAULT}",
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=(224, 518),
        default=224,
        help=f"shorter side of the input in pixels {DEFAULT}",
    )
    parser.add_argument("--crop", action="store_true", help="take only the square in the middle of the frames")
    parser.add_argument("--weights", metavar="hub|offline|FILE", help=WEIGHTS_HELP)
    parser.add_argument("--frames", type=at_least(2), default=8, metavar="T", help=f"how many frames to take {DEFAULT}")
    add_frame_arguments(parser, None, f"(default: 0, or {_FIRST_MOVING} without VIDEO)")
    return parser


@dataclass(frozen=True)
class BlockResult:
    """AM flow over the whole clip in one block of the backbone. Times are medians in seconds."""

    flow: Tensor  # (T - 1, heads, N) float32
    seconds: float
    eager_seconds: float
    error: float  # max |flow - flow in float64|
    eager_error: float  # max |eager flow in float32 - flow in float64|

    @property
    def budget(self) -> float:
        """The largest error that passes."""
        return max(ERROR_BUDGET, _EAGER_ALLOWANCE * self.eager_error)


def run(
    video: Path,
    output: Path,
    *,
    weights: str | None = None,
    size: int,
    crop: bool = False,
    frames: int,
    every: int,
    start: int = 0,
) -> list[BlockResult]:
    """Runs the demo on a video: prints a table, writes a PNG and returns one result per block.

    Args:
        video: the clip, any file that FFmpeg reads, or a folder of frames.
        output: the PNG to write.
        weights: ``"hub"``, ``"offline"`` or a file; None is as in `choose_weights`.
        size: shorter side of the input in pixels, a multiple of 14.
        crop: the input is a square, the middle of the frames.
        frames: T, the number of frames taken, at least 2.
        every: step between the frames taken, at least 1.
        start: index of the first frame taken, from 0.

    Raises:
        CommandError: the video can't be used, the output can't be written, or an error exceeds both `ERROR_BUDGET` and
            twice the error of eager float32 (after the table was printed and the PNG written).
        MissingPackageError: a package of the demo extra is missing; the message says how to install it.
    """
    check_output(output, video)
    with needs_extra("demo"):
        import matplotlib  # noqa: F401 -- reports a missing package before the work, not after it
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    shown = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
    with shown as progress, torch.inference_mode():

        @contextmanager
        def step(text: str, total: int = 1) -> Iterator[Callable[[], None]]:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
            progress.update(task, completed=total)

        with step(f"read {frames} frames"):
            clip = _read(video, frames, every, size, crop, start)
        with step("load DINOv2 ViT-S/14"):
            model = load(OFFLINE_MODEL, choose_weights(OFFLINE_MODEL, weights), (clip.shape[-2], clip.shape[-1]))
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
            numbers = [start + every * t for t in range(frames)]
            _draw(output, video.name, numbers, clip, torch.stack([result.flow for result in results]))

    tokens = f"{results[0].flow.shape[1]} heads, {results[0].flow.shape[2]} tokens"
    Console().print(
        _table(results, f"AM flow of {video.name}: {frames} frames, {clip.shape[-1]} x {clip.shape[-2]} px, {tokens}")
    )
    print(f"am_flow ran {choice.impl!r} ({choice.reason}); picture: {output}")
    for index, result in enumerate(results):
        if not result.error <= result.budget:  # a NaN fails, too
            raise CommandError(f"block {index}: the error {result.error:.1e} exceeds its budget of {result.budget:.1e}")
    return results


def check_output(output: Path, video: Path) -> None:
    """Raises CommandError unless the file `output` can be written without overwriting the video."""
    existing = output if output.exists() else output.parent
    if output.is_dir():
        raise CommandError(f"{output}: can't be written, it is a folder")
    if not output.parent.is_dir():
        raise CommandError(f"{output}: can't be written, there is no folder {output.parent}")
    if not os.access(existing, os.W_OK):
        raise CommandError(f"{output}: can't be written, permission denied")
    if output.exists() and video.exists() and output.samefile(video):
        raise CommandError(f"{output}: is the video itself and would be overwritten")


def _read(video: Path, frames: int, every: int, size: int, crop: bool, start: int) -> Tensor:
    with needs_extra("demo"):
        from amflow_models.data.video import open_video
    try:
        with open_video(video) as opened:
            height, width = next(iter(opened.iterate([0]))).shape[1:]
        sides = (size, size) if crop else input_size(height, width, size, PATCH_SIZE)
        return read_frames(video, frames, every, sides, start=start)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _measure(q: Tensor, k: Tensor) -> BlockResult:
    """q, k: (1, T, heads, N, D)."""
    flow = am_flow(q, k)
    oracle = _eager(q.double(), k.double())
    return BlockResult(
        flow[0],
        seconds=_median_time(lambda: am_flow(q, k)),
        eager_seconds=_median_time(lambda: _eager(q, k)),
        error=(flow - oracle).abs().max().item(),
        eager_error=(_eager(q, k) - oracle).abs().max().item(),
    )


def _eager(q: Tensor, k: Tensor) -> Tensor:
    """The reference implementation, in chunks of frames whose maps fit `_EAGER_BYTES`.

    Neighbouring chunks share a frame, so every pair of frames is in one of them.
    """
    map_bytes = q.shape[2] * q.shape[3] * k.shape[3] * q.element_size()
    pairs = max(1, _EAGER_BYTES // map_bytes - 1)
    starts = range(0, q.shape[1] - 1, pairs)
    chunks = [(q[:, t : t + pairs + 1], k[:, t : t + pairs + 1]) for t in starts]
    return torch.cat([am_flow(*chunk, impl="reference") for chunk in chunks], dim=1)


def _median_time(f: Callable[[], object]) -> float:
    """Median time of five runs in seconds, or of fewer if they take more than a second together."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 1:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return median(times)


def _table(results: list[BlockResult], title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("block", "am_flow\nms", "eager\nms", "error\nam_flow", "error\neager", "spread", "min", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, result in enumerate(results):
        table.add_row(
            str(index),
            f"{1e3 * result.seconds:.1f}",
            f"{1e3 * result.eager_seconds:.1f}",
            f"{result.error:.1e}",
            f"{result.eager_error:.1e}",
            f"{result.flow.std(dim=-1).mean().item():.1e}",
            f"{result.flow.min().item():.4f}",
            f"{result.flow.max().item():.4f}",
            end_section=index == len(results) - 1,
        )
    seconds, eager_seconds = sum(r.seconds for r in results), sum(r.eager_seconds for r in results)
    table.add_row("all", f"{1e3 * seconds:.1f}", f"{1e3 * eager_seconds:.1f}")
    table.caption = (
        f"am_flow is {eager_seconds / seconds:.1f}x as fast as eager. Errors are the largest against float64; the "
        f"budget is {ERROR_BUDGET:.0e}, or twice the error of eager. Spread: standard deviation over tokens."
    )
    return table


def _draw(output: Path, name: str, numbers: list[int], clip: Tensor, flow: Tensor) -> None:
    """Writes a PNG: the two neighbouring frames that differ most, and the flow between them in every block.

    Args:
        output: the file to write.
        name: name of the video, for the title.
        numbers: indices in the video of the T frames.
        clip: (T, 3, height, width), normalised.
        flow: (blocks, T - 1, heads, N), with the class token first.
    """
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (clip * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (T, height, width, 3)
    t = int((images[1:] - images[:-1]).abs().mean(dim=(1, 2, 3)).argmax())
    height, width = clip.shape[-2:]
    signal = 1e3 * (flow[:, t].mean(dim=1) - 1)  # (blocks, N), mean over heads
    cls, heat = signal[:, 0], signal[:, 1:].unflatten(1, (height // PATCH_SIZE, width // PATCH_SIZE))

    figure = Figure(figsize=(14, max(4.5, 1.6 + 6.9 * height / width)), layout="constrained")
    title = f"AM flow of {name} in the {len(flow)} blocks of DINOv2 ViT-S/14, {width} x {height} px"
    figure.suptitle(title, fontweight="bold")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1, 3.3))
    left, right = panels
    for axes, index in zip(left.subplots(2, 1), (t, t + 1), strict=True):
        axes.imshow(images[index].numpy())
        axes.set_title(f"frame {numbers[index]}", fontsize=10)
        axes.set_axis_off()
    for block, axes in enumerate(right.subplots(3, -(-len(flow) // 3)).flat):
        axes.imshow(images[t].mean(dim=-1).numpy(), cmap="gray", vmin=-0.2, vmax=1.2)
        image = axes.imshow(
            heat[block].numpy(),
            cmap="inferno",
            vmax=heat[block].quantile(0.995).item(),  # a few outlier tokens would darken all others
            alpha=0.75,
            extent=(0, width, height, 0),
        )
        axes.set_title(f"block {block}  (class token {cls[block].item():+.1f})", fontsize=9)
        axes.set_axis_off()
        bar = right.colorbar(image, ax=axes, shrink=0.85, pad=0.02, extend="max")
        bar.ax.tick_params(labelsize=7)
    right.supxlabel(
        "1000 x (flow - 1), mean over heads: bright where attention to a patch changes between the two frames.\n"
        "Each block has its own scale, cut at the 99.5th percentile.",
        fontsize=10,
    )
    with finished(output) as part:
        figure.savefig(part, format="png", dpi=100)
