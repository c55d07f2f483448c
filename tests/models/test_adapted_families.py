"""AM-flow adapters in models of other libraries: by the same reading of q and k as `record_am_flow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from amflow_models import add_adapters
from amflow_models.adapters import Adapter
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from amflow_kernels import record_am_flow
from benchmarks.dino import DinoViT

T, WIDTH = 3, 48


def torchvision_vit() -> Any:
    return VisionTransformer(56, 14, num_layers=3, num_heads=3, hidden_dim=WIDTH, mlp_dim=32, num_classes=8)


def open_clip_vit() -> Any:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip (the extra families)")
    vision = {"image_size": 56, "layers": 3, "width": WIDTH, "head_width": 16, "patch_size": 14}
    return open_clip.CLIP(
        8, vision, {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    ).visual


def encoder() -> Any:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 3, 64, 0.0, batch_first=True), 3)


MODELS: dict[str, Callable[[], Any]] = {
    "torchvision": torchvision_vit,
    "open_clip": open_clip_vit,
    "DINOv2": DinoViT,
    "DINOv3": lambda: DinoViT(in_lists=True),
    "TransformerEncoder": encoder,
}


@pytest.fixture(autouse=True)
def _without_fused_inference_kernels() -> Iterator[None]:
    """In which outputs differ in the last digits."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # attention of freshly initialised layers is nearly uniform
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def clips(name: str) -> Tensor:
    shape = (9, WIDTH) if name == "TransformerEncoder" else (3, 56, 56)
    return torch.randn(2 * T, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("align", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_see_the_flow_of_their_block_and_train(
    name: str, align: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output changes by no bit at the start; the flow is that of `record_am_flow`; q and k are computed once."""
    model, x = make(name), clips(name)
    with torch.no_grad(), record_am_flow(model, num_frames=T, center=True, head_reduction="mean") as recorded:
        expected = model(x)
    add_adapters(model, num_frames=T, blocks="all", align=align, verbose=False)
    flows: list[Tensor] = []
    branch = Adapter.branch

    def spy(self: Adapter, x: Tensor, num_frames: int, flow: Tensor, **kwargs: Any) -> Tensor:
        flows.append(flow)
        return branch(self, x, num_frames, flow, **kwargs)

    monkeypatch.setattr(Adapter, "branch", spy)
    projections = []
    packed = nn.functional._in_projection_packed
    monkeypatch.setattr(nn.functional, "_in_projection_packed", lambda *args: projections.append(args) or packed(*args))
    out = model(x)
    assert torch.equal(out, expected)
    if not name.startswith("DINO"):
        assert len(projections) == 3 * (1 + align)  # with an aligning encoder also those of the aligned tokens
    if not align:
        for flow, want in zip(flows, recorded.values(), strict=True):
            torch.testing.assert_close(flow, want.flow)
            assert flow.std() > 1e-6
    nn.init.normal_(next(m for m in model.modules() if isinstance(m, Adapter)).up.weight)
    model(x).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
