"""``amflow visualize``: pictures of AM flow, motion maps and their principal components for every pair of frames.

Running it needs ``pip install 'amflow-kernels[demo]'``; importing this module needs only torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, nn

from amflow_kernels.api import am_flow, am_flow_pair
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.motion import motion_maps, motion_pca
from amflow_models.cli.arguments import DEFAULT, VIDEO_HELP, add_frame_arguments, at_least, video_path
from amflow_models.cli.demo import check_output
from amflow_models.cli.drawing import CUT, finished, overlay, side_by_side, video_writer
from amflow_models.cli.errors import CommandError, needs_extra
from amflow_models.cli.offline import iterate_frames

OFFLINE_MODEL = "vit_small_patch14_dinov2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status 0. Failures raise what `run` raises."""
    args = _parser().parse_args(arguments)
    video = video_path(args.video)
    output = args.output or Path(f"amflow_{video.stem}")
    pairs = run(
        video,
        output,
        model=args.model,
        weights=args.weights,
        size=args.size,
        blocks=args.blocks,
        every=args.every,
        start=args.start,
        pairs=args.pairs,
        alignment=args.compare_alignment,
    )
    print(f"{pairs} pairs of frames: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow visualize",
        description="Draws, for every pair of frames and every block of a vision transformer: AM flow, how much "
        "attention to and from each patch changes, and the principal components of that change as colours. Writes a "
        "PNG for each pair, or an overlay video of the flow.",
    )
    parser.add_argument("video", metavar="VIDEO", help=VIDEO_HELP)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="a folder for PNG files (default: amflow_ and the video's name), or a video file that ends in .mp4",
    )
    parser.add_argument(
        "--model", default=OFFLINE_MODEL, metavar="NAME", help=f"a plain vision transformer of timm {DEFAULT}"
    )
    parser.add_argument(
        "--weights",
        default="offline",
        metavar="FILE|offline|hub",
        help=f"a file, offline (DINOv2 ViT-S/14 from the demo extra), or hub (timm's pretrained weights) {DEFAULT}",
    )
    parser.add_argument(
        "--size", type=at_least(14), default=224, metavar="PIXELS", help=f"side of the square input {DEFAULT}"
    )
    parser.add_argument("--blocks", type=at_least(0), nargs="+", metavar="N", help="draw only these blocks")
    add_frame_arguments(parser)
    parser.add_argument("--pairs", type=at_least(1), metavar="P", help="draw at most this many pairs")
    parser.add_argument(
        "--compare-alignment",
        type=Path,
        metavar="FILE",
        help="draw the flow with and without aligning encoders, from a file written by amflow_models.save_trained",
    )
    return parser


@dataclass(frozen=True)
class Pictures:
    """The quantities drawn for one block and one pair of frames, on the grid of patches."""

    flow: Tensor  # (height, width): mean over heads of flow - 1
    rows: Tensor  # (height, width): how much attention from a patch changes, in L1
    columns: Tensor  # (height, width): how much attention to a patch changes, in L1
    pca: Tensor  # (height, width, 3) in [0, 1]: the rows' first three principal components
    aligned: Tensor | None = None  # (height, width): flow after the second frame was aligned to the first


def run(
    video: Path,
    output: Path,
    *,
    model: str = OFFLINE_MODEL,
    weights: str = "offline",
    size: int = 224,
    blocks: Sequence[int] | None = None,
    every: int = 2,
    start: int = 0,
    pairs: int | None = None,
    alignment: Path | None = None,
) -> int:
    """Draws the pairs of neighbouring frames of a video, with only two frames in memory at a time.

    Args:
        video: any file that FFmpeg reads, or a folder of frames.
        output: a folder for one PNG per pair, created if it does not exist; or an overlay video, if it ends in .mp4.
        model: name of a plain vision transformer of timm.
        weights: ``"offline"`` (only for DINOv2 ViT-S/14), ``"hub"`` (timm's pretrained weights) or a file.
        size: side of the square input in pixels, a multiple of the patch size.
        blocks: indices of the blocks to draw, from 0; None draws all.
        every: step between the frames taken, at least 1.
        start: index of the first frame taken, from 0.
        pairs: the largest number of pairs to draw; None draws all.
        alignment: a file of trained aligning encoders. The flow is drawn with and without them, in the blocks that have
            an encoder, of which `blocks` may select some. The encoders run on the tokens of the model without the
            adapters that were trained beside them.

    Returns:
        The number of pairs drawn.

    Raises:
        CommandError: the video, the model or the output can't be used.
        MissingPackageError: a package of the demo extra is missing; the message says how to install it.
    """
    overlay = output.suffix.lower() == ".mp4"
    if overlay:
        check_output(output, video)
    elif output.exists() and not output.is_dir():
        raise CommandError(f"{output}: expected a folder, or a name that ends in .mp4")
    with needs_extra("demo"):
        import matplotlib  # noqa: F401 -- reports a missing package before the work, not after it
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    vit: Any = load(model, weights, size)
    encoders = {} if alignment is None else _load_encoders(alignment, vit)
    chosen = sorted(encoders) or list(range(len(vit.blocks)))
    if blocks is not None:
        if encoders and not set(blocks) <= set(encoders):
            raise CommandError(f"blocks: {alignment} has aligning encoders of {sorted(encoders)}, got {list(blocks)}")
        if not all(0 <= block < len(vit.blocks) for block in blocks):
            raise CommandError(f"blocks: expected numbers from 0 to {len(vit.blocks) - 1}, got {list(blocks)}")
        chosen = sorted(set(blocks))
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    done = 0
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("load")
        drawing = _overlay_video(output) if overlay else _png_files(output, video, model, size)
        with drawing as draw:
            for pair in pictures(vit, chosen, video, size, every, start, encoders):
                draw(pair)
                done += 1
                progress.update(task, description=f"{done} pairs of frames")
                if done == pairs:
                    break
    if not done:
        raise CommandError(f"{video}: has no two frames, 1 in {every} from frame {start}")
    return done


def load(model: str, weights: str, size: int) -> nn.Module:
    """Creates a plain vision transformer of timm in eval mode, with weights from a package, timm's hub or a file.

    Raises:
        CommandError: the name, the weights or the size can't be used.
        MissingPackageError: a package is missing.
    """
    with needs_extra("demo"):
        from amflow_models import create_backbone
    try:
        vit: Any = create_backbone(model, weights, size)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"--model {model} --weights {weights} at {size} px: {str(error).splitlines()[0]}") from error
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks"):
        raise CommandError(f"--model {model}: expected a plain vision transformer, got {type(vit).__name__}")
    return vit


def _load_encoders(path: Path, vit: Any) -> dict[int, nn.Module]:
    """The aligning encoders of a file, by block."""
    with needs_extra("demo"):
        from amflow_models import load_aligning_encoders

    try:
        encoders: dict[int, Any] = dict(load_aligning_encoders(path))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CommandError(f"--compare-alignment: {str(error).splitlines()[0]}") from error
    for block, encoder in encoders.items():
        if block >= len(vit.blocks) or encoder.query.in_features != vit.embed_dim:
            raise CommandError(
                f"--compare-alignment: {path} is of block {block} and {encoder.query.in_features} channels; "
                f"the model has {len(vit.blocks)} blocks and {vit.embed_dim} channels"
            )
    return encoders


@dataclass(frozen=True)
class Pair:
    """Two frames and the pictures of each block."""

    numbers: tuple[int, int]  # indices in the video
    images: tuple[Tensor, Tensor]  # (3, size, size) in [0, 1]
    blocks: dict[int, Pictures]


@dataclass(frozen=True)
class _Recorded:
    """What one block computed for one frame."""

    q: Tensor  # (1, heads, N, D)
    k: Tensor  # (1, heads, N, D)
    inputs: tuple[Any, Any] | None  # positional arguments, with tokens (1, N, C) first, and keyword arguments


@torch.inference_mode()
def pictures(
    vit: Any,
    blocks: Sequence[int],
    video: Path,
    size: int,
    every: int,
    start: int,
    encoders: Mapping[int, nn.Module] | None = None,
) -> Iterator[Pair]:
    """Yields the pairs of neighbouring frames that are taken, while reading the video.

    Args:
        vit: a plain vision transformer of timm.
        blocks: indices of the blocks to draw.
        video: any file that FFmpeg reads, or a folder of frames.
        size: side of the square input in pixels.
        every: step between the frames taken.
        start: index of the first frame taken.
        encoders: aligning encoders by block; their inputs are recorded for `Pictures.aligned`.

    Raises:
        CommandError: the video or the model can't be used.
    """
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    encoders = encoders or {}
    previous: tuple[int, Tensor, dict[int, _Recorded]] | None = None
    for number, image in _frames(video, every, size, start):
        try:
            with record_qk(vit, blocks=blocks) as qk, _inputs(vit, encoders) as inputs:
                vit(((image - mean) / std).unsqueeze(0))
        except RuntimeError as error:
            raise CommandError(f"the model can't be read: {error}") from error
        recorded = {block: _Recorded(q.clone(), k.clone(), inputs.get(block)) for block, (q, k) in qk.items()}
        if previous is not None:
            drawn = {b: _draw_block(vit, b, previous[2][b], recorded[b], encoders.get(b)) for b in blocks}
            yield Pair((previous[0], number), (previous[1], image), drawn)
        previous = number, image, recorded


def _frames(video: Path, every: int, size: int, start: int) -> Iterator[tuple[int, Tensor]]:
    """`iterate_frames`, with its errors as `CommandError`."""
    try:
        yield from iterate_frames(video, every, size, start=start)
    except ValueError as error:
        raise CommandError(str(error)) from error


@contextmanager
def _inputs(vit: Any, blocks: Iterable[int]) -> Iterator[dict[int, tuple[Any, Any]]]:
    """Records the positional and keyword arguments of blocks, by block."""
    inputs: dict[int, tuple[Any, Any]] = {}

    def record(block: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[block] = (args[0].clone(), *args[1:]), kwargs

        return hook

    hooks = [vit.blocks[block].register_forward_pre_hook(record(block), with_kwargs=True) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _draw_block(vit: Any, block: int, first: _Recorded, second: _Recorded, encoder: nn.Module | None) -> Pictures:
    """The pictures of one block for two frames."""
    q, k = (torch.stack(pair, 1) for pair in ((first.q, second.q), (first.k, second.k)))  # (1, 2, heads, N, D)
    grid = tuple(vit.patch_embed.grid_size)
    options: Any = {"head_reduction": "mean", "center": True}

    def on_grid(x: Tensor) -> Tensor:  # (1, 1, N, ...) -> (height, width, ...)
        return x[0, 0, vit.num_prefix_tokens :].unflatten(0, grid)

    rows, columns = motion_maps(q, k, head_reduction="mean")
    scores = motion_pca(q, k, head_reduction="mean").scores
    low, high = scores.quantile(1 - CUT, dim=-2, keepdim=True), scores.quantile(CUT, dim=-2, keepdim=True)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    aligned = None
    if encoder is not None and first.inputs is not None and second.inputs is not None:
        q_aligned, k_aligned = _aligned_qk(vit, block, first.inputs, second.inputs, encoder)
        aligned = on_grid(am_flow_pair(q[:, :1], k[:, :1], q_aligned.unsqueeze(1), k_aligned.unsqueeze(1), **options))
    return Pictures(on_grid(am_flow(q, k, **options)), on_grid(rows), on_grid(columns), on_grid(colours), aligned)


def _aligned_qk(
    vit: Any, block: int, first: tuple[Any, Any], second: tuple[Any, Any], encoder: nn.Module
) -> tuple[Tensor, Tensor]:
    """q and k of the second frame after its tokens were aligned to those of the first; both (1, heads, N, D)."""
    from amflow_models import read_qk

    (tokens, *args), kwargs = second
    return read_qk(vit.blocks[block], f"blocks.{block}", encoder(first[0][0], tokens), *args, **kwargs)


_ROWS = (  # field of Pictures, label, unit, colours
    ("flow", "1000 (flow - 1)", 1e3, "inferno"),
    ("aligned", "1000 (flow - 1),\naligned", 1e3, "inferno"),
    ("columns", "change of attention\nto a patch, L1", 1.0, "cividis"),
    ("rows", "change of attention\nfrom a patch, L1", 1.0, "cividis"),
)


@contextmanager
def _png_files(folder: Path, video: Path, model: str, size: int) -> Iterator[Callable[[Pair], None]]:
    """Gives a function that writes a PNG for a pair."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder}: can't be made ({error.strerror})") from error

    def draw(pair: Pair) -> None:
        title = f"{video.name}, frames {pair.numbers[0]} and {pair.numbers[1]}\n{model}, {size} px, mean over heads"
        figure = _figure(pair, title)
        with finished(folder / f"pair_{pair.numbers[0]:05d}_{pair.numbers[1]:05d}.png") as part:
            figure.savefig(part, format="png", dpi=90)

    yield draw


def _figure(pair: Pair, title: str) -> Any:
    """A figure with the two frames at the left, and a column of pictures for each block at the right."""
    from matplotlib.figure import Figure

    count = len(pair.blocks)
    compared = all(drawn.aligned is not None for drawn in pair.blocks.values())
    figure = Figure(figsize=(3.4 + 1.7 * count, 8 + 1.7 * compared), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.6, 1.8 + 1.7 * count))
    for axes, image, number in zip(panels[0].subplots(2, 1), pair.images, pair.numbers, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"frame {number}", fontsize=10)
        axes.set_axis_off()
    rows = [row for row in _ROWS if compared or row[0] != "aligned"]
    table = panels[1].subplots(len(rows) + 1, count, squeeze=False)
    for line, row in zip(table, rows, strict=False):
        _draw_row(panels[1], line, pair, *row)
    for axes, drawn in zip(table[-1], pair.blocks.values(), strict=True):
        axes.imshow(drawn.pca.numpy())
    table[-1][0].set_ylabel("PCA of |A - A'|'s\nrows, as RGB", fontsize=8)
    for axes in table.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    panels[1].supxlabel(_caption(compared, width=30 + 26 * count), fontsize=9)
    return figure


def _caption(compared: bool, width: int) -> str:
    """What the colours mean, in lines of at most `width` characters."""
    sentences = (
        f"Each row has one colour scale, from its minimum to its {CUT:.1%} quantile"
        f"{'; the aligned flow has the scale of the flow' if compared else ''}.",
        "In the last row, similar colours mark patches whose attention changes in similar ways.",
    )
    return "\n".join(fill(sentence, width) for sentence in sentences)


def _draw_row(panel: Any, line: Any, pair: Pair, field: str, label: str, unit: float, colours: str) -> None:
    """Draws one quantity for all blocks, with one colour scale."""
    heat = {block: unit * getattr(drawn, field) for block, drawn in pair.blocks.items()}
    # The flow with alignment is drawn on the scale of the flow without, so that the two can be compared.
    scaled = {block: unit * drawn.flow for block, drawn in pair.blocks.items()} if field == "aligned" else heat
    values = torch.cat([x.flatten() for x in scaled.values()])
    low, high = values.min().item(), values.quantile(CUT).item()
    for axes, (block, x) in zip(line, heat.items(), strict=True):
        image = axes.imshow(x.numpy(), cmap=colours, vmin=low, vmax=max(high, low + 1e-12))
        axes.set_title(f"block {block}" if field == "flow" else "", fontsize=9)
    panel.colorbar(image, ax=list(line), shrink=0.85, pad=0.01, extend="max").ax.tick_params(labelsize=7)
    line[0].set_ylabel(label, fontsize=8)


@contextmanager
def _overlay_video(output: Path) -> Iterator[Callable[[Pair], None]]:
    """Gives a function that adds a frame to a video: the first of a pair, beside the same frame under the flow of each
    block, and under the aligned flow if there is one.

    The colour scale of a block ends at the largest `CUT` quantile so far.
    """
    largest: dict[int, float] = {}
    with video_writer(output) as write:
        yield lambda pair: write(side_by_side(_overlays(pair, largest)))


def _overlays(pair: Pair, largest: dict[int, float]) -> list[Tensor]:
    """The first frame, then the frame under each block's flow, (3, size, size) each; updates `largest` by block."""
    image = pair.images[0]
    tiles = [image]
    for block, drawn in pair.blocks.items():
        largest[block] = max(largest.get(block, 1e-12), drawn.flow.quantile(CUT).item())
        tiles += [overlay(image, x, largest[block]) for x in (drawn.flow, drawn.aligned) if x is not None]
    return tiles
