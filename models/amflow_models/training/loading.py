"""Which clips each process gets at which step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from amflow_models.data import collate

Key = tuple[int, int]  # epoch, place in the list


class TrainBatches(Sampler[list[Key]]):
    """The batches of one process, a function of seed and step alone: whoever resumes goes on with the same clips.

    Each epoch has an order of its own, in which every step takes the next `batch` clips, and every process its part of
    them: N processes see what one would see. What is left over at the end of an epoch is left out.

    Args:
        count: clips.
        batch: clips of a step, over all processes.
        rank, world: of this process, of how many.
        start, stop: the steps.

    Raises:
        ValueError: there are less clips than in a batch, or it can't be divided.
    """

    def __init__(self, count: int, batch: int, *, rank: int, world: int, seed: int, start: int, stop: int) -> None:
        if batch % world:
            raise ValueError(f"training.batch: expected a multiple of the {world} processes, got {batch}")
        if count < batch:
            raise ValueError(f"training.batch: expected at most the {count} videos of the training list, got {batch}")
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        part, steps = self.batch // self.world, self.count // self.batch
        order: list[int] = []
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, steps)
            if not order or place == 0:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator).tolist()
            first = place * self.batch + self.rank * part
            yield [(epoch, index) for index in order[first : first + part]]


class EvaluationBatches(Sampler[list[Key]]):
    """All clips once, in turn to the processes; so that all have as many batches, the last clip may come again."""

    def __init__(self, count: int, batch: int, *, rank: int, world: int) -> None:
        self.part = max(1, batch // world)
        own = -(-count // world)
        self.places = [min(rank + world * place, count - 1) for place in range(own)]

    def __len__(self) -> int:
        return -(-len(self.places) // self.part)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.places), self.part):
            yield [(0, index) for index in self.places[first : first + self.part]]


def loader(dataset: Any, batches: Sampler[list[Key]], workers: int, device: torch.device) -> DataLoader[Any]:
    """Loads batches, in other processes if `workers` is not 0."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        worker_init_fn=_leave_interrupts,
    )  # fmt: skip


def _leave_interrupts(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes; what becomes of them is for the one that trains to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
