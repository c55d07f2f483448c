"""The competing models, called arms: a frozen backbone, each with other trainable parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAN = ("direction_pan", "which_pan")
TWO = ("direction", "which_pan")  # order over a still background, position over a moving one


@dataclass(frozen=True)
class Arm:
    """One competitor.

    Attributes:
        label: its name in tables.
        options: options of `VideoClassifier`; None is a linear probe on the frozen backbone.
        sees: for a probe, the frames whose vectors it gets: their "mean", the "first", or "all" side by side.
        budget: factor on the number of steps.
        tasks: the tasks it runs on; None is all.
        choice: it only serves to choose a default on the validation split, and is not tested.
    """

    label: str
    options: dict[str, Any] | None = None
    sees: str = ""
    budget: int = 1
    tasks: tuple[str, ...] | None = None
    choice: bool = False


_CONSTANT = {"blocks": "all", "gate": "constant"}
_FLOW = {"blocks": "all"}

ARMS = {
    "probe_mean": Arm("linear probe: mean of the frames", sees="mean"),
    "probe_first": Arm("linear probe: first frame", sees="first"),
    "probe_all": Arm("linear probe: frames side by side", sees="all"),
    "serial": Arm("adapters, serial, no temporal unit", {"blocks": "none", "form": "serial"}, tasks=TWO),
    "parallel": Arm("adapters, parallel, no temporal unit", {"blocks": "none"}, tasks=TWO),
    "unordered": Arm("temporal unit blind to order", {**_CONSTANT, "unit": "set"}, tasks=(*TWO, "which")),
    "constant": Arm("temporal unit, constant gate", _CONSTANT),
    "constant_long": Arm("temporal unit, constant gate, twice the steps", _CONSTANT, budget=2, tasks=TWO),
    "constant_serial": Arm("temporal unit, constant gate, serial", {**_CONSTANT, "form": "serial"}, tasks=TWO),
    "frame_difference": Arm("temporal unit, frame-difference gate", {"blocks": "all", "gate": "frame_difference"}),
    "am_flow_raw": Arm("temporal unit, AM flow, not standardised", {"blocks": "all", "gate": "raw"}, tasks=TWO),
    "am_flow_first_last": Arm("temporal unit, AM flow, first and last block", {"blocks": "first_last"}),
    "am_flow": Arm("temporal unit, AM flow", _FLOW),
    "am_flow_serial": Arm("temporal unit, AM flow, serial", {**_FLOW, "form": "serial"}, tasks=TWO),
    "am_flow_aligned": Arm("temporal unit, AM flow of aligned frames", {**_FLOW, "align": True}, tasks=PAN),
    "lstm": Arm("LSTM", {**_FLOW, "unit": "lstm"}, tasks=TWO, choice=True),
    "gru": Arm("GRU", {**_FLOW, "unit": "gru"}, tasks=TWO, choice=True),
    "transformer": Arm("transformer", {**_FLOW, "unit": "transformer"}, tasks=TWO, choice=True),
    "pooled": Arm("convolution, pooled over tokens", {**_FLOW, "pooled": True}, tasks=TWO, choice=True),
    "uncentred": Arm("convolution, not centred", {**_FLOW, "centred": False}, tasks=TWO, choice=True),
}  # fmt: skip
