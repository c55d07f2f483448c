"""`record_am_flow`: the flow of the q and k that each block of a timm model really uses, on the image's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_timm import MODELS, TINY, is_untouched, make
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from amflow_kernels.integrations.timm import BlockFlow, record_am_flow, record_qk

T = 3
SMALL_HIERA = {
    "pretrained": False, "num_classes": 0, "img_size": 64, "embed_dim": 32, "stages": (1, 2, 2), "q_pool": 2,
    "mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False),
}  # fmt: skip
ALL = {**MODELS, "hiera": ("hiera_tiny_224", SMALL_HIERA)}


def images(model: nn.Module, clips: int = 2) -> Tensor:
    size = 64 if hasattr(model, "reroll") else model.patch_embed.img_size[0]
    return torch.randn(clips * T, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain() -> nn.Module:
    return make("vit_small_patch14_dinov2", **TINY)


@pytest.fixture
def hiera() -> nn.Module:
    return make("hiera_tiny_224", **SMALL_HIERA)


def in_order(flow: BlockFlow) -> Tensor:
    """All values of each flow, sorted."""
    return torch.cat((flow.grid.flatten(-2), flow.prefix), -1).sort().values


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options", [{}, {"lag": 2, "temperature": 0.5, "head_reduction": "mean", "center": True}], ids=str
)
def test_flows_are_of_the_layers_own_q_and_k(name: str, options: dict[str, Any]) -> None:
    """In every block, and the model's output does not change by a bit. Whose q and k: see the tests of `record_qk`."""
    model = make(ALL[name][0], **ALL[name][1])
    x = images(model)
    expected = model(x)
    with record_qk(model) as qk:
        model(x)
    with record_am_flow(model, num_frames=T, **options) as flows:
        assert torch.equal(model(x), expected)
    assert is_untouched(model)
    assert sorted(flows) == list(range(len(model.blocks)))
    for index, flow in flows.items():
        q, k = (part.unflatten(0, (2, T)) for part in qk[index])
        want = am_flow(q, k, **options)
        lead = want.shape[: 3 - ("head_reduction" in options)]
        assert flow.grid.shape[:-2] == flow.prefix.shape[:-1] == lead
        assert flow.windows == (want.shape[-2] if q.dim() == 6 else 1)
        # The grid has the tokens in another order.
        assert torch.equal(in_order(flow), want.flatten(len(lead)).sort().values)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "registers"])
def test_grid_of_a_vit(name: str) -> None:
    """Prefix tokens come first, then the image row by row; also where the image is not square."""
    options = {**ALL[name][1], "dynamic_img_size": True}
    model = make(ALL[name][0], **options)
    x = torch.randn(T, 3, 56, 84)
    with record_qk(model) as qk:
        model(x)
    with record_am_flow(model, num_frames=T) as flows:
        model(x)
    for index, flow in flows.items():
        whole = am_flow(*(part.unflatten(0, (1, T)) for part in qk[index]))
        prefix = model.num_prefix_tokens
        assert flow.grid.shape[-2:] == (4, 6)
        assert torch.equal(flow.prefix, whole[..., :prefix])
        assert torch.equal(flow.grid, whole[..., prefix:].unflatten(-1, (4, 6)))


@torch.no_grad()
def test_grid_of_hiera(hiera: nn.Module) -> None:
    """Every key of every window, pooled or not, lies where its patch does in the image."""
    x = images(hiera)
    with record_qk(hiera) as qk:
        hiera(x)
    with record_am_flow(hiera, num_frames=T) as flows:
        hiera(x)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    place = hiera.unroll(torch.stack((rows, columns), -1).view(1, 256, 2))  # of each token, as the first block has it
    sizes, windows = [], []
    for index, block in enumerate(hiera.blocks):
        flow = am_flow(*(part.unflatten(0, (2, T)) for part in qk[index]))
        if flow.dim() == 5:  # (B, pairs, heads, windows, keys): token n is key n // windows of window n % windows
            flow = torch.stack([flow[..., n % flow.shape[3], n // flow.shape[3]] for n in range(place.shape[1])], -1)
        for n, (row, column) in enumerate(place[0].int().tolist()):
            assert torch.equal(flows[index].grid[..., row, column], flow[..., n])
        sizes.append(flows[index].grid.shape[-1])
        windows.append(flows[index].windows)
        if block.attn.q_stride > 1:
            pooled = place.view(1, block.attn.q_stride, -1, 2) // 2
            assert (pooled == pooled[:, :1]).all()
            place = pooled[:, 0]
    assert sizes == [16, 16, 8, 8, 4]
    assert windows == [16, 16, 16, 16, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "dinov3", "hiera"])
def test_replaced_attention(name: str) -> None:
    """One call for both gives the same flows, and the model the output it had."""
    model = make(ALL[name][0], **ALL[name][1])
    x = images(model)
    expected = model(x)
    with record_am_flow(model, num_frames=T, blocks=[0]) as want:
        model(x)
    with record_am_flow(model, num_frames=T, replace_attention=True) as flows:
        out = model(x)
    assert torch.equal(flows[0].grid, want[0].grid)
    assert torch.equal(out, expected)


def loss(out: Tensor, flows: dict[int, BlockFlow]) -> Tensor:
    return out.square().mean() + sum(100 * flow.grid.square().mean() for flow in flows.values())


@pytest.mark.parametrize("name", ["plain", "hiera"])
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("replace_attention", [False, True])
def test_activation_checkpointing(name: str, backward_inside: bool, replace_attention: bool) -> None:
    """Layers that run again in the backward, in the ``with`` block or after it, record nothing; gradients agree."""
    model = make(ALL[name][0], **ALL[name][1]).train()
    x = images(model)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        with record_am_flow(model, num_frames=T, center=True, replace_attention=replace_attention) as flows:
            total = loss(model(x), flows)
            before = dict(flows)
            if backward_inside:
                total.backward()
        if not backward_inside:
            total.backward()
        assert all(flows[index] is flow for index, flow in before.items())
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain_grad, grad in zip(*grads, strict=True):
        assert (grad is None) is (plain_grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, plain_grad)
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_frozen_backbone(plain: nn.Module) -> None:
    """With no parameter to train, flows are differentiable in the images alone."""
    plain.requires_grad_(False)
    x = images(plain)
    with record_am_flow(plain, num_frames=T) as flows:
        plain(x)
        assert not flows[0].grid.requires_grad
        plain(x.requires_grad_())
        assert flows[2].grid.requires_grad


@pytest.mark.parametrize("name", ["plain", "hiera"])
def test_compiled_before(name: str) -> None:
    """A compiled model is compiled anew, into one graph, when its flows are wanted; the old code serves after that."""
    torch._dynamo.reset()
    counters.clear()
    model = make(ALL[name][0], **ALL[name][1])
    x = images(model)
    with torch.no_grad():
        with record_am_flow(model, num_frames=T) as want:
            expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x)
        assert counters["stats"]["unique_graphs"] == 1
        with record_am_flow(model, num_frames=T) as flows:
            torch.testing.assert_close(compiled(x), expected)
        assert counters["stats"]["unique_graphs"] == 2
        compiled(x)
        assert counters["stats"]["unique_graphs"] == 2
    assert sorted(flows) == sorted(want)
    for index in want:
        torch.testing.assert_close(flows[index].grid, want[index].grid)
    torch._dynamo.reset()


def worker(rank: int, sharded: bool, folder: str) -> None:
    """One of two processes: a step of training on its own clip, and the gradient all should have."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = make("vit_small_patch14_dinov2", **TINY)
    clips = images(model, clips=2)
    alone = make("vit_small_patch14_dinov2", **TINY)
    with record_am_flow(alone, num_frames=T, center=True) as flows:
        loss(alone(clips), flows).backward()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        step = fully_shard(model, mesh=mesh)
    else:
        step = DistributedDataParallel(model)
    with record_am_flow(step, num_frames=T, center=True) as flows:
        out = step(clips[rank * T : (rank + 1) * T])
    loss(out, flows).backward()
    for (name, parameter), want in zip(model.named_parameters(), alone.parameters(), strict=True):
        grad = parameter.grad.full_tensor() if sharded else parameter.grad
        torch.testing.assert_close(grad, want.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes(sharded: bool, tmp_path: Path) -> None:
    """Flows of each process's clips; gradients are averaged as those of any loss."""
    torch.multiprocessing.spawn(worker, (sharded, str(tmp_path)), nprocs=2)


def test_images_that_are_no_whole_clips(plain: nn.Module) -> None:
    with (
        pytest.raises(ValueError, match=r"num_frames: expected a divisor of the 6 images, got 4"),
        record_am_flow(plain, num_frames=4),
    ):
        plain(images(plain))
    assert is_untouched(plain)


@pytest.mark.parametrize(
    ("num_frames", "options", "error", "message"),
    [
        (1, {}, ValueError, r"num_frames: expected more than lag = 1, got 1"),
        (3, {"lag": 3}, ValueError, r"num_frames: expected more than lag = 3, got 3"),
        (2.0, {}, TypeError, r"num_frames: expected an int, got float"),
        (3, {"blocks": [3]}, ValueError, r"blocks: expected indices from 0 to 2, got 3"),
        (3, {"temperature": 0.0}, ValueError, r"temperature: expected at least 1/64"),
    ],
)
def test_bad_arguments(
    plain: nn.Module, num_frames: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), record_am_flow(plain, num_frames=num_frames, **options):
        plain(images(plain))
    assert is_untouched(plain)


def test_dropout_of_attention() -> None:
    """The flow is of the maps without it; attention with it is not replaced by one without."""
    model = make("vit_small_patch14_dinov2", **TINY, attn_drop_rate=0.5).train()
    with record_am_flow(model, num_frames=T) as flows:
        model(images(model))
    assert len(flows) == 3
    with (
        pytest.raises(RuntimeError, match=r"blocks\.0\.attn: drops attention at random"),
        record_am_flow(model, num_frames=T, replace_attention=True),
    ):
        model(images(model))


def test_model_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"model: expected a timm"), record_am_flow(nn.Linear(2, 2), num_frames=2):
        pass


def test_windows_in_the_batch_are_not_taken_for_images() -> None:
    """SAM's ViT folds its windows into the batch: its maps are not the image's."""
    model = timm.create_model(
        "samvit_base_patch16", pretrained=False, img_size=64, depth=2, embed_dim=48, num_heads=3,
        use_rel_pos=False, window_size=2, global_attn_indexes=(), num_classes=0,
    ).eval()  # fmt: skip
    with pytest.raises(TypeError, match=r"a timm ViT or Hiera, got VisionTransformerSAM"):  # noqa: SIM117
        with record_am_flow(model, num_frames=2):
            pass
    model.num_prefix_tokens = 0  # one that looked like a plain ViT
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn: .*windows"), record_am_flow(model, num_frames=2):
        model(torch.randn(2, 3, 64, 64))
    assert is_untouched(model)


def test_dropped_tokens() -> None:
    """With some patches dropped there is no grid."""
    model = make("vit_small_patch14_dinov2", **TINY, patch_drop_rate=0.5).train()
    message = r"blocks\.0\.attn: expected keys of 6 images of 17 tokens each.*dropped"
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(images(model))


def test_a_block_that_did_not_run(plain: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"no AM flow of blocks\.1\.attn"), record_am_flow(plain, num_frames=T):
        plain.forward_intermediates(images(plain), indices=[0], stop_early=True)
    assert is_untouched(plain)


def test_model_is_restored_after_an_exception(plain: nn.Module) -> None:
    with pytest.raises(KeyError, match="mine"), record_am_flow(plain, num_frames=T):
        raise KeyError("mine")
    assert is_untouched(plain)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("hiera_tiny_224", 224), ("vit_small_patch16_dinov3", 224)])
def test_models_of_full_size(name: str, size: int) -> None:
    """Hiera-T and DINOv3-S with random weights: every block within the budget, none with hardly any change."""
    model = make(name, noise=0.05, pretrained=False, num_classes=0)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    x = x[:1] + 0.2 * x
    with record_qk(model) as qk:
        model(x)
    with record_am_flow(model, num_frames=2) as flows:
        model(x)
    for index, flow in flows.items():
        q, k = (part.unflatten(0, (1, 2)) for part in qk[index])
        exact = tt.oracle_flow(q, k, center=True).flatten(3).sort().values + q.shape[-2] / k.shape[-2]
        assert (q.shape[-1] ** -0.5 * q @ k.mT).std() <= 6  # for which the budget is
        assert exact.std() > 1e-4
        assert (in_order(flow) - exact).abs().max() <= tt.flow_budget(q.shape[-2], k.shape[-2], 1.0)
