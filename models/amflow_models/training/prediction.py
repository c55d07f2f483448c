"""Predictions of a model for a list of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange, reduce
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, one_hot

from amflow_models.training.build import Images
from amflow_models.training.config import Config
from amflow_models.training.loading import EvaluationBatches, loader
from amflow_models.training.multilabel import label_table


@dataclass(frozen=True)
class Predictions:
    """Predictions for the n videos that could be read, in the list's order.

    Attributes:
        indices: indices of the videos in the list, int64 (n,).
        probabilities: float32 (n, classes), the mean over a video's views.
        labels: int64 (n,); with several labels float32 (n, classes), 0 or 1.
        loss: mean cross-entropy of the probabilities; with several labels the binary one.
        errors: path and reason of each video that could not be read.
    """

    indices: Tensor
    probabilities: Tensor
    labels: Tensor
    loss: float
    errors: list[str]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Any, config: Config, normalise: Images, accelerator: Accelerator, *, bar: bool = False
) -> Predictions:
    """Predicts every video of a data set; all processes must call it, and get the same result.

    Args:
        model: the model, on the accelerator's device.
        dataset: a `VideoDataset` or `SyntheticDataset` for testing.
        config: the config.
        normalise: normalises clips for the model.
        accelerator: the processes and their precision.
        bar: show progress on a terminal.

    Raises:
        ValueError: no video could be read, or with `data.strict` one could not; or the model returned NaN.
    """
    batch, classes = config.evaluation.batch, config.data.num_classes
    together = max(1, batch // accelerator.num_processes)  # clips per call of the model
    processes = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    batches = EvaluationBatches(len(dataset), batch, views=dataset.views, **processes)
    probabilities = torch.zeros(len(dataset), classes)
    labels = torch.zeros(len(dataset), dtype=torch.int64)
    read = torch.zeros(len(dataset), dtype=torch.bool)
    errors: list[str] = []
    training = model.training
    model.eval()
    parts = loader(dataset, batches, config.data.workers, accelerator.device)
    console = Console(stderr=True)
    silent = not (bar and accelerator.is_main_process and console.is_terminal)
    for part in track(parts, "testing", total=len(batches), console=console, disable=silent):
        clips = rearrange(part["clips"], "b v t c h w -> (b v) t c h w")
        with accelerator.autocast():
            logits = torch.cat([model(normalise(some)).float() for some in clips.split(together)])
        views = logits.sigmoid() if config.data.multi_label else logits.softmax(-1)
        mean = reduce(views, "(b v) k -> b k", "mean", v=part["clips"].shape[1])
        own = (part[name].to(mean.device) for name in ("index", "label", "valid"))
        indices, known, valid, mean = (x.cpu() for x in accelerator.gather((*own, mean)))
        probabilities[indices], labels[indices], read[indices] = mean, known, valid
        errors += part["errors"]
    model.train(training)
    if accelerator.num_processes > 1:
        errors = gather_object(errors)
    errors = sorted(set(errors))
    if errors and config.data.strict:
        raise ValueError(errors[0])
    if not read.any():
        raise ValueError(f"none of {len(dataset)} videos could be read; the first: {errors[0]}")
    indices, probabilities, labels = read.nonzero()[:, 0], probabilities[read], labels[read]
    bad = indices[~probabilities.isfinite().all(1)].tolist()
    if bad:
        raise ValueError(
            f"the model returned NaN for this clip: {dataset.name(bad[0])}; its weights or its precision can't be right"
        )
    if config.data.multi_label:
        table = label_table(dataset)
        labels = one_hot(labels, classes).float() if table is None else table[labels]
        loss = binary_cross_entropy(probabilities, labels).item()
    else:
        loss = cross_entropy(probabilities.clamp_min(1e-12).log(), labels).item()
    return Predictions(indices, probabilities, labels, loss, errors)
