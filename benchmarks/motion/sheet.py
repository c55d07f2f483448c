"""A contact sheet: one clip of each class of each task."""

from __future__ import annotations

import matplotlib.pyplot as plt

from benchmarks.motion.tasks import SPLITS, TASKS, make_clips


def draw(output: str) -> None:
    """Each row is a class, with a clip of the training split on the left and one of the test split on the right."""
    rows = [(task, label) for task in TASKS for label in range(len(TASKS[task].classes))]
    shown = (SPLITS[0], SPLITS[-1])
    clips = {(task, split): make_clips(task, split, len(TASKS[task].classes)) for task in TASKS for split in shown}
    figure, axes = plt.subplots(len(rows), len(shown), figsize=(12, 1.45 * len(rows)))
    for (task, label), cells in zip(rows, axes, strict=True):
        for split, axis in zip(shown, cells, strict=True):
            x, labels = clips[task, split]
            clip = x[labels == label][0]
            axis.imshow(clip.permute(2, 0, 3, 1).flatten(1, 2))  # (size, frames * size, 3)
            axis.set_title(f"{task}, {split}: {TASKS[task].classes[label]}", fontsize=8)
            axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(output, dpi=90)
