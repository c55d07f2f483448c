"""The loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


class Loss:
    """Cross-entropy with label smoothing, the mean over clips.

    Args:
        num_classes: number of classes.
        smoothing: the share of a target that is spread over all classes.
        weight: of each class, float32 (classes,); None weights all alike.
    """

    def __init__(self, num_classes: int, smoothing: float, weight: Tensor | None = None) -> None:
        self.num_classes, self.smoothing, self.weight = num_classes, smoothing, weight

    def targets(self, labels: Tensor) -> Tensor:
        """The target distribution of each clip: float32 (B, classes) of int64 (B,)."""
        hot = one_hot(labels, self.num_classes).to(torch.float32)
        return hot * (1 - self.smoothing) + self.smoothing / self.num_classes

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, of float32 logits (B, classes) and the targets."""
        return cross_entropy(logits, targets, self.weight)


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights of classes inverse to their numbers of videos, float32 (classes,); their mean over the videos is 1.

    Args:
        labels: int64 (videos,).
        num_classes: number of classes; those without a video get the weight 0.
    """
    counts = labels.bincount(minlength=num_classes)
    there = counts > 0
    weights = torch.zeros(num_classes)
    weights[there] = len(labels) / (there.sum() * counts[there])
    return weights
