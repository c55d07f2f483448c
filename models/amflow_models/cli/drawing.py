"""What the commands that draw have in common: the overlay of AM flow on a frame, sheets of frames, videos of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from amflow_models.cli.errors import CommandError, needs_extra
from amflow_models.files import written_whole

CUT = 0.995  # quantile at which a colour scale ends, as a few outlier tokens would darken all others
COLOURS = "inferno"


def overlay(image: Tensor, flow: Tensor, largest: float) -> Tensor:
    """A frame in grey under the colours of its flow, which hide it where the flow is large.

    Args:
        image: (3, H, W) in [0, 1].
        flow: (height, width), on the grid of patches.
        largest: the flow that the colour scale ends at; it begins at 0.

    Returns:
        (3, H, W) in [0, 1].
    """
    from matplotlib import colormaps

    level = (flow / largest).clamp(0, 1)
    colours = torch.from_numpy(colormaps[COLOURS](level.numpy())[..., :3]).permute(2, 0, 1).float()
    heat, weight = (
        interpolate(x[None], image.shape[1:], mode="nearest")[0] for x in (colours, (0.45 + 0.4 * level)[None])
    )
    return (1 - weight) * image.mean(0, keepdim=True) + weight * heat


def side_by_side(tiles: Sequence[Tensor]) -> Any:
    """Images (3, size, size) in [0, 1] as one image, uint8 (height, width, 3), at most five in a row."""
    across = min(5, len(tiles))
    down = -(-len(tiles) // across)
    size = tiles[0].shape[-1] // 2 * 2  # video frames have even sides
    sheet = torch.zeros(3, down * size, across * size)
    for n, tile in enumerate(tiles):
        top, left = n // across * size, n % across * size
        sheet[:, top : top + size, left : left + size] = tile[:, :size, :size]
    return (255 * sheet).round().byte().permute(1, 2, 0).contiguous().numpy()


@contextmanager
def video_writer(output: Path, rate: Fraction = Fraction(12)) -> Iterator[Callable[[Any], None]]:
    """Gives a function that appends a frame, uint8 (height, width, 3) with even sides, to an H.264 video.

    The file is written whole or not at all; without frames there is none.

    Args:
        output: the file.
        rate: frames per second.

    Raises:
        CommandError: the file can't be written.
        MissingPackageError: PyAV is missing.
    """
    with needs_extra("demo"):
        import av
    container: Any = None
    stream: Any = None

    @contextmanager
    def errors() -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise CommandError(f"{output}: can't be written ({error})") from error

    with finished(output) as part:

        def write(frame: Any) -> None:
            nonlocal container, stream
            with errors():
                if container is None:
                    container = av.open(f"file:{part}", "w")  # else a colon in the name would end a protocol
                    stream = container.add_stream("libx264", rate=rate.limit_denominator(1001), options={"crf": "18"})
                    stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        try:
            yield write
            if container is not None:
                with errors():
                    container.mux(stream.encode())
        finally:
            if container is not None:
                with errors():
                    container.close()


@contextmanager
def finished(output: Path) -> Iterator[Path]:
    """`written_whole` for a command's output, with errors of the disk as CommandError."""
    try:
        with written_whole(output) as part:
            yield part
    except OSError as error:
        raise CommandError(f"{output}: can't be written ({error.strerror})") from error
