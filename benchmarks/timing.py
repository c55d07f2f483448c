"""Interleaved timing: every round calls every provider once, so that drift of the machine affects all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch

from amflow_kernels import explain
from benchmarks.providers import PRODUCTS, PROVIDERS, Inputs, Provider, make_inputs, names
from benchmarks.shapes import Shape

MIN_ROUNDS, MAX_ROUNDS = 5, 200
MIN_TURN, MAX_REPEATS = 2e-3, 50  # of one provider in a round: seconds, calls
PEAK_SIZE = 2048  # of a square matrix product that is large enough to run at the peak


class Series(NamedTuple):
    """The durations of every provider in the same rounds, in seconds, and the rest of each row."""

    times: dict[str, list[float]]
    info: dict[str, dict[str, Any]]


def measure(function: str, shape: Shape, direction: str, seconds: float) -> Series:
    """Time a function and its peers at one shape, with the machine's matmul peak taken in the same rounds."""
    providers = [PROVIDERS[name] for name in names(function, direction)]
    inputs = {key: _rotation(shape, *key, direction) for key in {(p.dtype, p.device) for p in providers}}
    calls = {p.name: _on(p.prepare(shape, direction), inputs[p.dtype, p.device]) for p in providers}
    times = interleave(calls | {_peak_name(*key): _peak(*key) for key in inputs}, seconds)
    medians = {name: median(durations) for name, durations in times.items()}
    info = {p.name: _row(p, function, shape, direction, medians, next(inputs[p.dtype, p.device])) for p in providers}
    for provider in providers:
        q1, _, q3 = quantiles(times[provider.name], n=4, method="inclusive")
        info[provider.name]["spread"] = (q3 - q1) / medians[provider.name]
    return Series({p.name: times[p.name] for p in providers}, info)


def interleave(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Durations of every call, from rounds that run each once in a new random order.

    A call too short for the clock is repeated, and its duration is the mean.
    """
    for call in calls.values():  # builds, compiles, starts thread pools
        call()
    repeats = {name: max(1, min(MAX_REPEATS, ceil(MIN_TURN / _mean_duration(call, 1)))) for name, call in calls.items()}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        begin = perf_counter()
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and perf_counter() - begin > seconds:
                break
            shuffle(order)
            for name in order:
                times[name].append(_mean_duration(calls[name], repeats[name]))
    finally:
        gc.enable()
    return times


def _mean_duration(call: Callable[[], object], repeats: int) -> float:
    """Mean seconds of consecutive calls; freeing the last result is not counted."""
    start = perf_counter()
    for _ in range(repeats):
        result = call()
    duration = perf_counter() - start
    del result
    return duration / repeats


def cache_bytes() -> int:
    """Size of the last-level cache, or 32 MiB where it can't be read."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def _rotation(shape: Shape, dtype: torch.dtype, device: str, direction: str) -> Iterator[Inputs]:
    """Sets of inputs in rotation, enough of them that q and k of each leave the cache before its next use."""
    first = make_inputs(shape, dtype, device, direction)
    sets = ceil(2 * cache_bytes() / (first.q.nbytes + first.k.nbytes))
    return cycle([first, *(make_inputs(shape, dtype, device, direction) for _ in range(sets))])


def _on(call: Callable[[Inputs], object], inputs: Iterator[Inputs]) -> Callable[[], object]:
    return lambda: call(next(inputs))


def _peak_name(dtype: torch.dtype, device: str) -> str:
    return f"peak {dtype} {device}"


def _peak(dtype: torch.dtype, device: str) -> Callable[[], object]:
    a, b, out = torch.randn(3, PEAK_SIZE, PEAK_SIZE, device=device).to(dtype)

    def call() -> None:
        torch.matmul(a, b, out=out)
        if device != "cpu":
            torch.accelerator.synchronize(device)

    return call


def _row(
    provider: Provider, function: str, shape: Shape, direction: str, medians: dict[str, float], inputs: Inputs
) -> dict[str, Any]:
    """A row without its durations; seconds and FLOP/s."""
    own = provider.function == function  # otherwise it serves only as the baseline of others
    baseline = provider.baseline if own else None
    info: dict[str, Any] = {
        "function": function,
        "shape": str(shape),
        "provider": provider.name,
        "label": provider.label,
        "direction": direction,
        "dtype": str(provider.dtype).removeprefix("torch."),
        "device": provider.device,
        "ours": provider.ours and own,
        "baseline": baseline,
        "ratio": medians[provider.name] / medians[baseline] if baseline else 1.0,
    }
    if info["ours"]:
        peak = 2 * PEAK_SIZE**3 / medians[_peak_name(provider.dtype, provider.device)]
        maps, operators = PRODUCTS[function, direction]
        bound = (maps * shape.map_flops() + operators * shape.operator_flops()) / peak
        info |= {
            "impl": explain(inputs.q, inputs.k).impl,
            "peak_flops": peak,
            "bound": bound,
        }
    return info


class ReplayClock:
    """A timer for pytest-benchmark that advances only by recorded durations, so that those become ordinary rows."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """The timer."""
        return self._now

    def player(self, durations: Sequence[float]) -> Callable[[], None]:
        """A function whose every call takes the next duration, as `read` sees it."""
        remaining = iter(durations)

        def play() -> None:
            self._now += next(remaining)

        return play
