"""Mixup, cutmix and random erasing of batches of clips by timm's classes; all frames of a clip are treated alike."""

from __future__ import annotations

import random

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from amflow_models.training.config import Config


class BatchAugmentation:
    """Erases boxes of clips, and mixes each two neighbouring clips of a batch with each other.

    What happens to a clip depends on the seed, the step and its place in the whole batch, so it is the same for any
    number of processes and of parts of a batch.

    Args:
        config: the config.
        device: the clips' device.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        settings = config.training
        self.seed = config.seed
        self.mixup: Mixup | None = None
        self.erase: RandomErasing | None = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, prob=settings.mixup_prob, switch_prob=settings.mixup_switch_prob,
                label_smoothing=0.0, num_classes=2,
            )  # fmt: skip
        if config.data.random_erasing:
            self.erase = RandomErasing(config.data.random_erasing, mode="pixel", device=device)

    def __call__(self, clips: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Augments clips.

        Args:
            clips: normalised clips (B, T, 3, H, W), float32; they are overwritten.
            targets: (B, classes).
            step: the step.
            first: place of the first clip in the whole batch of all processes.

        Returns:
            clips and targets.
        """
        frames = clips.flatten(1, 2)  # timm's boxes are the same in all channels of an image
        if self.erase is not None:
            for place, clip in enumerate(frames, first):
                self._seed_everything(step, place, 0)
                self.erase(clip)
        if self.mixup is not None:
            mixed = []
            own = torch.arange(2, device=clips.device)
            for place in range(0, len(frames), 2):
                self._seed_everything(step, first + place, 1)
                # As the labels of two classes the clips' own numbers return the shares of both: a (2, 2) matrix.
                _, shares = self.mixup(frames[place : place + 2], own)
                mixed.append(shares @ targets[place : place + 2])
            targets = torch.cat(mixed)
        return frames.view_as(clips), targets

    def _seed_everything(self, *numbers: int) -> None:
        """Seeds PyTorch, and NumPy and Python, from which timm draws."""
        state = np.random.SeedSequence((self.seed, *numbers)).generate_state(3)
        torch.manual_seed(int(state[0]))
        np.random.seed(int(state[1]))
        random.seed(int(state[2]))
