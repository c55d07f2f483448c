"""Predictions of a trained classifier for videos and frames of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from amflow_kernels import record_am_flow
from amflow_models.blocks import AdaptedBlock
from amflow_models.classifier import VideoClassifier
from amflow_models.data import dense, open_video, spatial_crops, uniform
from amflow_models.training.build import build_model, image_size, normalisation
from amflow_models.training.checkpoints import AVERAGE, TRAINED, find_trained, read_about
from amflow_models.training.config import Config
from amflow_models.training.parallel import choose_precision
from amflow_models.weights import load_trained

Frames = Tensor | np.ndarray | Sequence[Any]


@dataclass(frozen=True)
class Window:
    """The prediction for a part of a video.

    Attributes:
        frames: numbers of the T frames that the model saw.
        probabilities: float32 (classes,), the mean over the crops.
        images: the frames as the model saw them, uint8 (T, 3, size, size), the centre crop.
        flow: AM flow minus 1 from each frame to the next, float32 (T - 1, height, width), the mean over heads and over
            the blocks with temporal adapters (all blocks if there are none); None unless it was asked for.
    """

    frames: list[int]
    probabilities: Tensor
    images: Tensor
    flow: Tensor | None


@dataclass(frozen=True)
class Prediction:
    """The prediction for a video.

    Attributes:
        probabilities: float32 (classes,), the mean over the windows.
        classes: names of the classes.
        windows: the windows, without their pictures.
    """

    probabilities: Tensor
    classes: tuple[str, ...]
    windows: tuple[Window, ...]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes and their probabilities, from the highest on; all classes if there are fewer."""
        return top(self.probabilities, self.classes, k)


class TrainedClassifier:
    """A trained classifier and what it needs to classify videos; `load_classifier` makes one.

    Attributes:
        model: the `VideoClassifier`, in eval mode; it takes normalised clips.
        classes: names of the classes; their numbers if the training list had no names.
        config: the config that it was trained by.
        device: where it computes.
    """

    def __init__(self, model: VideoClassifier, classes: Sequence[str], config: Config, device: torch.device) -> None:
        self.model, self.classes, self.config, self.device = model, tuple(classes), config, device
        self._size = image_size(config, model)
        self._normalise = normalisation(model, device)
        # "auto" is not bf16 where bf16 is slow, and what was trained in fp32 stays in it.
        precision = config.training.precision
        self._half = precision != "fp32" and choose_precision("auto") == "bf16"

    def __call__(self, video: str | Path | Frames, *, window: int | None = None) -> Prediction:
        """Classifies a video of any length.

        Args:
            video: path of a video file or of a folder of frames; or its frames, RGB in uint8: a tensor
                (N, 3, H, W), an array (N, H, W, 3), or a sequence of arrays (H, W, 3) or of pictures of Pillow.
            window: length of the windows in frames, see `windows`.

        Returns:
            The prediction: its probabilities are the mean over the windows.

        Raises:
            TypeError, ValueError: the frames are not as described, or there is none; window is below 1.
            UnreadableVideo: a ValueError: the video can't be read.
        """
        return self.average(self.windows(video, window=window))

    def windows(self, video: str | Path | Frames, *, window: int | None = None, flow: bool = False) -> Iterator[Window]:
        """Classifies the parts of a video one after the other, with the frames of only one part in memory.

        The video is divided into equal parts of at least `window` frames. Of each part the model sees T frames, sampled
        as in testing: around its middle for dense sampling, over the whole part for uniform sampling. Crops are those
        of the config's evaluation.

        Args:
            video: as in a call.
            window: the least length of a part in frames. None: T times the stride for dense sampling, the whole video
                for uniform sampling.
            flow: compute `Window.flow`.

        Raises:
            TypeError, ValueError: as in a call.
        """
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        data = self.config.data
        if isinstance(video, (str, Path)):
            named = Path(video).is_dir()
            with open_video(video, data.template if named else None, data.start_index if named else None) as reader:
                parts = self._parts(len(reader), window)
                wanted = sorted({number for part in parts for number in part})
                yield from self._classify(parts, zip(wanted, reader.iterate(wanted), strict=True), flow)
            return
        _check_frames(video)
        parts = self._parts(len(video), window)
        wanted = sorted({number for part in parts for number in part})
        yield from self._classify(parts, ((number, _as_tensor(video[number], number)) for number in wanted), flow)

    def average(self, windows: Iterable[Window]) -> Prediction:
        """The prediction for a video from those for its windows, whose pictures are dropped."""
        kept = tuple(replace(window, images=window.images[:0], flow=None) for window in windows)
        mean = torch.stack([window.probabilities for window in kept]).mean(0)
        return Prediction(mean, self.classes, kept)

    def _parts(self, total: int, window: int | None) -> list[list[int]]:
        """The numbers of the frames of each window."""
        data = self.config.data
        if window is None:
            window = data.frames * data.stride if data.sampling == "dense" else total
        count = max(1, total // window)
        bounds = [total * number // count for number in range(count + 1)]
        parts = []
        for start, stop in pairwise(bounds):
            if data.sampling == "dense":
                indices = dense(stop - start, data.frames, data.stride)
            else:
                indices = uniform(stop - start, data.frames)
            parts.append((start + indices).tolist())
        return parts

    def _classify(self, parts: list[list[int]], frames: Iterator[tuple[int, Tensor]], flow: bool) -> Iterator[Window]:
        """Predicts each part, from frames (3, H, W) in ascending order."""
        crops = self.config.evaluation.crops
        for part in parts:
            images: dict[int, Tensor] = {}
            while part[-1] not in images:
                number, frame = next(frames)
                images[number] = spatial_crops(frame[None], self._size, crops)[:, 0]
            views = torch.stack([images[number] for number in part], 1)  # (crops, T, 3, size, size)
            probabilities, flows = self._run(views, flow)
            centre = crops // 2
            yield Window(part, probabilities, views[centre], None if flows is None else flows[centre])

    @torch.no_grad()
    def _run(self, clips: Tensor, flow: bool) -> tuple[Tensor, Tensor | None]:
        """The mean probabilities of clips, uint8 (n, T, 3, size, size), and their AM flow (n, T - 1, height, width)."""
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)
        if not flow:
            with half:
                logits = self.model(self._normalise(clips))
            return self._probabilities(logits), None
        backbone = self.model.backbone
        adapted = [n for n, block in backbone.named_modules() if isinstance(block, AdaptedBlock) and block.temporal]
        options: Any = {"head_reduction": "mean", "center": True}
        with half, record_am_flow(backbone, num_frames=clips.shape[1], **options) as recorded:
            logits = self.model(self._normalise(clips))
        inside = [f for name, f in recorded.items() if any(name.startswith(f"{block}.") for block in adapted)]
        grids = [f.grid for f in inside or recorded.values()]
        if any(grid is None for grid in grids):
            raise ValueError(f"flow: the grid of tokens is not known for the backbone {self.config.model.backbone}")
        finest = max((grid.shape[-2:] for grid in grids), key=tuple)
        mean = torch.stack([interpolate(grid, finest) for grid in grids]).mean(0)
        return self._probabilities(logits), mean.cpu()

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return (logits.sigmoid() if self.config.data.multi_label else logits.softmax(-1)).mean(0).cpu()


def load_classifier(
    checkpoint: str | Path,
    *,
    ema: bool = False,
    best: bool = False,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> TrainedClassifier:
    """Loads a classifier that ``amflow train`` trained.

    Args:
        checkpoint: a run (its newest checkpoint is taken), a checkpoint, or its `model.safetensors`.
        best: take the run's best checkpoint instead of its newest.
        ema: take the exponential moving average of the weights.
        best: take a run's best checkpoint instead of its newest.
        weights: pretrained weights of the frozen backbone, as for `create_backbone`, which a checkpoint does not hold;
            None takes those that the config names.
        device: where to compute; None takes the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such checkpoint, it can't be read or does not say how it was trained, or the backbone's
            weights are missing or do not fit.
        ModuleNotFoundError: a package of the train extra is missing.
    """
    file = find_trained(Path(checkpoint), AVERAGE if ema else TRAINED, best=best)
    about = read_about(file)
    if about is None:
        raise ValueError(
            f"{file}: expected weights that `amflow train` wrote: these say nothing of their model; build it and call "
            "load_trained"
        )
    config = about.config
    if weights is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": str(weights)})})
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    load_trained(model, file)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(device or found or "cpu")
    numbers = map(str, range(config.data.num_classes))
    return TrainedClassifier(model.eval().to(device), about.classes or tuple(numbers), config, device)


def top(probabilities: Tensor, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The k most probable classes and their probabilities, from the highest on; all classes if there are fewer.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    values, indices = probabilities.topk(min(k, len(classes)))
    return [(classes[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]


def _check_frames(frames: Any) -> None:
    """Raises unless the argument `video` is frames; each is checked when it is read."""
    if not isinstance(frames, (Tensor, np.ndarray, Sequence)):
        raise TypeError(f"video: expected a path or frames, got {type(frames).__name__}")
    if isinstance(frames, Tensor) and (frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8):
        raise ValueError(
            f"video: expected a tensor of RGB frames, uint8 (N, 3, H, W), got {frames.dtype} {tuple(frames.shape)}"
        )
    if not len(frames):
        raise ValueError("video: expected at least one frame, got none")


def _as_tensor(frame: Any, number: int) -> Tensor:
    """A frame as uint8 (3, H, W)."""
    if isinstance(frame, Tensor) and frame.dim() == 3 and len(frame) == 3 and frame.dtype == torch.uint8:
        return frame
    array = np.array(frame.convert("RGB") if hasattr(frame, "convert") else frame)  # Pillow's have it
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"video: expected RGB frames, uint8 (H, W, 3), and frame {number} is {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array).permute(2, 0, 1)
