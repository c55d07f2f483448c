"""`record_qk`: the recorded q and k are those that the layer's attention uses, and the model is unaffected."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_models import HEAD_DIM, HEADS, TINY, VITS, images, is_untouched, make, small
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn

from amflow_kernels import am_flow
from amflow_kernels.integrations.timm import record_qk


@pytest.fixture(params=VITS)
def vit(request: pytest.FixtureRequest) -> Any:
    return small(request.param)


@pytest.fixture
def plain() -> Any:
    return small("plain")


@torch.no_grad()
def test_recording_changes_no_bit_of_the_output(vit: Any) -> None:
    x = images(vit, 4)
    expected = vit(x)
    with record_qk(vit):
        assert torch.equal(vit(x), expected)
    assert is_untouched(vit)
    assert torch.equal(vit(x), expected)


@torch.no_grad()
def test_q_and_k_are_what_the_attention_uses(vit: Any) -> None:
    """softmax(q k^T) v is what enters the output projection, with v computed from the layer's own weights."""
    layer_in, projection_in = [], []
    for block in vit.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: layer_in.append(args[0]))
        block.attn.proj.register_forward_pre_hook(lambda module, args: projection_in.append(args[0]))
    with record_qk(vit) as qk:
        vit(images(vit, 4))
    assert list(qk) == [0, 1, 2]
    for block, x, expected, (q, k) in zip(vit.blocks, layer_in, projection_in, qk.values(), strict=True):
        bias = block.attn.qkv.bias
        if getattr(block.attn, "q_bias", None) is not None:
            bias = torch.cat((block.attn.q_bias, block.attn.k_bias, block.attn.v_bias))
        v = nn.functional.linear(x, block.attn.qkv.weight, bias).chunk(3, dim=-1)[2]
        v = v.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        assert q.shape == k.shape == v.shape
        maps = torch.softmax(q.double() @ k.double().mT * HEAD_DIM**-0.5, dim=-1)
        torch.testing.assert_close(
            (maps @ v.double()).transpose(1, 2).flatten(2), expected.double(), rtol=1e-5, atol=1e-5
        )
        assert maps.std() > 1e-2  # with uniform maps any q and k would pass


@torch.no_grad()
def test_q_and_k_are_recorded_after_their_norm() -> None:
    vit = make("vit_small_patch14_dinov2", **{**TINY, "qk_norm": True})
    normed = []
    vit.blocks[1].attn.q_norm.register_forward_hook(lambda module, args, out: normed.append(out))
    vit.blocks[1].attn.k_norm.register_forward_hook(lambda module, args, out: normed.append(out))
    with record_qk(vit, blocks=[1]) as qk:
        vit(images(vit, 4))
    assert qk[1][0] is normed[0]
    assert qk[1][1] is normed[1]


@torch.no_grad()
def test_recorded_q_and_k_are_views_that_am_flow_takes(plain: Any) -> None:
    with record_qk(plain, blocks=[2]) as qk:
        plain(images(plain, 6))
    q, k = (x.unflatten(0, (2, 3)) for x in qk[2])
    assert q._base is not None  # a view of the fused qkv, not a copy
    flow = am_flow(q, k)
    assert flow.shape == (2, 2, HEADS, 17)
    expected = am_flow(q.double(), k.double(), impl="reference")
    torch.testing.assert_close(flow.double(), expected, rtol=0, atol=5e-7)


def test_gradients_flow_through_the_recorded_tensors(plain: Any) -> None:
    with record_qk(plain, blocks=[2]) as qk:
        plain(images(plain, 4))
    q, k = (x.unflatten(0, (1, 4)) for x in qk[2])
    am_flow(q, k, impl="reference").square().sum().backward()
    assert plain.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@torch.no_grad()
def test_only_selected_blocks_are_recorded_and_a_second_forward_replaces_them(plain: Any) -> None:
    x = images(plain, 4)
    with record_qk(plain, blocks=(2, 0)) as qk:
        assert qk == {}
        plain(x)
        first = qk[0][0]
        plain(x[:2])
        assert sorted(qk) == [0, 2]
        assert qk[0][0].shape[0] == 2
        torch.testing.assert_close(qk[0][0], first[:2])


@torch.no_grad()
def test_a_block_may_be_its_own_attention_layer() -> None:
    vit = make("vit_small_patch14_dinov2", **TINY, block_fn=ParallelScalingBlock)
    x = images(vit, 4)
    expected = vit(x)
    with record_qk(vit) as qk:
        assert torch.equal(vit(x), expected)
    assert [q.shape for q, _ in qk.values()] == [(4, HEADS, 17, HEAD_DIM)] * 3


@torch.no_grad()
def test_nested_recordings_restore_an_existing_forward(plain: Any) -> None:
    attn = plain.blocks[1].attn
    calls = []
    original = attn.forward

    def own_forward(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return original(*args, **kwargs)

    attn.forward = own_forward
    with record_qk(plain) as outer:
        with record_qk(plain, blocks=[1]) as inner:
            plain(images(plain, 4))
        assert inner[1][0] is outer[1][0]
    assert attn.forward is own_forward
    assert len(calls) == 1
    del attn.forward
    assert is_untouched(plain)


def test_model_is_restored_after_an_exception_in_the_block(plain: Any) -> None:
    with pytest.raises(KeyError, match="mine"), record_qk(plain):  # and not "no q and k seen"
        raise KeyError("mine")
    assert is_untouched(plain)


@torch.no_grad()
def test_model_is_restored_after_an_exception_in_the_forward(plain: Any) -> None:
    x = images(plain, 4)
    expected = plain(x)

    def fail(module: nn.Module, args: object) -> None:
        raise ArithmeticError("inside")

    handle = plain.blocks[1].attn.proj.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="inside"), record_qk(plain):
        plain(x)
    handle.remove()
    assert is_untouched(plain)
    assert torch.equal(plain(x), expected)


class NestedTensorBlock(nn.Module):
    """A block like those of DINOv2's own code: its attention layer is none of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(48, HEADS)


KNOWN = r"model: expected a timm vision transformer whose blocks call scaled_dot_product_attention; "
NO_LIST = r"model: expected a timm vision transformer, with a list `\.blocks`.*; got {}, which has none"
REFUSED = {
    "resnet10t": NO_LIST.format("ResNet"),
    "swin_tiny_patch4_window7_224": NO_LIST.format("SwinTransformer"),
    "mixer_s32_224": KNOWN + r"blocks\.0 of this MlpMixer is MixerBlock, which has no attention layer `attn`",
    "tnt_s_legacy_patch16_224": KNOWN + r"blocks\.0 of this TNT is Block, which has no attention layer `attn`",
    "crossvit_9_240": KNOWN + r"blocks\.0 of this CrossVit is MultiScaleBlock, which has no attention layer `attn`",
    "twins_svt_small": KNOWN + r"blocks\.0 of this Twins is ModuleList, which has no attention layer `attn`",
    "cait_xxs24_224": KNOWN + r"blocks\.0\.attn of this Cait is TalkingHeadAttn, which is not known to call it",
    "convit_tiny": KNOWN + r"blocks\.0\.attn of this ConVit is GPSA, which is not known to call it",
    "xcit_nano_12_p16_224": KNOWN + r"blocks\.0\.attn of this Xcit is XCA, whose attention is between channels",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_attention_cant_be_read_are_refused(name: str) -> None:
    """The message says of the model only what is true."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    with pytest.raises(TypeError, match=REFUSED[name]), record_qk(model):
        pass


def test_attention_between_channels_is_refused_where_it_is_fused_too() -> None:
    with torch.device("meta"):
        model = timm.create_model("xcit_nano_12_p16_224", pretrained=False, depth=1)
    model.blocks[0].attn.fused_attn = True
    with pytest.raises(TypeError, match=REFUSED["xcit_nano_12_p16_224"]), record_qk(model):
        pass


def test_an_attention_layer_that_is_not_timms_is_refused_as_such() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([NestedTensorBlock()])
    message = r"blocks\.0\.attn of this Module is MultiheadAttention, which is not known to call it"
    with pytest.raises(TypeError, match=message), record_qk(model):
        pass


@pytest.mark.parametrize("block", [3, -1, 12])
def test_block_indices_out_of_range_are_refused(plain: Any, block: int) -> None:
    with pytest.raises(ValueError, match=rf"blocks: expected indices from 0 to 2, got {block}"):  # noqa: SIM117
        with record_qk(plain, blocks=[0, block]):
            pass
    assert is_untouched(plain)


@torch.no_grad()
def test_a_block_that_did_not_run_raises(plain: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no q and k seen in blocks\.1\.attn, blocks\.2\.attn"), record_qk(plain):
        plain.forward_intermediates(images(plain, 4), indices=[0], stop_early=True)
    assert is_untouched(plain)


def test_a_layer_with_fused_attention_switched_off_raises(plain: Any) -> None:
    plain.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn.*`fused_attn` to True"), record_qk(plain):
        pass
    with record_qk(plain, blocks=[0, 2]), torch.no_grad():  # the other blocks can be read
        plain(images(plain, 4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_name", "options", "message"),
    [
        ("beit_base_patch16_224", {"img_size": 64}, r"blocks\.0\.attn: adds a mask or bias"),
        (
            "vit_small_patch14_dinov2",
            {"block_fn": DiffParallelScalingBlock},
            r"blocks\.0: calls the attention more than once",
        ),
    ],
)
def test_attention_with_bias_or_two_calls_raises(model_name: str, options: dict[str, object], message: str) -> None:
    vit = timm.create_model(model_name, **{**TINY, **options}).eval()
    with pytest.raises(RuntimeError, match=message), record_qk(vit):
        vit(images(vit, 4))
    assert is_untouched(vit)
