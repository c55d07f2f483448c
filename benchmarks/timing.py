"""Interleaved timing: every round calls every provider once, so that drift of the machine affects all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amflow_kernels import explain
from benchmarks.providers import PRODUCTS, PROVIDERS, Inputs, Provider, has_bf16_units, make_inputs, names
from benchmarks.shapes import Shape

MIN_ROUNDS, MAX_ROUNDS = 5, 200
MIN_TURN, MAX_REPEATS = 2e-3, 50  # of one provider in a round: seconds, calls
LONGEST = 3.0  # seconds of a peer's call, beyond which it is left out: five rounds would take too long
PEAK_SIZES = (2048, 1024, 512, 256)  # of a square matrix product; the largest runs at the peak
PEAK_SECONDS = 0.1  # of such a product, at most


class Series(NamedTuple):
    """The durations of every provider in the same rounds, in seconds, and the rest of each row."""

    times: dict[str, list[float]]
    info: dict[str, dict[str, Any]]
    left_out: dict[str, float]  # peers that were too slow, and the seconds of their first call


def measure(function: str, shape: Shape, direction: str, seconds: float, min_rounds: int = MIN_ROUNDS) -> Series:
    """Time a function and its peers at one shape, with the machine's matmul peak taken in the same rounds."""
    providers = {name: PROVIDERS[name] for name in names(function, direction)}
    inputs = {key: _rotation(shape, *key, direction) for key in {(p.dtype, p.device) for p in providers.values()}}
    calls = {p.name: _on(p.prepare(shape, direction), inputs[p.dtype, p.device]) for p in providers.values()}
    left_out = {name: too_slow for name, p in providers.items() if (too_slow := _trial(calls[name], p)) is not None}
    calls = {name: call for name, call in calls.items() if name not in left_out}
    peaks = {key: Peak.of(*key) for key in {_peak_key(providers[name]) for name in calls}}
    times = interleave(calls | {_peak_name(*key): peak for key, peak in peaks.items()}, seconds, min_rounds)
    medians = {name: median(durations) for name, durations in times.items()}
    rates = {key: 2 * peak.size**3 / medians[_peak_name(*key)] for key, peak in peaks.items()}
    info = {}
    for name in calls:
        p = providers[name]
        info[name] = _row(p, function, shape, direction, medians, rates[_peak_key(p)], next(inputs[p.dtype, p.device]))
        q1, _, q3 = quantiles(times[name], n=4, method="inclusive")
        info[name]["spread"] = (q3 - q1) / medians[name]
    return Series({name: times[name] for name in calls}, info, left_out)


def _trial(call: Callable[[], object], provider: Provider) -> float | None:
    """Calls once, which builds, compiles and starts thread pools, and if that was slow a second time.

    Returns:
        The seconds of a call if a peer is so slow that it is left out, otherwise None.
    """
    seconds = _mean_duration(call, 1)
    if seconds > LONGEST:
        seconds = _mean_duration(call, 1)
    return seconds if seconds > LONGEST and not provider.ours else None


def interleave(
    calls: dict[str, Callable[[], object]], seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
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
            if round_ >= min_rounds and perf_counter() - begin > seconds:
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


def _peak_key(provider: Provider) -> tuple[torch.dtype, str]:
    """The dtype and device whose peak bounds a provider: without units for bfloat16, it computes in float32."""
    return (provider.dtype if has_bf16_units(provider.device) else torch.float32), provider.device


def _peak_name(dtype: torch.dtype, device: str) -> str:
    return f"peak {dtype} {device}"


@dataclass(frozen=True)
class Peak:
    """A square matrix product, as large as this machine multiplies in `PEAK_SECONDS`."""

    operands: tuple[Tensor, Tensor, Tensor]  # two factors and the result

    @property
    def size(self) -> int:
        return self.operands[0].shape[0]

    @classmethod
    def of(cls, dtype: torch.dtype, device: str) -> Peak:
        """The product whose time the smallest predicts to be short enough."""
        peak = cls._of_size(PEAK_SIZES[-1], dtype, device)
        peak()
        seconds = _mean_duration(peak, 1)
        fits = [n for n in PEAK_SIZES if seconds * (n / peak.size) ** 3 <= PEAK_SECONDS]
        return cls._of_size(fits[0], dtype, device) if fits else peak

    @classmethod
    def _of_size(cls, size: int, dtype: torch.dtype, device: str) -> Peak:
        a, b, out = torch.randn(3, size, size, device=device).to(dtype)
        return cls((a, b, out))

    def __call__(self) -> None:
        a, b, out = self.operands
        torch.matmul(a, b, out=out)
        if a.device.type != "cpu":
            torch.accelerator.synchronize(a.device)


def ratio(provider: Provider, seconds: float, baseline_seconds: float) -> float:
    """How many times as fast as the other this library is: the other's time divided by ours."""
    return baseline_seconds / seconds if provider.ours else seconds / baseline_seconds


def _row(
    provider: Provider,
    function: str,
    shape: Shape,
    direction: str,
    medians: dict[str, float],
    peak: float,
    inputs: Inputs,
) -> dict[str, Any]:
    """A row without its durations; seconds and FLOP/s. Without its baseline a row has no ratio."""
    own = provider.function == function  # otherwise it serves only as the baseline of others
    baseline = provider.baseline if own and provider.baseline in medians else None
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
        "ratio": ratio(provider, medians[provider.name], medians[baseline]) if baseline else 1.0,
    }
    if info["ours"]:
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
