"""A video classifier: an image backbone for each frame, the mean over frames, a linear layer."""

from __future__ import annotations

from typing import Any

from einops import reduce
from torch import Tensor, nn

from amflow_kernels.integrations.block_finder import find_blocks
from amflow_models.insertion import AdapterReport, add_adapters, check_options, report_of


class VideoClassifier(nn.Module):
    """Classifies clips of T frames with a frozen image backbone and adapters.

    Args:
        backbone: maps images to vectors (C,); `create_backbone` makes one.
        num_classes: number of logits.
        num_frames: T.
        adapters: whether the backbone gets adapters; otherwise only the head trains.
        dropout: share of the head's inputs that are set to 0 in training.
        options: options of `add_adapters`: blocks, form, unit, gate, ...

    Attributes:
        report: the report of `add_adapters`, which here includes the head; None without adapters.

    Raises:
        TypeError: the backbone has no `num_features`, or for the reasons of `add_adapters`.
        ValueError: num_classes is below 1, an unknown option (the nearest known one is named), the backbone has a head
            of its own, or for the reasons of `add_adapters`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_frames: int,
        *,
        adapters: bool = True,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.num_frames = num_frames
        self.report: AdapterReport | None = None
        width = getattr(backbone, "num_features", None)
        if not isinstance(width, int):
            raise TypeError(
                f"backbone: expected one with `num_features`, as timm's have, got {type(backbone).__name__}"
            )
        if getattr(backbone, "num_classes", 0):
            raise ValueError(
                f"backbone: expected one without a head (num_classes=0), got {backbone.num_classes} classes"
            )
        check_options(options, "adapters", "num_classes", "dropout")
        if adapters:
            add_adapters(backbone, num_frames=num_frames, verbose=False, **options)
        else:
            find_blocks(backbone)
            backbone.requires_grad_(False)
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if adapters:
            self.report = report_of(self)

    def features(self, clips: Tensor) -> Tensor:
        """Args: clips (B, T, 3, height, width), normalised for the backbone. Returns (B, C), the mean over frames."""
        if clips.dim() != 5 or clips.shape[1] != self.num_frames:
            raise ValueError(f"clips: expected (B, {self.num_frames}, 3, height, width), got {tuple(clips.shape)}")
        frames = self.backbone(clips.flatten(0, 1))
        return reduce(frames.unflatten(0, clips.shape[:2]), "b t c -> b c", "mean")

    def forward(self, clips: Tensor) -> Tensor:
        """Args: clips, as for `features`. Returns logits (B, classes)."""
        return self.head(self.dropout(self.features(clips)))
