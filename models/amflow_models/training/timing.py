"""How long a run will take and what holds it up, from its first steps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

FIRST_STEPS = 10
_WARM_UP, _PROFILED = 1, 3  # the first steps build and compile kernels; the profiler slows its step down
_ADVICE = {
    "waiting for data": "raise data.workers, or store smaller videos",
    "backbone and adapters": "a smaller backbone or model.img_size, training.compile, and bf16 on a GPU make it faster",
    "AM flow": "AM flow in fewer blocks (model.blocks) makes it faster",
}


class Pace:
    """Times the first `FIRST_STEPS` steps and profiles one of them.

    Args:
        device: the device that the model runs on.
        main: whether this is the main process; others do nothing.
    """

    def __init__(self, device: torch.device, main: bool) -> None:
        self.device, self.main = device, main
        self.done = 0
        self.times: list[tuple[float, float]] = []  # seconds of waiting for the batch, and of the whole step
        self.flow: float | None = None  # share of AM flow in a step's work

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the work of a step; profiles one."""
        self.done += 1
        if not self.main or self.done != _PROFILED:
            yield
            return
        kind = self.device.type
        begin = time.perf_counter()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints lines of its own
        with profile(use_kineto=False, use_device=None if kind == "cpu" else kind) as profiled:
            yield
            if kind != "cpu":
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - begin
        self.flow = _flow_share(profiled, kind, seconds)

    def add(self, waiting: float, whole: float) -> None:
        """Adds the seconds of the step that was done last."""
        if self.done > _WARM_UP and self.done != _PROFILED:
            self.times.append((waiting, whole))

    def report(self, remaining: int) -> str | None:
        """The estimate after the last of the first steps, in the main process; otherwise None.

        Args:
            remaining: number of steps that are left.
        """
        if not self.main or self.done != FIRST_STEPS:
            return None
        waiting, whole = (sum(times) for times in zip(*self.times, strict=True))
        seconds = whole / len(self.times)
        shares = {"waiting for data": waiting / whole}
        work = 1 - waiting / whole
        shares["backbone and adapters"] = work * (1 - (self.flow or 0))
        shares["AM flow"] = work * (self.flow or 0)
        most = max(shares, key=lambda name: shares[name])
        listed = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        left = timedelta(seconds=round(seconds * remaining))
        return (
            f"after {FIRST_STEPS} steps: {seconds:.3g} s a step, about {left} for the {remaining} that are left, "
            f"besides validation. Of a step: {listed}. Most of it is {most}: {_ADVICE[most]}"
        )


def _flow_share(profiled: profile, kind: str, seconds: float) -> float:
    """The share of the ops of AM flow in the time of what was profiled, on a kind of device."""
    microseconds = 0.0
    for event in profiled.function_events or ():
        inside = event.cpu_parent is not None and event.cpu_parent.name.startswith("amflow::")
        if event.name.startswith("amflow::") and not inside:
            microseconds += event.cpu_time_total if kind == "cpu" else event.device_time_total
    return min(1.0, microseconds / seconds / 1e6)


@torch.no_grad()
def bf16_times(model: nn.Module, clip: Tensor) -> tuple[float, float]:
    """Seconds of a forward pass in float32 and under autocast to bf16 on the CPU, the shorter of two each.

    Args:
        model: the model.
        clip: a normalised clip (1, T, 3, height, width).
    """
    training = model.training
    model.eval()
    found = []
    for enabled in (False, True):
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                model(clip)
            times.append(time.perf_counter() - begin)
        found.append(min(times))
    model.train(training)
    return found[0], found[1]
