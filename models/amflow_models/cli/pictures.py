"""What ``amflow visualize`` draws: AM flow, motion maps and their principal components of pairs of frames.

Running it needs ``pip install 'amflow-kernels[demo]'``; importing this module needs only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from amflow_kernels.api import am_flow, am_flow_pair
from amflow_kernels.integrations.timm import record_qk
from amflow_kernels.motion import motion_maps, motion_pca
from amflow_models.cli.drawing import CUT
from amflow_models.cli.errors import CommandError
from amflow_models.cli.offline import iterate_frames

_Result = TypeVar("_Result")

_LMS_TO_RGB = torch.tensor(
    (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
)


@dataclass(frozen=True)
class Pictures:
    """The quantities drawn for one block and one pair of frames, on the grid of patches."""

    flow: Tensor  # (height, width): mean over heads of flow - 1
    rows: Tensor  # (height, width): how much attention from a patch changes, in L1
    columns: Tensor  # (height, width): how much attention to a patch changes, in L1
    pca: Tensor  # (height, width, 3) in [0, 1]: the rows' first three principal components
    aligned: Tensor | None = None  # (height, width): flow after the second frame was aligned to the first

    def pca_colours(self) -> Tensor:
        """The principal components as colours (height, width, 3) in [0, 1], sRGB.

        The first is lightness, the second goes from blue to yellow, and only the third from green to red: those who
        can't tell red from green see the first two. The colours are those of Oklab (Ottosson, "A perceptual color space
        for image processing", 2020), in which equal steps look about equal.
        """
        first, second, third = self.pca.unbind(-1)
        L, a, b = 0.35 + 0.55 * first, 0.2 * (third - 0.5), 0.3 * (second - 0.5)
        lms = torch.stack(
            (
                L + 0.3963377774 * a + 0.2158037573 * b,
                L - 0.1055613458 * a - 0.0638541728 * b,
                L - 0.0894841775 * a - 1.2914855480 * b,
            ),
            -1,
        )
        linear = (lms**3 @ _LMS_TO_RGB.T).clamp(0, 1)
        return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@dataclass(frozen=True)
class Pair:
    """Two frames and the pictures of each block."""

    numbers: tuple[int, int]  # indices in the video
    images: tuple[Tensor, Tensor]  # (3, height, width) in [0, 1], as the model saw them
    blocks: dict[int, Pictures]


class Flows(NamedTuple):
    """The flows of a pair of frames, without the frames."""

    numbers: tuple[int, int]  # of the frames
    blocks: dict[int, tuple[Tensor, Tensor | None]]  # flow - 1 and aligned flow - 1, (height, width) each


@dataclass(frozen=True)
class _Recorded:
    """What one block computed for one frame."""

    q: Tensor  # (1, heads, N, D)
    k: Tensor  # (1, heads, N, D)
    inputs: tuple[Any, Any] | None  # positional arguments, with tokens (1, N, C) first, and keyword arguments


class _Frame(NamedTuple):
    """A frame and what the blocks computed for it."""

    number: int
    image: Tensor
    blocks: dict[int, _Recorded]


def pictures(
    vit: Any,
    blocks: Sequence[int],
    video: Path,
    size: int | tuple[int, int],
    every: int,
    start: int,
    encoders: Mapping[int, nn.Module] | None = None,
) -> Iterator[Pair]:
    """Yields the pairs of neighbouring frames that are taken, while reading the video.

    Args:
        vit: a plain vision transformer of timm.
        blocks: indices of the blocks to draw.
        video: any file that FFmpeg reads, or a folder of frames.
        size: height and width of the model's input in pixels, or the side of a square one.
        every: step between the frames taken.
        start: index of the first frame taken.
        encoders: aligning encoders by block; their inputs are recorded for `Pictures.aligned`.

    Raises:
        CommandError: the video or the model can't be used.
    """
    encoders = encoders or {}

    def draw(first: _Frame, second: _Frame) -> Pair:
        drawn = {b: _draw_block(vit, b, first.blocks[b], second.blocks[b], encoders.get(b)) for b in blocks}
        return Pair((first.number, second.number), (first.image, second.image), drawn)

    return _of_neighbours(draw, vit, blocks, video, size, every, start, encoders)


def flows(
    vit: Any,
    blocks: Sequence[int],
    video: Path,
    size: int | tuple[int, int],
    every: int,
    start: int,
    encoders: Mapping[int, nn.Module] | None = None,
) -> Iterator[Flows]:
    """Only the flows of `pictures`, in a fraction of the time; arguments and errors are the same."""
    encoders = encoders or {}

    def measure(first: _Frame, second: _Frame) -> Flows:
        found = {b: _block_flows(vit, b, first.blocks[b], second.blocks[b], encoders.get(b)) for b in blocks}
        return Flows((first.number, second.number), found)

    return _of_neighbours(measure, vit, blocks, video, size, every, start, encoders)


@torch.inference_mode()
def _of_neighbours(
    function: Callable[[_Frame, _Frame], _Result],
    vit: Any,
    blocks: Sequence[int],
    video: Path,
    size: int | tuple[int, int],
    every: int,
    start: int,
    encoders: Mapping[int, nn.Module],
) -> Iterator[_Result]:
    """Yields `function` of every two neighbouring frames, with only two frames in memory at a time."""
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    previous: _Frame | None = None
    for number, image in _frames(video, every, size, start):
        try:
            with record_qk(vit, blocks=blocks) as qk, _inputs(vit, encoders) as inputs:
                vit(((image - mean) / std).unsqueeze(0))
        except RuntimeError as error:
            raise CommandError(f"the model can't be read: {error}") from error
        recorded = {block: _Recorded(q.clone(), k.clone(), inputs.get(block)) for block, (q, k) in qk.items()}
        frame = _Frame(number, image, recorded)
        if previous is not None:
            yield function(previous, frame)
        previous = frame


def _frames(video: Path, every: int, size: int | tuple[int, int], start: int) -> Iterator[tuple[int, Tensor]]:
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
    q, k = _stacked(first, second)
    rows, columns = motion_maps(q, k, head_reduction="mean")
    scores = motion_pca(q, k, head_reduction="mean").scores
    low, high = scores.quantile(1 - CUT, dim=-2, keepdim=True), scores.quantile(CUT, dim=-2, keepdim=True)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    flow, aligned = _block_flows(vit, block, first, second, encoder)
    return Pictures(flow, _on_grid(vit, rows), _on_grid(vit, columns), _on_grid(vit, colours), aligned)


def _block_flows(
    vit: Any, block: int, first: _Recorded, second: _Recorded, encoder: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """The flow of one block for two frames, and, with an encoder, that after the second was aligned to the first."""
    q, k = _stacked(first, second)
    options: Any = {"head_reduction": "mean", "center": True}
    aligned = None
    if encoder is not None and first.inputs is not None and second.inputs is not None:
        q_aligned, k_aligned = _aligned_qk(vit, block, first.inputs, second.inputs, encoder)
        pair = q[:, :1], k[:, :1], q_aligned.unsqueeze(1), k_aligned.unsqueeze(1)
        aligned = _on_grid(vit, am_flow_pair(*pair, **options))
    return _on_grid(vit, am_flow(q, k, **options)), aligned


def _stacked(first: _Recorded, second: _Recorded) -> tuple[Tensor, Tensor]:
    """q and k of two frames, (1, 2, heads, N, D) each."""
    return torch.stack((first.q, second.q), 1), torch.stack((first.k, second.k), 1)


def _on_grid(vit: Any, x: Tensor) -> Tensor:
    """(1, 1, N, ...) -> (height, width, ...)"""
    return x[0, 0, vit.num_prefix_tokens :].unflatten(0, tuple(vit.patch_embed.grid_size))


def _aligned_qk(
    vit: Any, block: int, first: tuple[Any, Any], second: tuple[Any, Any], encoder: nn.Module
) -> tuple[Tensor, Tensor]:
    """q and k of the second frame after its tokens were aligned to those of the first; both (1, heads, N, D)."""
    from amflow_models import read_qk

    (tokens, *args), kwargs = second
    return read_qk(vit.blocks[block], f"blocks.{block}", encoder(first[0][0], tokens), *args, **kwargs)
