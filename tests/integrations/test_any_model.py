"""`record_am_flow` of any model that calls scaled_dot_product_attention or has nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import timm
import torch
from small_models import is_untouched, small
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from amflow_kernels import am_flow, record_am_flow, record_qk
from amflow_kernels.integrations import timm as timm_preset
from benchmarks.dino import DinoViT

T, WIDTH, HEADS = 3, 48, 4
IMAGES = 2 * T


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def uneven(model: Any) -> Any:
    """A model in eval mode with random weights: attention of freshly initialised layers is nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def torchvision_vit(**options: Any) -> Any:
    return uneven(VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=WIDTH, mlp_dim=32, **options))


def images(size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = 9) -> Tensor:
    return torch.randn(IMAGES, count, WIDTH, generator=torch.Generator().manual_seed(1))


def flow_of(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    return am_flow(q.unflatten(0, (-1, T)), k.unflatten(0, (-1, T)), **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Attend(nn.Module):
    """Attention by `scaled_dot_product_attention`, with q, k, v made into a shape of one's own."""

    def __init__(self, split: Callable[[Tensor], Tensor], heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.split, self.options = split, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        return scaled_dot_product_attention(q, k, v, **self.options).reshape(x.shape)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Model(nn.Module):
    """Patches of images, and layers of attention."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return x


# nn.MultiheadAttention


def by_hand(layer: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (images, heads, N, D) of tokens (images, N, C), by the layer's own weights."""
    weights = layer.in_proj_weight.chunk(3) if layer._qkv_same_embed_dim else (layer.q_proj_weight, layer.k_proj_weight)
    biases = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return tuple(heads(nn.functional.linear(x, w, b)) for x, w, b in zip((query, key), weights, biases, strict=False))


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eval", "train"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 40, "vdim": 24}, {"cross": True}],
    ids=["packed", "no bias", "separate", "cross"],
)
def test_all_forms_of_multihead_attention(
    options: dict[str, Any], batch_first: bool, need_weights: bool, training: bool
) -> None:
    """The flow is that of q and k after the projections, and not a bit of the output changes."""
    options = dict(options)
    cross = options.pop("cross", False)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options).train(training)
    query = key = value = tokens()
    if cross or "kdim" in options:
        key, value = (
            torch.randn(IMAGES, 7, options.get("kdim", WIDTH)),
            torch.randn(IMAGES, 7, options.get("vdim", WIDTH)),
        )
    if cross:
        value = key
    q, k = by_hand(layer, query, key)
    given = (query, key, value)
    if not batch_first:
        moved = {id(x): x.transpose(0, 1) for x in given}
        given = tuple(moved[id(x)] for x in given)
    expected = layer(*given, need_weights=need_weights)
    with record_am_flow(layer, num_frames=T) as flows, record_qk(layer) as qk:
        out = layer(*given, need_weights=need_weights)
    with record_am_flow(layer, num_frames=T, replace_attention=not need_weights) as replaced:
        replaced_out = layer(*given, need_weights=need_weights)
    for result in (out, replaced_out):
        assert torch.equal(result[0], expected[0])
        assert (result[1] is None) is not need_weights
    (flow,) = flows.values()
    close(flow.flow, flow_of(q, k))
    assert flow.flow.std() > 1e-5
    assert torch.equal(next(iter(replaced.values())).flow, flow.flow)
    assert (flow.grid, flow.prefix, flow.windows) == (None, None, 1)
    for got, want in zip(next(iter(qk.values())), (q, k), strict=True):
        close(got, want)
    assert is_untouched(layer)


MASKS: dict[str, dict[str, Any]] = {
    "attn_mask": {"attn_mask": torch.zeros(9, 9)},
    "key_padding_mask": {"key_padding_mask": torch.zeros(IMAGES, 9, dtype=torch.bool)},
    "is_causal": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_multihead_attention_are_refused(mask: str, need_weights: bool) -> None:
    model = Model(nn.Identity())
    model.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = tokens()
    with pytest.raises(RuntimeError, match=r"^attn: adds a mask or bias"), record_am_flow(model, num_frames=T):
        model.attn(x, x, x, need_weights=need_weights, **MASKS[mask])
    assert is_untouched(model)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_belong_to_no_token_are_refused(option: str) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **{option: True})
    x = tokens()
    with pytest.raises(RuntimeError, match=r"MultiheadAttention: adds keys that belong to no token"):  # noqa: SIM117
        with record_am_flow(layer, num_frames=T):
            layer(x, x, x)


def test_a_single_image_without_batch_dimension_is_refused() -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    x = tokens()[0]
    with pytest.raises(RuntimeError, match=r"expected a batch of images"), record_am_flow(layer, num_frames=T):
        layer(x, x, x)


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_encoder_leaves_its_fused_inference_kernel_while_recorded(batch_first: bool) -> None:
    """The output stays close, PyTorch's switch is not touched, and afterwards the fused kernel runs again."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=batch_first)
    model = uneven(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))
    x = tokens() if batch_first else tokens().transpose(0, 1)
    expected = model(x)
    with record_am_flow(model, num_frames=T) as flows:
        assert torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert list(flows) == ["layers.0.self_attn", "layers.1.self_attn"]
    close(flows["layers.0.self_attn"].flow, flow_of(*by_hand(model.layers[0].self_attn, tokens(), tokens())))
    assert torch.equal(model(x), expected)
    assert is_untouched(model)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_transformer_encoder() -> None:
    """While it is traced it does not ask whether a mode is active, and must leave the fused kernel all the same."""
    model = uneven(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), 2))
    x, compiled = tokens(), torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    with record_am_flow(model, num_frames=T) as want:
        model(x)
    with record_am_flow(compiled, num_frames=T) as flows:
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    for name, flow in flows.items():
        torch.testing.assert_close(flow.flow, want[name].flow)
    assert torch.equal(compiled(x), expected)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


@torch.no_grad()
def test_padding_of_a_transformer_encoder_is_refused() -> None:
    """It makes nested tensors of its tokens."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padded = torch.zeros(IMAGES, 9, dtype=torch.bool)
    padded[:, 7:] = True
    with pytest.raises(RuntimeError, match=r"^layers\.0: is given nested tensors"), record_am_flow(model, num_frames=T):
        model(tokens(), src_key_padding_mask=padded)
    assert is_untouched(model)


# torchvision's and the DINO repositories' models: training, compiled code, grids


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.module, *args, use_reentrant=False)


def loss(out: Tensor, flows: dict[str, Any]) -> Tensor:
    return out.square().mean() + sum(100 * flow.flow.square().mean() for flow in flows.values())


@pytest.mark.parametrize("make", [torchvision_vit, lambda: uneven(DinoViT())], ids=["torchvision", "dino"])
@pytest.mark.parametrize("replace_attention", [False, True])
def test_gradients_of_a_checkpointed_model(make: Callable[[], Any], replace_attention: bool) -> None:
    """Recomputation records nothing; gradients are those without checkpointing, of the model's own attention."""
    x = images(32 if make is torchvision_vit else 28)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make().train()
        parent, name = (model.encoder, "layers") if make is torchvision_vit else (model, "blocks")
        layers = list(getattr(parent, name))
        if checkpointing:
            setattr(parent, name, nn.Sequential(*map(Checkpointed, layers)))
        with record_am_flow(
            model, num_frames=T, center=True, replace_attention=checkpointing and replace_attention
        ) as flows:
            total = loss(model(x), flows)
        before = dict(flows)
        total.backward()
        assert all(flows[name] is flow for name, flow in before.items())
        grads.append([parameter.grad for parameter in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_a_compiled_torchvision_model() -> None:
    model, x = torchvision_vit(), images()
    with record_am_flow(model, num_frames=T) as want:
        expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with record_am_flow(compiled, num_frames=T) as flows:
        torch.testing.assert_close(compiled(x), expected)
    assert list(flows) == list(want)
    for name, flow in flows.items():
        torch.testing.assert_close(flow.flow, want[name].flow)
        assert flow.grid.shape == (2, T - 1, 3, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "size", "prefix", "grid"),
    [
        (torchvision_vit, 32, 1, (4, 4)),
        (lambda: DinoViT(), 56, 5, (4, 4)),
        (lambda: DinoViT(in_lists=True), 42, 5, (3, 3)),
        (lambda: small("registers"), 56, 5, (4, 4)),
    ],
    ids=["torchvision", "DINOv2", "DINOv3", "timm"],
)
def test_a_grid_is_found_where_the_model_tells_it(
    model: Callable[[], Any], size: int, prefix: int, grid: tuple[int, int]
) -> None:
    vit = model().eval()
    with record_am_flow(vit, num_frames=T) as flows:
        vit(images(size))
    for flow in flows.values():
        assert torch.equal(flow.prefix, flow.flow[..., :prefix])
        assert torch.equal(flow.grid, flow.flow[..., prefix:].unflatten(-1, grid))


@torch.no_grad()
def test_a_grid_may_be_told() -> None:
    model, x = Model(Attend(heads)), images()
    with record_am_flow(model, num_frames=T) as unknown:
        model(x)
    with record_am_flow(model, num_frames=T, grid=(4, (3, 4))) as told:
        model(x)

    def columns(name: str, flow: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        assert (name, windows) == ("layers.0", 1)
        return flow.unflatten(-1, (4, 4)).mT, flow[..., :0]

    with record_am_flow(model, num_frames=T, grid=columns) as turned:
        model(x)
    flow = unknown["layers.0"].flow
    assert unknown["layers.0"].grid is None
    assert torch.equal(told["layers.0"].grid, flow[..., 4:].unflatten(-1, (3, 4)))
    assert torch.equal(told["layers.0"].prefix, flow[..., :4])
    assert torch.equal(turned["layers.0"].grid, flow.unflatten(-1, (4, 4)).mT)


# which layers


class Head(nn.Module):
    """Pools all tokens by one query."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


def with_head() -> Any:
    return Model(Attend(heads), Attend(heads), Head())


CHOICES: dict[str, tuple[Any, list[str]]] = {
    "all but heads that pool": (None, ["layers.0", "layers.1"]),
    "pattern": ("*", ["layers.0", "layers.1", "layers.2.attn"]),
    "pattern of some": ("layers.[12]*", ["layers.1", "layers.2.attn"]),
    "names": (["layers.1", "layers.0"], ["layers.0", "layers.1"]),
    "a module around the layer": (["layers.2"], ["layers.2"]),
    "predicate": (lambda name, module: isinstance(module, nn.MultiheadAttention), ["layers.2.attn"]),
}


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES)
def test_layers_are_chosen(choice: str) -> None:
    layers, expected = CHOICES[choice]
    model = with_head()
    with record_am_flow(model, num_frames=T, layers=layers) as flows, record_qk(model, layers=layers) as qk:
        model(images())
    assert sorted(flows) == sorted(qk) == expected
    assert is_untouched(model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block*", r"layers: expected 'block\*' to choose some attention layers, none of layers\.0, layers\.1, .* is"),
        (["layer.0"], r"layers: expected names of modules of the model, got 'layer\.0'; did you mean 'layers\.0'"),
        ([], r"layers: expected names of layers, got none"),
        (lambda name, module: False, r"layers: expected a predicate to choose some"),
        (["layers.2", "layers.2.attn"], r"layers: expected layers of which none contains another, got 'layers\.2' and"),
    ],
    ids=["pattern", "name", "none", "predicate", "nested"],
)
def test_choices_that_choose_nothing_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), record_am_flow(with_head(), num_frames=T, layers=layers):
        pytest.fail("the `with` block ran")


class Held(nn.Module):
    """Attention by a function that the layer is given, as some libraries' processors are."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, -1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


class Processor:
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


TABLE = {"fused": attend}


class Table(nn.Module):
    """Attention by an entry of a table of functions."""

    def forward(self, x: Tensor) -> Tensor:
        return TABLE["fused"](x, x, x)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [lambda: Held(attend), lambda: Held(Processor()), Table], ids=["function", "object", "table"]
)
def test_layers_are_found_by_what_they_call(layer: Callable[[], nn.Module]) -> None:
    model = Model(layer())
    with record_am_flow(model, num_frames=T) as flows:
        model(images())
    assert list(flows) == ["layers.0"]


# windows


class Windows(nn.Module):
    """Attention in windows of 4 tokens that are folded into the batch, image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attend(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.unflatten(1, (-1, 4)).flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1, 2)


@torch.no_grad()
def test_windows_folded_into_the_batch_must_be_told() -> None:
    model, x = Model(Windows()), images()
    message = r"^layers\.0\.attn: expected q and k of the 6 images .*got q \(24, .*windows='batch'"
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(x)
    with record_am_flow(model, num_frames=T, windows="batch") as flows, record_qk(model) as qk:
        model(x)
    flow = flows["layers.0.attn"]
    q, k = (part.unflatten(0, (2, T, 4)).movedim(2, 3) for part in qk["layers.0.attn"])
    assert flow.windows == 4
    assert torch.equal(flow.flow, am_flow(q.contiguous(), k.contiguous()))
    assert flow.flow.shape == (2, T - 1, HEADS, 4, 4)
    with pytest.raises(ValueError, match=r"windows: expected None or 'batch', got 'images'"):  # noqa: SIM117
        with record_am_flow(model, num_frames=T, windows="images"):
            pass


def windows_first(x: Tensor) -> Tensor:
    """(images, windows, heads, N, D)"""
    return x.unflatten(1, (2, -1)).unflatten(-1, (HEADS, -1)).transpose(2, 3)


def windows_second(x: Tensor) -> Tensor:
    return windows_first(x).transpose(1, 2)


@torch.no_grad()
def test_windows_may_come_before_heads() -> None:
    """The layer's `num_heads` tells which is which."""
    models = [Model(Attend(split)) for split in (windows_first, windows_second)]
    models[1].load_state_dict(models[0].state_dict())
    flows = []
    for model in models:
        with record_am_flow(model, num_frames=T, head_reduction="mean") as recorded:
            model(images())
        flows.append(recorded["layers.0"])
    assert flows[0].windows == flows[1].windows == 2
    assert torch.equal(flows[0].flow, flows[1].flow)
    assert flows[0].flow.shape == (2, T - 1, 2, 8)
    model = Model(Attend(windows_first, heads=3))
    with (
        pytest.raises(RuntimeError, match=r"^layers\.0: expected heads and windows"),
        record_am_flow(model, num_frames=T),
    ):
        model(images())


# what can't be recorded


class Folding(nn.Module):
    """Folds clips into the batch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = Model(Attend(heads))

    def forward(self, clips: Tensor) -> Tensor:
        return self.vit(clips.flatten(0, 1))


class SharedKeys(Attend):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return scaled_dot_product_attention(q, k[:, :1], v[:, :1]).transpose(1, 2).flatten(2)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scale": (lambda: Attend(heads, scale=1.0), r"^layers\.0: scales its logits by 1\.0"),
    "mask": (lambda: Attend(heads, attn_mask=torch.zeros(16, 16)), r"^layers\.0: adds a mask or bias"),
    "shared keys": (lambda: SharedKeys(heads), r"^layers\.0: shares keys between heads"),
    "no heads": (lambda: Attend(lambda x: x), r"^layers\.0: expected q of shape \(images, heads, N, D\)"),
    "large heads": (
        lambda: Attend(lambda x: torch.cat([x] * 6, -1)[:, None]),
        r"^layers\.0: has a head dimension of 288",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_not_that_of_images_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = Model(make())
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(images())
    assert is_untouched(model)


def test_a_layer_that_runs_several_times_in_one_forward_is_refused() -> None:
    """As layers with shared weights do; several forwards are no such case."""
    layer = Attend(heads)
    model, x = Model(layer, layer), images()
    with pytest.raises(RuntimeError, match=r"^layers\.0: runs several times in one forward"):  # noqa: SIM117
        with record_am_flow(model, num_frames=T):
            model(x)
    model = Model(layer)
    with record_am_flow(model, num_frames=T) as flows:
        model(x)
        first = flows["layers.0"]
        model(images(seed=2))
    assert not torch.equal(flows["layers.0"].flow, first.flow)


def test_videos_are_refused_and_the_model_of_images_inside_is_recorded() -> None:
    model, clips = Folding(), images().unflatten(0, (2, T))
    message = r"^vit\.layers\.0: the model was given \(2, 3, 3, 32, 32\), a batch of videos"
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(clips)
    with record_am_flow(model.vit, num_frames=T) as flows:
        model(clips)
    assert list(flows) == ["layers.0"]


def test_a_layer_without_fused_attention_is_refused_by_its_switch() -> None:
    vit = small("plain")
    vit.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.attn: .*set its `fused_attn` to True"):  # noqa: SIM117
        with record_am_flow(vit, num_frames=T):
            vit(images(56))
    message = r"^model: expected layers that call .*; ResNet has none"
    with pytest.raises(TypeError, match=message), record_am_flow(timm.create_model("resnet10t"), num_frames=T):
        pass


def test_dropped_tokens_are_refused() -> None:
    model = small("plain", patch_drop_rate=0.5).train()
    message = r"^blocks\.0\.attn: expected keys of 6 images of 17 tokens each"
    with pytest.raises(RuntimeError, match=message), record_am_flow(model, num_frames=T):
        model(images(56))


def test_a_model_that_stops_early_needs_layers() -> None:
    vit = small("plain")
    with pytest.raises(RuntimeError, match=r"no AM flow of blocks\.1\.attn, .*choose layers"):  # noqa: SIM117
        with record_am_flow(vit, num_frames=T):
            vit.forward_intermediates(images(56), indices=[0], stop_early=True)
    with record_am_flow(vit, num_frames=T, layers=["blocks.0.attn"]) as flows:
        vit.forward_intermediates(images(56), indices=[0], stop_early=True)
    assert list(flows) == ["blocks.0.attn"]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_model, self.vision_model = Model(Attend(heads)), Model(Attend(heads))


def test_the_message_for_several_towers_names_that_of_images() -> None:
    model = Towers()
    message = r"outside of its image model \(text_model\.layers\.0\); record its `\.vision_model`"
    with pytest.raises(TypeError, match=message), record_am_flow(model, num_frames=T):
        pass
    with record_am_flow(model, num_frames=T, layers="vision_model.*") as flows:
        model.vision_model(images())
    assert list(flows) == ["vision_model.layers.0"]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not whole clips": ({"num_frames": 4}, ValueError, r"num_frames: expected a divisor of the 6 images, got 4"),
    "option": ({"centre": True}, TypeError, r"unexpected keyword argument 'centre'"),
    "grid": ({"grid": (1, 4, 4)}, TypeError, r"grid: expected \(prefix tokens, \(height, width\)\), .*got \(1, 4, 4\)"),
    "negative grid": ({"grid": (-1, (4, 4))}, ValueError, r"grid: expected numbers of tokens"),
    "other grid": ({"grid": (0, (3, 4))}, ValueError, r"grid: layers\.0 has 1 windows of 16 tokens, not 0 prefix"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    options, error, message = BAD[name]
    model = Model(Attend(heads))
    with pytest.raises(error, match=message), record_am_flow(model, **{"num_frames": T, **options}):
        model(images())
    assert is_untouched(model)


# wrappers and threads


class Peft(nn.Module):
    """Holds a model as peft does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model.model(x)


WRAPPERS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "compiled": (lambda model: torch.compile(model, backend="aot_eager"), ""),
    "DataParallel": (nn.DataParallel, ""),
    "average": (torch.optim.swa_utils.AveragedModel, ""),
    "peft": (Peft, "base_model.model."),
    "features": (lambda model: FeatureGetterNet(model, out_indices=[0, 2]), "model."),
    "sequential": (lambda model: nn.Sequential(model, nn.Linear(WIDTH, 2)), "0."),
}


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [pytest.param("compiled", marks=pytest.mark.slow), *[*WRAPPERS][1:]])
def test_wrappers_are_looked_through(wrapper: str) -> None:
    wrap, prefix = WRAPPERS[wrapper]
    model, x = small("plain"), images(56)
    with record_am_flow(model, num_frames=T) as want:
        model(x)
    wrapped = wrap(model)
    with record_am_flow(wrapped, num_frames=T) as flows:
        wrapped(x)
    assert list(flows) == [f"{prefix}{name}" for name in want]
    for flow, expected in zip(flows.values(), want.values(), strict=True):
        torch.testing.assert_close(flow.grid, expected.grid)


def test_data_parallel_on_several_devices_and_torchscript_are_refused() -> None:
    replicated = nn.DataParallel(Model(Attend(heads)))
    replicated.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"^model: nn\.DataParallel .*2 devices"):  # noqa: SIM117
        with record_am_flow(replicated, num_frames=T):
            pass
    script = torch.jit.trace(torchvision_vit(), images(), check_trace=False)
    with pytest.raises(TypeError, match=r"^model: is TorchScript"), record_am_flow(script, num_frames=T):
        pass


def replicate(module: nn.Module) -> Any:
    """A replica as `nn.DataParallel` makes it for each device, here on the CPU."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


class Step(nn.Module):
    """A training step that records its own model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        with record_am_flow(self.model, num_frames=T) as flows:
            return self.model(x), flows


def test_replicas_record_in_their_threads() -> None:
    """As under `nn.DataParallel`: each with its own weights, also where the model is being recorded itself."""
    model, inputs = torchvision_vit(), [images(seed=seed) for seed in range(2)]
    step = Step(model)
    want = [step(x) for x in inputs]
    both_inside = Barrier(2, timeout=60)
    threads = []

    def meet(*_: Any) -> None:
        if threads:
            both_inside.wait()

    model.encoder.layers[1].register_forward_pre_hook(meet)
    with record_am_flow(model, num_frames=T) as flows:
        replicas = [replicate(step), replicate(step)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model(inputs[0])
        recorded = dict(flows)
        threads.append("begin")
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda replica, x: replica(x), replicas, inputs))
        assert all(flows[name] is flow for name, flow in recorded.items())
    for (out, flows), (expected, expected_flows) in zip(got, want, strict=True):
        torch.testing.assert_close(out, expected)
        for name, flow in flows.items():
            torch.testing.assert_close(flow.flow, expected_flows[name].flow)
    assert is_untouched(model)
    assert all(is_untouched(replica) for replica in replicas)


def test_threads_record_one_model_at_the_same_time() -> None:
    """Each gets the flows of its own images, while the other is inside of the same forward; gradients too."""
    model, inputs = torchvision_vit(), [images(seed=seed) for seed in range(2)]
    want = [Step(model)(x) for x in inputs]
    both_inside = Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        both_inside.wait()

    hook = model.encoder.layers[1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for (out, flows), (expected, expected_flows) in zip(pool.map(Step(model), inputs), want, strict=True):
                assert torch.equal(out, expected)
                assert list(flows) == list(expected_flows)
                assert all(torch.equal(flow.flow, expected_flows[name].flow) for name, flow in flows.items())
    hook.remove()
    assert is_untouched(model)


def test_compiled_code_is_recorded_in_one_thread_at_a_time() -> None:
    model, x = Model(Attend(heads)), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with record_am_flow(model, num_frames=T), ThreadPoolExecutor(1) as pool:
        with record_am_flow(model, num_frames=T):
            model(x)

        def record() -> None:
            with record_am_flow(compiled, num_frames=T):
                compiled(x)

        with pytest.raises(Exception, match="several threads"):
            pool.submit(record).result()
    assert is_untouched(model)


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["peft", "features"])
def test_the_preset_of_timm_looks_through_wrappers(wrapper: str) -> None:
    model, x = small("plain"), images(56)
    with timm_preset.record_am_flow(model, num_frames=T) as want:
        model(x)
    wrapped = WRAPPERS[wrapper][0](model)
    with timm_preset.record_am_flow(wrapped, num_frames=T) as flows:
        wrapped(x)
    for index, flow in flows.items():
        assert torch.equal(flow.grid, want[index].grid)
    with pytest.raises(TypeError, match=r"got Sequential, which has none"):  # noqa: SIM117
        with timm_preset.record_am_flow(nn.Sequential(model), num_frames=T):
            pass


def test_attention_that_drops_or_returns_weights_is_recorded_but_not_replaced() -> None:
    layer, x = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True), tokens()
    for dropping, need_weights, message in (
        (True, False, "MultiheadAttention: drops attention at random"),
        (False, True, "MultiheadAttention: returns its attention weights"),
    ):
        layer.train(dropping)
        with record_am_flow(layer, num_frames=T) as flows:
            layer(x, x, x, need_weights=need_weights)
        close(flows[""].flow, flow_of(*by_hand(layer, x, x)))
        with pytest.raises(RuntimeError, match=message):  # noqa: SIM117
            with record_am_flow(layer, num_frames=T, replace_attention=True):
                layer(x, x, x, need_weights=need_weights)
