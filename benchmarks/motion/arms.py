"""The competing models, called arms: a frozen backbone, each with other trainable parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One competitor.

    Attributes:
        label: its name in tables.
        options: options of `VideoClassifier`; None is a linear probe on the frozen backbone.
        sees: for a probe, the frames whose vectors it gets: their "mean", the "first", or "all" side by side.
        tasks: the tasks it runs on; None is all.
        rate: learning rate, chosen by ``python -m benchmarks.motion tune`` where `RATE_OF` does not name another arm.
    """

    label: str
    options: dict[str, Any] | None = None
    sees: str = ""
    tasks: tuple[str, ...] | None = None
    rate: float = 0.0


_CONSTANT = {"blocks": "all", "gate": "constant"}
_FLOW = {"blocks": "all"}
ORDER = ("direction",)  # a task that only the order of frames solves

ARMS = {
    "probe_mean": Arm("linear probe: mean of the frames", sees="mean"),
    "probe_first": Arm("linear probe: first frame", sees="first"),
    "probe_all": Arm("linear probe: frames side by side", sees="all"),
    "parallel": Arm("adapters without temporal unit", {"blocks": "none"}, tasks=ORDER, rate=2e-3),
    "unordered": Arm("temporal unit blind to order", {**_CONSTANT, "unit": "set"}, tasks=ORDER, rate=2e-3),
    "constant": Arm("constant gate", _CONSTANT, rate=2e-3),
    "frame_difference": Arm("frame difference", {"blocks": "all", "gate": "frame_difference"}, rate=2e-3),
    "am_flow": Arm("AM flow", _FLOW, rate=1e-3),
    "flow_times_difference": Arm(
        "AM flow x frame difference", {"blocks": "all", "gate": "flow_times_difference"}, rate=1e-3
    ),
    "am_flow_first_last": Arm("AM flow, first and last block", {"blocks": "first_last"}, rate=1e-3),
    "constant_serial": Arm("constant gate, serial", {**_CONSTANT, "form": "serial"}, rate=1e-3),
    "am_flow_serial": Arm("AM flow, serial", {**_FLOW, "form": "serial"}, rate=2e-3),
    "tcn": Arm("dilated TCN", {**_FLOW, "unit": "tcn"}, rate=1e-3),
    "lstm": Arm("LSTM", {**_FLOW, "unit": "lstm"}, rate=2e-3),
    "transformer": Arm("transformer", {**_FLOW, "unit": "transformer"}, rate=1e-3),
}

# Arms that take the learning rate of another one.
RATE_OF = {
    "parallel": "constant",
    "unordered": "constant",
    "flow_times_difference": "am_flow",
    "am_flow_first_last": "am_flow",
}
