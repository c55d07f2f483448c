"""``amflow visualize``: pictures of AM flow, motion maps and their principal components for every pair of frames.

Needs ``pip install 'amflow-kernels[demo]'``; importing this module does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amflow_kernels.api import am_flow
from amflow_kernels.demo import DemoError, check_output
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.motion import motion_maps, motion_pca
from amflow_kernels.offline import demo_extra, dinov2_vit_small, iterate_frames

OFFLINE_MODEL = "vit_small_patch14_dinov2"
CUT = 0.995  # quantile at which a colour scale ends: a few outlier tokens would darken all others


@dataclass(frozen=True)
class Pictures:
    """What is drawn of one block and one pair of frames, on the grid of patches."""

    flow: Tensor  # (height, width): mean over heads of flow - 1
    rows: Tensor  # (height, width): how much attention from a patch changes, in L1
    columns: Tensor  # (height, width): how much attention to a patch changes, in L1
    pca: Tensor  # (height, width, 3) in [0, 1]: the rows' first three principal components


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
    chosen = list(range(len(vit.blocks))) if blocks is None else sorted(set(blocks))
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
            for pair in pictures(vit, chosen, video, size, every, start):
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
        import timm
    try:
        if weights == "offline":
            if model != OFFLINE_MODEL:
                raise DemoError(f"--weights offline: there are none of {model}, only of {OFFLINE_MODEL}")
            vit: Any = dinov2_vit_small(size)
        else:
            options: dict[str, Any] = {"num_classes": 0, "img_size": size, "pretrained": True}
            if weights != "hub":
                if not Path(weights).is_file():
                    raise DemoError(f"--weights: expected 'offline', 'hub' or a file, and there is no file {weights}")
                options["pretrained_cfg_overlay"] = {"file": weights}
            vit = timm.create_model(model, **options).eval()
    except (DemoError, ModuleNotFoundError):
        raise
    except Exception as error:  # of timm, of a file's reader, of the hub: they have no common ancestor
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DemoError(f"--model {model} --weights {weights} at {size} px: {reason}") from error
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks"):
        raise DemoError(f"--model {model}: expected a plain vision transformer, got {type(vit).__name__}")
    return vit


@dataclass(frozen=True)
class Pair:
    """Two frames, their places in the video, and the pictures of each block."""

    numbers: tuple[int, int]
    images: tuple[Tensor, Tensor]  # (3, size, size) in [0, 1]
    blocks: dict[int, Pictures]


@torch.inference_mode()
def pictures(vit: Any, blocks: Sequence[int], video: Path, size: int, every: int, start: int) -> Iterator[Pair]:
    """The pairs of neighbouring frames that are taken, as they are read."""
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    before: tuple[int, Tensor, dict[int, tuple[Tensor, Tensor]]] | None = None
    frames = iterate_frames(video, every, size, start=start)
    while True:
        try:
            number, image = next(frames)
        except StopIteration:
            return
        except (FileNotFoundError, ValueError) as error:
            raise DemoError(str(error)) from error
        try:
            with record_qk(vit, blocks=blocks) as qk:
                vit(((image - mean) / std).unsqueeze(0))
        except RuntimeError as error:
            raise DemoError(f"the model can't be read: {error}") from error
        now = number, image, {block: (q.clone(), k.clone()) for block, (q, k) in qk.items()}
        if before is not None:
            drawn = {block: _draw_block(vit, before[2][block], now[2][block]) for block in blocks}
            yield Pair((before[0], number), (before[1], image), drawn)
        before = now


def _draw_block(vit: Any, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Pictures:
    """before, now: q and k (1, heads, N, D) of two frames."""
    q, k = (torch.stack(pair, 1) for pair in zip(before, now, strict=True))  # (1, 2, heads, N, D)
    grid = tuple(vit.patch_embed.grid_size)

    def on_grid(x: Tensor) -> Tensor:  # (1, 1, N, ...)
        return x[0, 0, vit.num_prefix_tokens :].unflatten(0, grid)

    rows, columns = motion_maps(q, k, head_reduction="mean")
    scores = motion_pca(q, k, head_reduction="mean").scores
    low, high = scores.quantile(1 - CUT, dim=-2, keepdim=True), scores.quantile(CUT, dim=-2, keepdim=True)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    flow = am_flow(q, k, head_reduction="mean", center=True)
    return Pictures(on_grid(flow), on_grid(rows), on_grid(columns), on_grid(colours))


KINDS = (
    ("flow", "1000 (flow - 1)", 1e3, "inferno"),
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
        figure = Figure(figsize=(3.4 + 1.7 * count, 8), layout="constrained")
        title = f"{video.name}, frames {pair.numbers[0]} and {pair.numbers[1]}: {model}, {size} px, mean over heads"
        figure.suptitle(title, fontweight="bold")
        panels: Any = figure.subfigures(1, 2, width_ratios=(1.6, 1.8 + 1.7 * count))
        for axes, image, number in zip(panels[0].subplots(2, 1), pair.images, pair.numbers, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(f"frame {number}", fontsize=10)
            axes.set_axis_off()
        table = panels[1].subplots(len(KINDS) + 1, count, squeeze=False)
        for line, (kind, label, unit, colours) in zip(table, KINDS, strict=False):
            heat = {block: unit * getattr(drawn, kind) for block, drawn in pair.blocks.items()}
            every_value = torch.cat([x.flatten() for x in heat.values()])
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
            f"Each row has one scale, from its least value to its {CUT:.1%} quantile.\n"
            "In the last, patches whose attention changes alike have like colours.",
            fontsize=9,
        )
        path = folder / f"pair_{pair.numbers[0]:05d}_{pair.numbers[1]:05d}.png"
        try:
            figure.savefig(path, format="png", dpi=90)
        except OSError as error:
            raise DemoError(f"{path}: can't be written ({error.strerror})") from error


def _overlay_video(output: Path, video: Path) -> Any:
    """Coroutine: a video of the frames it is sent, with the flow of each block over them, side by side.

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
                level = (drawn.flow / largest[block]).clamp(0, 1)
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
