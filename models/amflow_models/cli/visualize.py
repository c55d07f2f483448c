"""``amflow visualize``: pictures of AM flow, motion maps and their principal components for every pair of frames.

Needs ``pip install 'amflow-kernels[demo]'``; importing this module does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amflow_kernels.api import am_flow, am_flow_pair
from amflow_models.cli.demo import DemoError, check_output
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.motion import motion_maps, motion_pca
from amflow_models.cli.offline import demo_extra, iterate_frames

OFFLINE_MODEL = "vit_small_patch14_dinov2"
CUT = 0.995  # quantile at which a colour scale ends: a few outlier tokens would darken all others


@dataclass(frozen=True)
class Pictures:
    """What is drawn of one block and one pair of frames, on the grid of patches."""

    flow: Tensor  # (height, width): mean over heads of flow - 1
    rows: Tensor  # (height, width): how much attention from a patch changes, in L1
    columns: Tensor  # (height, width): how much attention to a patch changes, in L1
    pca: Tensor  # (height, width, 3) in [0, 1]: the rows' first three principal components
    aligned: Tensor | None = None  # (height, width): flow once the second frame is on the first one's grid


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
    """Draws a video's pairs of frames; returns how many. Only two frames are in memory at a time.

    Args:
        video: any file that FFmpeg reads.
        output: a folder for a PNG per pair, made if it is not there; or, ending in .mp4, an overlay video.
        model: a plain vision transformer of timm.
        weights: ``"offline"`` (DINOv2 ViT-S/14 alone), ``"hub"`` (timm's pretrained ones) or a file of them.
        size: side of the square input in pixels, a multiple of the patch size.
        blocks: which are drawn, from 0; None means all.
        every: one frame in so many is taken.
        start: the first frame taken, from 0.
        pairs: how many are drawn at most; None means all.
        alignment: a file of trained aligning encoders: the flow is drawn with and without them, in the blocks that have
            one (of `blocks`, if given). They run on the model's own tokens, without the adapters trained beside them.

    Raises:
        DemoError: the video, the model or the output can't be used.
        ModuleNotFoundError: a package of the demo extra is missing; the message says how to install it.
    """
    overlay = output.suffix.lower() == ".mp4"
    if overlay:
        check_output(output, video)
    elif output.exists() and not output.is_dir():
        raise DemoError(f"{output}: expected a folder, or a name that ends in .mp4")
    with demo_extra():
        import matplotlib  # noqa: F401 -- if it is missing, say so before the work and not after it
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    vit: Any = load(model, weights, size)
    encoders = {} if alignment is None else _load_encoders(alignment, vit)
    every_block = sorted(encoders) or range(len(vit.blocks))
    chosen = list(every_block) if blocks is None else sorted(set(blocks))
    if encoders and not set(chosen) <= set(encoders):
        raise DemoError(f"blocks: {alignment} has aligning encoders of {sorted(encoders)}, got {list(blocks or ())}")
    if not all(0 <= block < len(vit.blocks) for block in chosen):
        raise DemoError(f"blocks: expected numbers from 0 to {len(vit.blocks) - 1}, got {list(blocks or ())}")
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    done = 0
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("load")
        drawing = _overlay_video(output, video) if overlay else _png_files(output, video, model, size)
        with closing(drawing) as draw:
            next(draw)
            for pair in pictures(vit, chosen, video, size, every, start, encoders):
                draw.send(pair)
                done += 1
                progress.update(task, description=f"{done} pairs of frames")
                if done == pairs:
                    break
    if not done:
        raise DemoError(f"{video}: has no two frames, 1 in {every} from frame {start}")
    return done


def load(model: str, weights: str, size: int) -> nn.Module:
    """A plain vision transformer of timm in eval mode, with weights from a package, timm's hub or a file."""
    with demo_extra():
        from amflow_models import create_backbone
    try:
        vit: Any = create_backbone(model, weights, size)
    except (ValueError, RuntimeError) as error:
        raise DemoError(f"--model {model} --weights {weights} at {size} px: {str(error).splitlines()[0]}") from error
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks"):
        raise DemoError(f"--model {model}: expected a plain vision transformer, got {type(vit).__name__}")
    return vit


def _load_encoders(path: Path, vit: Any) -> dict[int, nn.Module]:
    """Aligning encoders by block."""
    from amflow_models import load_aligning_encoders

    try:
        encoders: dict[int, Any] = dict(load_aligning_encoders(path))
    except (ValueError, RuntimeError, KeyError) as error:
        raise DemoError(f"--compare-alignment: {str(error).splitlines()[0]}") from error
    for block, encoder in encoders.items():
        if block >= len(vit.blocks) or encoder.query.in_features != vit.embed_dim:
            raise DemoError(
                f"--compare-alignment: {path} is of block {block} and {encoder.query.in_features} channels; "
                f"the model has {len(vit.blocks)} blocks and {vit.embed_dim} channels"
            )
    return encoders


@dataclass(frozen=True)
class Pair:
    """Two frames, their places in the video, and the pictures of each block."""

    numbers: tuple[int, int]
    images: tuple[Tensor, Tensor]  # (3, size, size) in [0, 1]
    blocks: dict[int, Pictures]


@dataclass(frozen=True)
class _Seen:
    """What a frame left in a block."""

    q: Tensor  # (1, heads, N, D)
    k: Tensor  # (1, heads, N, D)
    entered: (
        tuple[Any, Any] | None
    )  # what the block was called with, its tokens (1, N, C) first, where frames are aligned


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
    """The pairs of neighbouring frames that are taken, as they are read."""
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    encoders = encoders or {}
    before: tuple[int, Tensor, dict[int, _Seen]] | None = None
    frames = iterate_frames(video, every, size, start=start)
    while True:
        try:
            number, image = next(frames)
        except StopIteration:
            return
        except (FileNotFoundError, ValueError) as error:
            raise DemoError(str(error)) from error
        try:
            with record_qk(vit, blocks=blocks) as qk, _inputs(vit, encoders) as entered:
                vit(((image - mean) / std).unsqueeze(0))
        except RuntimeError as error:
            raise DemoError(f"the model can't be read: {error}") from error
        seen = {block: _Seen(q.clone(), k.clone(), entered.get(block)) for block, (q, k) in qk.items()}
        if before is not None:
            drawn = {b: _draw_block(vit, b, before[2][b], seen[b], encoders.get(b)) for b in blocks}
            yield Pair((before[0], number), (before[1], image), drawn)
        before = number, image, seen


@contextmanager
def _inputs(vit: Any, blocks: Iterable[int]) -> Iterator[dict[int, tuple[Any, Any]]]:
    """What blocks are called with, by block."""
    entered: dict[int, tuple[Any, Any]] = {}

    def keep(block: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            entered[block] = (args[0].clone(), *args[1:]), kwargs

        return hook

    hooks = [vit.blocks[block].register_forward_pre_hook(keep(block), with_kwargs=True) for block in blocks]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _draw_block(vit: Any, block: int, before: _Seen, now: _Seen, encoder: nn.Module | None) -> Pictures:
    q, k = (torch.stack(pair, 1) for pair in ((before.q, now.q), (before.k, now.k)))  # (1, 2, heads, N, D)
    grid = tuple(vit.patch_embed.grid_size)
    options: Any = {"head_reduction": "mean", "center": True}

    def on_grid(x: Tensor) -> Tensor:  # (1, 1, N, ...)
        return x[0, 0, vit.num_prefix_tokens :].unflatten(0, grid)

    rows, columns = motion_maps(q, k, head_reduction="mean")
    scores = motion_pca(q, k, head_reduction="mean").scores
    low, high = scores.quantile(1 - CUT, dim=-2, keepdim=True), scores.quantile(CUT, dim=-2, keepdim=True)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    aligned = None
    if encoder is not None and before.entered is not None and now.entered is not None:
        from amflow_models import read_qk

        (tokens, *args), kwargs = now.entered
        q_now, k_now = read_qk(
            vit.blocks[block], f"blocks.{block}", encoder(before.entered[0][0], tokens), *args, **kwargs
        )
        aligned = on_grid(am_flow_pair(q[:, :1], k[:, :1], q_now.unsqueeze(1), k_now.unsqueeze(1), **options))
    return Pictures(on_grid(am_flow(q, k, **options)), on_grid(rows), on_grid(columns), on_grid(colours), aligned)


KINDS = (
    ("flow", "1000 (flow - 1)", 1e3, "inferno"),
    ("aligned", "1000 (flow - 1),\naligned", 1e3, "inferno"),
    ("columns", "change of attention\nto a patch, L1", 1.0, "cividis"),
    ("rows", "change of attention\nfrom a patch, L1", 1.0, "cividis"),
)


def _png_files(folder: Path, video: Path, model: str, size: int) -> Any:
    """Coroutine: a PNG for each pair that it is sent."""
    from matplotlib.figure import Figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"{folder}: can't be made ({error.strerror})") from error
    while True:
        pair: Pair = yield
        count = len(pair.blocks)
        compared = all(drawn.aligned is not None for drawn in pair.blocks.values())
        figure = Figure(figsize=(3.4 + 1.7 * count, 8 + 1.7 * compared), layout="constrained")
        title = f"{video.name}, frames {pair.numbers[0]} and {pair.numbers[1]}\n{model}, {size} px, mean over heads"
        figure.suptitle(title, fontweight="bold")
        panels: Any = figure.subfigures(1, 2, width_ratios=(1.6, 1.8 + 1.7 * count))
        for axes, image, number in zip(panels[0].subplots(2, 1), pair.images, pair.numbers, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(f"frame {number}", fontsize=10)
            axes.set_axis_off()
        kinds = [kind for kind in KINDS if compared or kind[0] != "aligned"]
        table = panels[1].subplots(len(kinds) + 1, count, squeeze=False)
        for line, (kind, label, unit, colours) in zip(table, kinds, strict=False):
            heat = {block: unit * getattr(drawn, kind) for block, drawn in pair.blocks.items()}
            # With and without alignment are compared, on the scale of without.
            scaled = {b: unit * drawn.flow for b, drawn in pair.blocks.items()} if kind == "aligned" else heat
            every_value = torch.cat([x.flatten() for x in scaled.values()])
            low, high = every_value.min().item(), every_value.quantile(CUT).item()
            for axes, (block, x) in zip(line, heat.items(), strict=True):
                drawn = axes.imshow(x.numpy(), cmap=colours, vmin=low, vmax=max(high, low + 1e-12))
                axes.set_title(f"block {block}" if kind == "flow" else "", fontsize=9)
            panels[1].colorbar(drawn, ax=list(line), shrink=0.85, pad=0.01, extend="max").ax.tick_params(labelsize=7)
            line[0].set_ylabel(label, fontsize=8)
        for axes, block_pictures in zip(table[-1], pair.blocks.values(), strict=True):
            axes.imshow(block_pictures.pca.numpy())
        table[-1][0].set_ylabel("PCA of |A - A'|'s\nrows, as RGB", fontsize=8)
        for axes in table.flat:
            axes.set_xticks([])
            axes.set_yticks([])
        panels[1].supxlabel(
            f"Each row has one scale, from its least value to its {CUT:.1%} quantile"
            f"{', the aligned one that of the flow' if compared else ''}.\n"
            "In the last, patches whose attention changes alike have like colours.",
            fontsize=9,
        )
        path = folder / f"pair_{pair.numbers[0]:05d}_{pair.numbers[1]:05d}.png"
        try:
            figure.savefig(path, format="png", dpi=90)
        except OSError as error:
            raise DemoError(f"{path}: can't be written ({error.strerror})") from error


def _overlay_video(output: Path, video: Path) -> Any:
    """Coroutine: a video of the frames it is sent, with the flow of each block over them, then the aligned one.

    The colour scale of a block ends at the largest `CUT` quantile so far.
    """
    with demo_extra():
        import av
    from matplotlib import colormaps

    colours = colormaps["inferno"]
    largest: dict[int, float] = {}
    container: Any = None
    stream: Any = None
    try:
        while True:
            try:
                pair: Pair = yield
            except GeneratorExit:  # no more frames
                if container is not None:
                    container.mux(stream.encode())
                return
            image = pair.images[0]
            tiles = [image]
            for block, drawn in pair.blocks.items():
                largest[block] = max(largest.get(block, 1e-12), drawn.flow.quantile(CUT).item())
                for flow in (drawn.flow, drawn.aligned):
                    if flow is not None:
                        level = (flow / largest[block]).clamp(0, 1)
                        heat = torch.from_numpy(colours(level.numpy())[..., :3]).permute(2, 0, 1)
                        heat = nn.functional.interpolate(heat[None].float(), image.shape[1:], mode="nearest")[0]
                        tiles.append(0.35 * image.mean(0, keepdim=True) + 0.65 * heat)
            frame = _side_by_side(tiles)
            if container is None:
                container = av.open(str(output), "w")
                stream = container.add_stream("libx264", rate=12)
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise DemoError(f"{output}: can't be written ({error})") from error
    finally:
        if container is not None:
            container.close()


def _side_by_side(tiles: Sequence[Tensor]) -> Any:
    """Images (3, size, size) in [0, 1] as one, uint8 (height, width, 3), at most five in a row."""
    across = min(5, len(tiles))
    down = -(-len(tiles) // across)
    size = tiles[0].shape[-1] // 2 * 2  # video frames have even sides
    sheet = torch.zeros(3, down * size, across * size)
    for n, tile in enumerate(tiles):
        top, left = n // across * size, n % across * size
        sheet[:, top : top + size, left : left + size] = tile[:, :size, :size]
    return (255 * sheet).round().byte().permute(1, 2, 0).contiguous().numpy()
