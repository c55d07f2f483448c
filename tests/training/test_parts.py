"""The parts of training: batches, scores, learning rate, average, precision, compiled blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from amflow_models import VideoClassifier, create_backbone, train
from amflow_models.training.average import Average
from amflow_models.training.build import build_model
from amflow_models.training.config import load_config
from amflow_models.training.loading import EvaluationBatches, TrainBatches
from amflow_models.training.metrics import scores
from amflow_models.training.parallel import choose_precision, cpu_has_bf16, distribute, make_accelerator
from torch import nn
from torch._dynamo.utils import counters


def test_processes_share_the_batches_of_one() -> None:
    """In every step the parts of N processes make up the batch of one; every clip occurs once per epoch."""
    whole = list(TrainBatches(22, 6, rank=0, world=1, seed=3, start=0, stop=9))
    parts = [list(TrainBatches(22, 6, rank=rank, world=3, seed=3, start=0, stop=9)) for rank in range(3)]
    assert whole == [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    for epoch in range(3):
        seen = [index for step in whole[3 * epoch : 3 * epoch + 3] for at, index in step if at == epoch]
        assert len(seen) == len(set(seen)) == 18
    assert whole[:3] != whole[3:6]
    assert list(TrainBatches(22, 6, rank=0, world=1, seed=3, start=4, stop=9)) == whole[4:]


@pytest.mark.parametrize(("count", "batch", "world"), [(1, 4, 1), (7, 2, 3), (12, 4, 2), (2, 8, 4)])
def test_every_clip_is_tested_in_equally_many_batches(count: int, batch: int, world: int) -> None:
    parts = [list(EvaluationBatches(count, batch, rank=rank, world=world)) for rank in range(world)]
    assert {index for part in parts for step in part for _, index in step} == set(range(count))
    assert len({tuple(map(len, part)) for part in parts}) == 1  # no process waits for another in vain
    assert [len(part) for part in parts] == [len(EvaluationBatches(count, batch, rank=0, world=world))] * world


@pytest.mark.parametrize(("batch", "world", "views", "videos"), [(16, 1, 30, 1), (16, 1, 3, 5), (16, 4, 2, 2)])
def test_a_loaded_batch_has_no_more_clips_than_the_batch_or_than_a_video(
    batch: int, world: int, views: int, videos: int
) -> None:
    for rank in range(world):
        steps = list(EvaluationBatches(40, batch, rank=rank, world=world, views=views))
        assert max(map(len, steps)) == videos
        assert videos * views <= max(batch / world, views)


def test_scores_are_those_counted_by_hand() -> None:
    """The mean over classes leaves out classes without videos."""
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    found = scores(probabilities, torch.tensor([0, 0, 1, 1]))
    assert (found.top1, found.top5, found.mean_class) == (0.75, 1.0, 0.75)
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    many = torch.arange(8.0).repeat(2, 1)
    assert scores(many, torch.tensor([3, 2])).top5 == 0.5
    with pytest.raises(ValueError, match="at least one video"):
        scores(probabilities[:0], torch.tensor([], dtype=torch.int64))


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    found = [train._rate(step, 10, 4, 2.0) for step in range(1, 11)]
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[6] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert found[-1] == pytest.approx(0)
    assert train._rate(1, 2, 0, 1.0) == pytest.approx(0.5)


def _tiny_model() -> VideoClassifier:
    backbone = create_backbone("vit_tiny_patch16_224", None, 32)
    backbone.blocks = backbone.blocks[:1]
    return VideoClassifier(backbone, 2, 2, bottleneck=4)


def test_the_average_is_its_formula_and_is_applied_only_inside_the_block() -> None:
    model = _tiny_model()
    average = Average(model, 0.75)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update()
    with average.applied():
        for name, p in model.named_parameters():
            if name in start:
                assert torch.allclose(p, start[name] + 0.25, atol=1e-6)
    for name, p in model.named_parameters():
        if name in start:
            assert torch.equal(p, start[name] + 1)


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "expected"),
    [
        ("AVX512", True, False, "bf16"),
        ("AVX512", False, True, "bf16"),
        ("AVX512", False, False, "fp32"),
        ("AVX2", True, True, "fp32"),  # PyTorch was told to use less than the CPU has
        ("DEFAULT", False, False, "fp32"),
    ],
)
def test_auto_precision_is_bf16_only_on_cpus_with_units_for_it(
    capability: str, avx512_bf16: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto") == expected
    assert choose_precision("bf16") == "bf16"
    assert choose_precision("fp32") == "fp32"


def test_auto_precision_is_bf16_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_precision("auto") == "bf16"


def test_the_cpu_is_asked_with_functions_that_pytorch_has() -> None:
    assert cpu_has_bf16() in (False, True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_share_a_graph(config_file: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph each, blocks would exceed Dynamo's limit of recompilations and run eagerly."""

    def compile_block(self: nn.Module) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_block)
    config = load_config(config_file, ["training.compile=true", "model.depth=3"])
    torch._dynamo.reset()
    counters.clear()
    model = build_model(config)
    clips = torch.rand(1, 3, 3, 32, 32)
    expected = model(clips)
    compiled = distribute(model, config.training, make_accelerator("fp32"))
    logits = compiled(clips)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the first block's input needs no gradient
    logits.sum().backward()
    torch._dynamo.reset()
