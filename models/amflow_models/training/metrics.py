"""Metrics of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amflow_models.files import written_whole


@dataclass(frozen=True)
class Scores:
    """The usual scores of a classifier; fractions from 0 to 1.

    Attributes:
        top1, top5: share of the videos whose label is the most probable class, or one of the five most probable.
        mean_class: mean over the classes that have videos of the top-1 accuracy on the class's videos.
        confusion: int64 (classes, classes), number of videos of the row's class that were predicted as the column's.
    """

    top1: float
    top5: float
    mean_class: float
    confusion: Tensor

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, mean class {self.mean_class:.2%}"


def scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Scores predictions.

    Args:
        probabilities: probabilities or logits, (videos, classes).
        labels: int64 (videos,).

    Raises:
        ValueError: there is no video.
    """
    if not len(labels):
        raise ValueError("labels: expected at least one video to score, got none")
    classes = probabilities.shape[1]
    predicted = probabilities.topk(min(5, classes), dim=1).indices
    correct = predicted == labels[:, None]
    pairs = labels * classes + predicted[:, 0]
    confusion = pairs.bincount(minlength=classes * classes).view(classes, classes)
    counts = confusion.sum(1)
    recall = confusion.diagonal()[counts > 0] / counts[counts > 0]
    return Scores(
        correct[:, 0].double().mean().item(), correct.any(1).double().mean().item(), recall.mean().item(), confusion
    )


@dataclass(frozen=True)
class MultiLabelScores:
    """The score of a classifier for videos with several labels.

    Attributes:
        map: mean average precision: the mean over the classes that have videos.
        average_precision: of each class, float64 (classes,); NaN for classes without videos.
    """

    map: float
    average_precision: Tensor

    def __str__(self) -> str:
        return f"mAP {self.map:.2%}"


def multi_label_scores(probabilities: Tensor, labels: Tensor) -> MultiLabelScores:
    """Scores predictions of several labels.

    The average precision of a class is the mean over its videos of the share of its videos among those that are at
    least as probable.

    Args:
        probabilities: probabilities or logits, (videos, classes).
        labels: 0 or 1, (videos, classes).

    Raises:
        ValueError: no video has a label.
    """
    if not labels.any():
        raise ValueError("labels: expected at least one video with a label, got none")
    found = []
    for scored, true in zip(probabilities.T.double(), labels.T.bool(), strict=True):
        positive = scored[true]
        ranked, negative = positive.sort().values, scored[~true].sort().values
        hits = len(ranked) - torch.searchsorted(ranked, positive)  # its videos that are at least as probable
        misses = len(negative) - torch.searchsorted(negative, positive)
        found.append((hits / (hits + misses)).double().mean())
    average = torch.stack(found)
    return MultiLabelScores(average.nanmean().item(), average)


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draws the confusion matrix, each row as fractions of its class's videos, to a PNG file."""
    from matplotlib.figure import Figure

    side = min(20.0, 3 + 0.3 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes: Any = figure.subplots()
    rows = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(rows.to(torch.float32).numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(classes) <= 60:  # more names would be illegible
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    figure.colorbar(image, label="fraction of the label's videos")
    with written_whole(path) as part:
        figure.savefig(part, dpi=110)
