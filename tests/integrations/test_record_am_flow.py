"""`record_am_flow` of timm models: the flow of the q and k that each block uses, on the image's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import MODELS, is_untouched, make, small
from small_models import images as some_images
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from amflow_kernels.integrations.timm import BlockFlow, record_am_flow, record_qk
from amflow_kernels.problem import Problem

T = 3


def images(model: Any, clips: int = 2) -> Tensor:
    return some_images(model, clips * T)


@pytest.fixture
def plain() -> Any:
    return small("plain")


@pytest.fixture
def hiera() -> Any:
    return small("hiera")


def in_order(flow: BlockFlow) -> Tensor:
    """All values of each flow, sorted."""
    return torch.cat((flow.grid.flatten(-2), flow.prefix), -1).sort().values


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"lag": 2, "temperature": 0.5, "head_reduction": "mean", "center": True}], ids=str
)
def test_flows_are_those_of_each_layers_q_and_k(name: str, options: dict[str, Any]) -> None:
    """In every block; and not a bit of the model's output changes. `record_qk` has its own tests."""
    model = small(name)
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
        # The grid orders tokens differently, so compare sorted values; the tests of grids check the order.
        assert torch.equal(in_order(flow), want.flatten(len(lead)).sort().values)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "registers"])
def test_a_vits_grid_is_row_major_after_the_prefix_tokens(name: str) -> None:
    """Also for an image that is not square."""
    model = small(name, dynamic_img_size=True)
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
def test_hieras_grid_follows_pooling_and_windows(hiera: Any) -> None:
    """Every key of every window lies where its patch is in the image."""
    x = images(hiera)
    with record_qk(hiera) as qk:
        hiera(x)
    with record_am_flow(hiera, num_frames=T) as flows:
        hiera(x)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    place = hiera.unroll(torch.stack((rows, columns), -1).view(1, 256, 2))  # of each token in the first block's order
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
def test_replacing_the_attention_changes_no_bit(name: str) -> None:
    """One call for attention and flow gives the same flows and the same output."""
    model = small(name)
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
def test_recomputation_records_nothing_and_gradients_agree(
    name: str, backward_inside: bool, replace_attention: bool
) -> None:
    """Whether the backward runs inside the ``with`` block or after it."""
    model = small(name).train()
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


def test_flows_of_a_frozen_backbone_are_differentiable_in_the_images(plain: Any) -> None:
    plain.requires_grad_(False)
    x = images(plain)
    with record_am_flow(plain, num_frames=T) as flows:
        plain(x)
        assert not flows[0].grid.requires_grad
        plain(x.requires_grad_())
        assert flows[2].grid.requires_grad


@pytest.mark.parametrize("name", ["plain", "hiera"])
def test_a_compiled_model_is_compiled_again_for_recording_only(name: str) -> None:
    """Recording compiles one other graph; afterwards the first graph runs again."""
    torch._dynamo.reset()
    counters.clear()
    model = small(name)
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


def worker(rank: int, folder: str) -> None:
    """One of two processes: a training step on its own clip, replicated and sharded, beside one process with both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    reference = small("plain")
    clips = images(reference)
    with record_am_flow(reference, num_frames=T, center=True) as flows:
        loss(reference(clips), flows).backward()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for sharded in (False, True):
        model = small("plain")
        if sharded:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
        step = fully_shard(model, mesh=mesh) if sharded else DistributedDataParallel(model)
        with record_am_flow(step, num_frames=T, center=True) as flows:
            out = step(clips[rank * T : (rank + 1) * T])
        loss(out, flows).backward()
        for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            grad = parameter.grad.full_tensor() if sharded else parameter.grad
            torch.testing.assert_close(
                grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.distributed.destroy_process_group()


def test_flows_and_averaged_gradients_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    """Two processes record the flows of their own clips, and average gradients as those of any loss."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)


def test_images_that_are_not_whole_clips_are_refused(plain: Any) -> None:
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
        (3, {"lag": 1.0}, TypeError, r"lag: expected an int, got float"),
        (3, {"impl": "gpu"}, ValueError, r"impl: expected None or one of .*got 'gpu'"),
        (3, {"scale": 1.0}, TypeError, r"unexpected keyword argument 'scale'"),
        (3, {"centre": True}, TypeError, r"unexpected keyword argument 'centre'"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    plain: Any, num_frames: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), record_am_flow(plain, num_frames=num_frames, **options):
        pytest.fail("the `with` block ran")
    assert is_untouched(plain)


def test_attention_with_dropout_is_recorded_but_not_replaced() -> None:
    """The flow is that of the maps without dropout."""
    model = small("plain", attn_drop_rate=0.5).train()
    with record_am_flow(model, num_frames=T) as flows:
        model(images(model))
    assert len(flows) == 3
    with (
        pytest.raises(RuntimeError, match=r"blocks\.0\.attn: drops attention at random"),
        record_am_flow(model, num_frames=T, replace_attention=True),
    ):
        model(images(model))


@torch.no_grad()
def test_a_compiled_model_can_be_recorded_itself(plain: Any) -> None:
    x = images(plain)
    with record_am_flow(plain, num_frames=T) as expected:
        plain(x)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="aot_eager")
    with record_am_flow(compiled, num_frames=T) as flows:
        compiled(x)
    for index in expected:
        torch.testing.assert_close(flows[index].grid, expected[index].grid)
    torch._dynamo.reset()


def test_a_model_that_is_not_timms_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a timm"), record_am_flow(nn.Linear(2, 2), num_frames=2):
        pass


def test_windows_folded_into_the_batch_are_not_taken_for_images() -> None:
    """SAM's ViT folds windows into the batch, so its maps are not those of images."""
    model = timm.create_model(
        "samvit_base_patch16", pretrained=False, img_size=64, depth=2, embed_dim=48, num_heads=3,
        use_rel_pos=False, window_size=2, global_attn_indexes=(), num_classes=0,
    ).eval()  # fmt: skip
    with pytest.raises(TypeError, match=r"a timm ViT or Hiera, .*got VisionTransformerSAM"):  # noqa: SIM117
        with record_am_flow(model, num_frames=2):
            pass
    model.num_prefix_tokens = 0  # one that looked like a plain ViT
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn: .*windows"), record_am_flow(model, num_frames=2):
        model(torch.randn(2, 3, 64, 64))
    assert is_untouched(model)


def test_dropped_tokens_are_refused() -> None:
    """Without all patches there is no grid."""
    model = small("plain", patch_drop_rate=0.5).train()
    message = r"blocks\.0\.attn: expected keys of 6 images of 17 tokens each.*dropped"
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(images(model))


def test_a_block_that_did_not_run_raises(plain: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no AM flow of blocks\.1\.attn"), record_am_flow(plain, num_frames=T):
        plain.forward_intermediates(images(plain), indices=[0], stop_early=True)
    assert is_untouched(plain)


def test_the_model_is_restored_after_an_exception(plain: Any) -> None:
    with pytest.raises(KeyError, match="mine"), record_am_flow(plain, num_frames=T):
        raise KeyError("mine")
    assert is_untouched(plain)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("hiera_tiny_224", 224), ("vit_small_patch16_dinov3", 224)])
def test_models_of_full_size_keep_the_error_budget(name: str, size: int) -> None:
    """Hiera-T and DINOv3-S with random weights: every block changes, and stays within the budget."""
    model = make(name, noise=0.05, pretrained=False, num_classes=0)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    x = x[:1] + 0.2 * x
    with record_qk(model) as qk:
        model(x)
    with record_am_flow(model, num_frames=2) as flows:
        model(x)
    for index, flow in flows.items():
        q, k = (part.unflatten(0, (1, 2)) for part in qk[index])
        exact = tt.oracle_flow(Problem(q, k, center=True)).flatten(3).sort().values + q.shape[-2] / k.shape[-2]
        assert (q.shape[-1] ** -0.5 * q @ k.mT).std() <= 6  # the range of the budget
        assert exact.std() > 1e-4
        assert (in_order(flow) - exact).abs().max() <= tt.flow_budget(exact.max().item())
