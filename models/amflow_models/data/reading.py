"""What readers of video files and of folders of frames have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor


class UnreadableVideo(ValueError):  # noqa: N818 -- named for the video
    """A video that can't be read. Its message is ``path: reason``.

    Attributes:
        path: path of the video.
        reason: why it can't be read.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # with both arguments it survives pickling
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class VideoReader(ABC):
    """An open video, whose frames are read by number from 0; ``len()`` is their number.

    Close it, or use it in a ``with`` statement.

    Attributes:
        path: path of the video.
        frame_rate: frames per second, the mean of a variable rate; None where it is not known, as in folders.
    """

    path: Path
    frame_rate: Fraction | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _frames(self, wanted: list[int]) -> Iterator[Tensor]:
        """Yields frames upright, uint8 RGB (H, W, 3). `wanted` is in ascending order, without repetitions."""

    @abstractmethod
    def close(self) -> None:
        """Closes the video."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, indices: Iterable[int]) -> Tensor:
        """Reads frames by number, in any order, with repetitions.

        Returns:
            uint8 RGB (len(indices), 3, H, W), upright: rotation in the metadata is applied. In `torch.channels_last`
            memory format, as decoders write frames.

        Raises:
            IndexError: there is no index, or one is not in [0, len).
            UnreadableVideo: a frame can't be decoded, is damaged, or differs in size from the others. Only damage that
                the decoder reports is noticed: noise within a frame may decode to a wrong picture.
        """
        numbers = [int(index) for index in indices]
        if not numbers:
            raise IndexError("indices: expected at least one, got none")
        wanted = sorted(set(numbers))
        clip = torch.empty(0)
        for number, frame in zip(wanted, self.iterate(wanted), strict=True):
            if not len(clip):
                clip = torch.empty_like(frame[None].expand(len(numbers), -1, -1, -1), memory_format=torch.channels_last)
            for place, other in enumerate(numbers):
                if other == number:
                    clip[place] = frame
        return clip

    def iterate(self, indices: Iterable[int]) -> Iterator[Tensor]:
        """Reads frames one by one, so that they need not all be in memory.

        Args:
            indices: numbers of frames in ascending order, without repetitions.

        Yields:
            uint8 RGB (3, H, W), as in `read`, also with the colours of a pixel next to each other.

        Raises:
            ValueError: the indices are in another order.
            IndexError, UnreadableVideo: as in `read`.
        """
        wanted = [int(index) for index in indices]
        if wanted != sorted(set(wanted)):
            raise ValueError(f"indices: expected ascending numbers without repetitions, got {wanted}")
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise IndexError(f"indices: expected them in [0, {len(self)}), got {wanted[0]} to {wanted[-1]}")
        size: tuple[int, int] | None = None
        for frame in self._frames(wanted):
            shape = frame.shape[1], frame.shape[0]
            if size is not None and shape != size:
                raise UnreadableVideo(self.path, f"has frames of several sizes: {sorted((size, shape))}")
            size = shape
            yield frame.permute(2, 0, 1)
