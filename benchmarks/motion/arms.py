"""What competes: a frozen backbone, and what is trained on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOVING_CAMERA = ("direction_pan", "which_pan")


@dataclass(frozen=True)
class Arm:
    """One competitor.

    Attributes:
        label: for tables.
        options: of `VideoClassifier`; None is a linear probe on the frozen backbone.
        sees: for a probe, the vectors of which frames: "mean", "first", or "all", side by side.
        budget: how many times the steps of the others.
        tasks: only these; None is all.
    """

    label: str
    options: dict[str, Any] | None = None
    sees: str = ""
    budget: int = 1
    tasks: tuple[str, ...] | None = None


_CONSTANT = {"blocks": "all", "gate": "constant"}

ARMS = {
    "probe_mean": Arm("linear probe: mean of the frames", sees="mean"),
    "probe_first": Arm("linear probe: first frame", sees="first"),
    "probe_all": Arm("linear probe: frames side by side", sees="all"),
    "serial": Arm("adapters, serial, no temporal unit", {"blocks": "none", "form": "serial"}),
    "parallel": Arm("adapters, parallel, no temporal unit", {"blocks": "none"}),
    "unordered": Arm("temporal unit blind to order", {**_CONSTANT, "unit": "set"}),
    "constant": Arm("temporal unit, constant gate", _CONSTANT),
    "constant_long": Arm("temporal unit, constant gate, twice the steps", _CONSTANT, budget=2),
    "constant_serial": Arm("temporal unit, constant gate, serial", {**_CONSTANT, "form": "serial"}),
    "frame_difference": Arm("temporal unit, frame-difference gate", {"blocks": "all", "gate": "frame_difference"}),
    "am_flow_raw": Arm("temporal unit, AM flow, not standardised", {"blocks": "all", "gate": "raw"}),
    "am_flow_first_last": Arm("temporal unit, AM flow, first and last block", {"blocks": "first_last"}),
    "am_flow": Arm("temporal unit, AM flow", {"blocks": "all"}),
    "am_flow_serial": Arm("temporal unit, AM flow, serial", {"blocks": "all", "form": "serial"}),
    "am_flow_aligned": Arm("temporal unit, AM flow of aligned frames", {"blocks": "all", "align": True},
                           tasks=MOVING_CAMERA),
}  # fmt: skip
