"""Videos with several labels: lists, in which a video has a line for each label or several labels in a line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from amflow_models.data import VideoList


@dataclass(frozen=True)
class MultiLabelList(VideoList):
    """A list that has each video once; its `label` is the number of its row in the table.

    Attributes:
        table: whether a video has a label: float32 (videos, classes), 0 or 1.
    """

    table: Tensor = field(default_factory=lambda: torch.empty(0, 0))


def by_video(listed: VideoList, num_classes: int) -> MultiLabelList:
    """Gathers the labels of each video.

    Args:
        listed: a list with a line for each label of a video.
        num_classes: number of classes; all labels are below it.
    """
    rows: dict[Any, int] = {}
    places = []
    for video in listed.videos:
        places.append((rows.setdefault(replace(video, label=0), len(rows)), video.label))
    table = torch.zeros(len(rows), num_classes)
    row, label = torch.tensor(places).unbind(1)
    table[row, label] = 1
    videos = tuple(replace(video, label=number) for video, number in rows.items())
    others = {part.name: getattr(listed, part.name) for part in fields(VideoList)}
    return MultiLabelList(**{**others, "videos": videos}, table=table)


def label_table(dataset: Any) -> Tensor | None:
    """The table of a data set's list; None if its labels are classes."""
    return getattr(getattr(dataset, "videos", None), "table", None)
