"""The benchmark of a training step runs for every model that it compares."""

from __future__ import annotations

import pytest

from benchmarks import training_step


@pytest.mark.parametrize("name", training_step.MODELS)
def test_inference_gives_logits_and_steps_can_repeat(name: str) -> None:
    """A step runs twice, since the optimizer has a state only after the first."""
    logits = training_step.prepare(name, "inference", 28, 2)()
    assert logits.shape == (1, training_step.CLASSES)
    step = training_step.prepare(name, "training step", 28, 2)
    assert step() is step() is None


def test_the_table_has_a_row_for_each_model() -> None:
    rows = [
        {"model": "am_flow", "kind": kind, "median": 0.5, "to_constant": 1.1, "bytes": 2e6}
        for kind in training_step.KINDS
    ]
    assert training_step.table(rows, "inference").rows == [
        ["and temporal adapters with AM flow", "500 ms", "1.10x", "2 MB"]
    ]
