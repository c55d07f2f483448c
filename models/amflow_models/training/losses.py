"""The loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot


class Loss:
    """Cross-entropy with label smoothing, the mean over clips; or the binary one, the mean over clips and classes.

    Args:
        num_classes: number of classes.
        smoothing: the share of a target that is spread over all classes; of the binary one, over both outcomes.
        weight: of each class, float32 (classes,); None weights all alike.
        multi_label: whether the loss is the binary one, since a clip may have several labels.
        table: with several labels, the labels of each video, see `MultiLabelList`; None: each has the one it states.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float,
        weight: Tensor | None = None,
        *,
        multi_label: bool = False,
        table: Tensor | None = None,
    ) -> None:
        self.num_classes, self.smoothing, self.weight = num_classes, smoothing, weight
        self.multi_label, self.table = multi_label, table

    def targets(self, labels: Tensor) -> Tensor:
        """The targets of each clip: float32 (B, classes), of its label in the list, int64 (B,)."""
        hot = one_hot(labels, self.num_classes).to(torch.float32) if self.table is None else self.table[labels]
        return hot * (1 - self.smoothing) + self.smoothing / (2 if self.multi_label else self.num_classes)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, of float32 logits (B, classes) and the targets."""
        if self.multi_label:
            return binary_cross_entropy_with_logits(logits, targets)
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
