"""A model's predictions for a list of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from amflow_models.training.build import Images
from amflow_models.training.loading import EvaluationBatches, loader


@dataclass(frozen=True)
class Predictions:
    """Of the videos that could be read, in the list's order.

    Attributes:
        places: of the videos in the list, (n,).
        probabilities: (n, classes), the mean over a video's views.
        labels: (n,).
        loss: mean cross-entropy of the probabilities.
        errors: what could not be read, and why.
    """

    places: Tensor
    probabilities: Tensor
    labels: Tensor
    loss: float
    errors: list[str]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Any, classes: int, batch: int, workers: int, normalise: Images, accelerator: Accelerator
) -> Predictions:
    """Predictions for every video of a data set; all processes call it and get the same.

    Args:
        batch: videos at a time, over all processes.

    Raises:
        ValueError: no video could be read.
    """
    batches = EvaluationBatches(len(dataset), batch, rank=accelerator.process_index, world=accelerator.num_processes)
    found = torch.full((len(dataset), classes), torch.nan)
    labels = torch.full((len(dataset),), -1)
    errors: list[str] = []
    training = model.training
    model.eval()
    for part in loader(dataset, batches, workers, accelerator.device):
        views = part["clips"].shape[1]
        with accelerator.autocast():
            logits = model(normalise(rearrange(part["clips"], "b v t c h w -> (b v) t c h w"))).float()
        mean = reduce(logits.softmax(-1), "(b v) k -> b k", "mean", v=views)
        mean[~part["valid"].to(mean.device)] = torch.nan
        places, mean, known = accelerator.gather((part["index"].to(mean.device), mean, part["label"].to(mean.device)))
        found[places.cpu()], labels[places.cpu()] = mean.cpu(), known.cpu()
        errors += part["errors"]
    model.train(training)
    if accelerator.num_processes > 1:
        errors = gather_object(errors)
    read = found.isfinite().all(1)
    if not read.any():
        raise ValueError(f"none of {len(dataset)} videos could be read; the first: {(errors or ['no error'])[0]}")
    probabilities, labels = found[read], labels[read]
    loss = cross_entropy(probabilities.clamp_min(1e-12).log(), labels).item()
    return Predictions(read.nonzero()[:, 0], probabilities, labels, loss, sorted(set(errors)))
