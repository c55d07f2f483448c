"""The benchmark of a training step: every model it compares runs, and is what its label says."""

from __future__ import annotations

import pytest

from benchmarks import training_step


@pytest.mark.parametrize("name", training_step.MODELS)
def test_calls(name: str) -> None:
    """Inference gives logits, a step nothing; twice, since the optimizer has a state after the first."""
    logits = training_step.prepare(name, "inference", 28, 2)()
    assert logits.shape == (1, training_step.CLASSES)
    step = training_step.prepare(name, "training step", 28, 2)
    assert step() is step() is None


def test_table() -> None:
    rows = [
        {"model": "am_flow", "kind": kind, "median": 0.5, "to_constant": 1.1, "bytes": 2e6}
        for kind in training_step.KINDS
    ]
    assert training_step.table(rows, "inference").rows == [
        ["and temporal adapters with AM flow", "500 ms", "1.10x", "2 MB"]
    ]
