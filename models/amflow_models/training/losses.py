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
    """

    def __init__(self, num_classes: int, smoothing: float) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing

    def targets(self, labels: Tensor) -> Tensor:
        """The target distribution of each clip: float32 (B, classes) of int64 (B,)."""
        hot = one_hot(labels, self.num_classes).to(torch.float32)
        return hot * (1 - self.smoothing) + self.smoothing / self.num_classes

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, of float32 logits (B, classes) and the targets."""
        return cross_entropy(logits, targets)
