"""Loading clips: the batches of each process, and the loaders."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from amflow_models.data import collate

Key = tuple[int, int]  # epoch, index in the list


class TrainBatches(Sampler[list[Key]]):
    """The batches of one process. They depend only on seed and step, so a resumed run sees the same clips.

    Each epoch has its own order, from which every step takes the next `batch` clips, and every process takes its part
    of them: N processes together see the clips that one process would see. An incomplete last batch is dropped.

    Args:
        count: number of clips.
        batch: clips per step, over all processes.
        rank, world: index of this process and number of processes.
        seed: seed of the orders.
        start, stop: range of steps.
        repeats: clips of each video in an epoch, whose videos are then fewer. A key's "epoch" is one number higher for
            each of them, so that their augmentations differ.
        shares: probability of each clip to be drawn, with repetition, up to a factor, float32 (count,); None: each clip
            occurs once in an epoch.

    Raises:
        ValueError: there are fewer clips than in a batch, or the batch is not a multiple of the processes.
    """

    def __init__(
        self, count: int, batch: int, *, rank: int, world: int, seed: int, start: int, stop: int, repeats: int = 1,
        shares: Tensor | None = None,
    ) -> None:  # fmt: skip
        if batch % world:
            raise ValueError(f"training.batch: expected a multiple of the {world} processes, got {batch}")
        if count < batch:
            raise ValueError(f"training.batch: expected at most the {count} videos of the training list, got {batch}")
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.seed, self.start, self.stop, self.repeats, self.shares = seed, start, stop, repeats, shares

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        part, steps = self.batch // self.world, self.count // self.batch
        order: list[Key] = []
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, steps)
            if not order or position == 0:
                order = self._order(epoch)
            batch = order[position * self.batch : (position + 1) * self.batch]
            batch = [key for copy in range(self.repeats) for key in batch[copy :: self.repeats]]
            yield batch[self.rank * part : (self.rank + 1) * part]

    def _order(self, epoch: int) -> list[Key]:
        """The keys of an epoch, those of one video side by side."""
        sampler = RepeatAugSampler(
            range(self.count), num_replicas=1, rank=0, num_repeats=self.repeats, selected_round=0
        )
        seed = self.seed * 1_000_003 + epoch
        sampler.set_epoch(seed)  # which it takes as the seed of its order
        if self.shares is None:
            return [(epoch * self.repeats + place % self.repeats, index) for place, index in enumerate(sampler)]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.shares, self.count, replacement=True, generator=generator).tolist()
        seen: Counter[int] = Counter()
        order = []
        for place in sampler:
            index = drawn[place]
            order.append((epoch * self.count + seen[index], index))
            seen[index] += 1
        return order


class EvaluationBatches(Sampler[list[Key]]):
    """All videos, dealt to the processes in turn. The last one may repeat so that all have equally many batches.

    Args:
        count: number of videos.
        batch: the most clips in a step, over all processes; each has at least the clips of one video.
        rank, world: index of this process and number of processes.
        views: clips of a video.
    """

    def __init__(self, count: int, batch: int, *, rank: int, world: int, views: int = 1) -> None:
        self.part = max(1, batch // (world * views))
        own = -(-count // world)
        self.indices = [min(rank + world * number, count - 1) for number in range(own)]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.part)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.part):
            yield [(0, index) for index in self.indices[first : first + self.part]]


def loader(dataset: Any, batches: Sampler[list[Key]], workers: int, device: torch.device) -> DataLoader[Any]:
    """A loader of batches, in `workers` other processes if that is not 0."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
    )  # fmt: skip


def _ignore_interrupts(_: int) -> None:
    """Workers ignore SIGINT and SIGTERM, which reach all processes; the trainer decides how to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
