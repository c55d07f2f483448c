"""Adapters with AM flow: they change nothing at first, train alone, see the right flow, and refuse bad input."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from amflow_models import (
    AdaptedBlock,
    Adapter,
    AdapterOptions,
    AligningEncoder,
    Gate,
    TemporalUnit,
    VideoClassifier,
    add_adapters,
    create_backbone,
    grow_am_flow,
    load_trained,
    placement,
    save_trained,
)
from small_models import MODELS, make, small
from small_models import images as some_images
from torch import Tensor, nn

from amflow_kernels import am_flow, am_flow_pair
from amflow_kernels.integrations.timm import record_qk

T = 3
KINDS: list[dict[str, Any]] = [
    {"form": "serial"},
    {"form": "parallel", "unit": "lstm", "pooled": True, "centred": False},
    {"form": "scaled_parallel", "unit": "transformer", "gate": "raw"},
    {"unit": "gru", "gate": "frame_difference"},
    {"gate": "constant"},
    {"align": True},
    {"align": True, "form": "serial"},
]


def images(model: Any, clips: int = 2) -> Tensor:
    return some_images(model, clips * T)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    add_adapters(model, num_frames=T, verbose=False, **{"bottleneck": 8, "blocks": "all", **options})
    return model


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Input tokens and flow of each gate, in the order in which blocks run."""
    seen: list[tuple[Tensor, Tensor]] = []
    forward = Gate.forward

    def spy(self: Gate, x: Tensor, flow: Tensor | None) -> Tensor:
        assert flow is not None
        seen.append((x, flow))
        return forward(self, x, flow)

    monkeypatch.setattr(Gate, "forward", spy)
    return seen


def trained(model: nn.Module) -> nn.Module:
    """Adds random numbers to all trainable parameters, as if the model had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in MODELS), *((name, options) for name in ("plain", "hiera") for options in KINDS)],
    ids=str,
)
def test_a_fresh_model_is_its_backbone_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    model = small(name)
    x = images(model)
    expected = model(x)
    adapted(model, **options)
    assert torch.equal(model(x), expected)
    assert not torch.equal(trained(model)(x), expected)


@pytest.mark.parametrize("name", ["plain", "hiera"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gradients_reach_what_trains_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    """In a trained model: before, W_up and the aligning encoder's g are 0, and no gradient passes them."""
    model = small(name)
    frozen = {id(p) for p in model.parameters()}
    classifier = trained(VideoClassifier(model, 4, T, blocks="all", bottleneck=8, **options))
    classifier(images(model).unflatten(0, (2, T))).square().sum().backward()
    for parameter_name, p in classifier.named_parameters():
        if id(p) in frozen or (parameter_name.endswith("gate.gain") and options.get("gate") == "raw"):
            assert not p.requires_grad, parameter_name
            assert p.grad is None, parameter_name
        else:
            assert p.requires_grad, parameter_name
            assert p.grad is not None, parameter_name
            assert p.grad.isfinite().all(), parameter_name
            assert p.grad.count_nonzero() > 0, parameter_name


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_gates_get_the_oracles_flow(name: str, gated: list[tuple[Tensor, Tensor]]) -> None:
    """For q and k recorded in the same forward of a trained model, in every block, in the order of its tokens."""
    model = trained(adapted(small(name)))
    with record_qk(model) as qk:
        model(images(model))
    assert len(gated) == len(qk) == len(model.blocks)
    for (_, flow), (q, k) in zip(gated, qk.values(), strict=True):
        q64, k64 = (part.double().unflatten(0, (2, T)) for part in (q, k))
        want = am_flow(q64, k64, head_reduction="mean", center=True, impl="reference")
        if want.dim() == 4:  # windows are innermost in the order of tokens
            want = want.transpose(-1, -2).flatten(-2)
        assert (flow - want).norm() <= 1e-5 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, "vit_base_patch16_rpn_224"])
def test_aligned_flow_is_plain_flow_until_trained(name: str, gated: list[tuple[Tensor, Tensor]]) -> None:
    """With g = 0, also if a block normalises after its attention or rotates q and k."""
    if name in MODELS:
        model = small(name)
    else:
        model = make(name, pretrained=False, img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    x = images(model)
    adapted(deepcopy(model))(x)
    adapted(model, align=True)(x)
    half = len(gated) // 2
    for (_, one), (_, two) in zip(gated[:half], gated[half:], strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"align": True}, {"form": "serial", "unit": "lstm"}], ids=str)
def test_models_of_other_dtypes_keep_their_output_and_train(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = small("plain").to(dtype)
    x = images(model).to(dtype)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(adapted(model, **options)(x), expected)
    trained(model)(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_frozen_blocks_of_mixed_dtypes_keep_them() -> None:
    model = small("plain")
    for block in model.blocks:
        block.norm1.bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted(model)
    after = {name.replace(".block.", "."): p for name, p in model.named_parameters()}
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("align", [False, True])
def test_dropout_in_the_attention_stays_the_blocks_own(align: bool) -> None:
    options = {**MODELS["plain"][1], "attn_drop_rate": 0.2, "proj_drop_rate": 0.2}
    model = make(MODELS["plain"][0], **options).train()
    x = images(model)
    torch.manual_seed(0)
    expected = model(x)
    adapted(model, align=align)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_empty_batch_gives_no_logits(options: dict[str, Any]) -> None:
    model = VideoClassifier(small("plain"), 4, T, blocks="all", **options)
    assert model(images(model.backbone)[:0].unflatten(0, (0, T))).shape == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "hiera"])
def test_aligned_flow_is_that_of_the_aligned_frames_q_and_k(name: str, gated: list[tuple[Tensor, Tensor]]) -> None:
    """The flow between the block's q and k of frame t and those of the aligned frame t + 1."""
    model = trained(adapted(small(name), align=True))
    plain = small(name)
    model(images(model))
    for index, (x, flow) in enumerate(gated):
        aligned = model.blocks[index].align(x[:, :-1], x[:, 1:])
        qk = []
        for frames in (x[:, :-1], aligned):
            with record_qk(plain, blocks=[index]) as recorded:
                plain.blocks[index](frames.flatten(0, 1))
            qk += [part.double().unflatten(0, (2, T - 1)) for part in recorded[index]]
        want = am_flow_pair(*qk, head_reduction="mean", center=True, impl="reference")
        if want.dim() == 4:
            want = want.transpose(-1, -2).flatten(-2)
        assert (flow - want).norm() <= 1e-5 * want.norm()


@torch.no_grad()
def test_q_and_k_are_computed_once() -> None:
    model = adapted(small("plain"))
    calls = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    model(images(model))
    assert len(calls) == len(model.blocks)


@torch.no_grad()
def test_adapter_is_the_formula() -> None:
    """Eq. 1 of the supplement, and the scaled form."""
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    for scaled in (False, True):
        adapter = trained(Adapter(6, 3, scaled=scaled)).double()
        z = torch.relu(x @ adapter.down.weight.T + adapter.down.bias)
        update = z @ adapter.up.weight.T + adapter.up.bias
        if scaled:
            assert adapter.scale != 0
            update = adapter.scale * update
        assert torch.allclose(adapter(x), x + update, atol=1e-12)
        assert torch.allclose(adapter.branch(x), update, atol=1e-12)


@torch.no_grad()
def test_parallel_adapters_read_the_input_and_serial_ones_the_output() -> None:
    for form in ("parallel", "serial"):
        block: Any = timm.models.vision_transformer.Block(16, 2)
        x = torch.randn(2 * T, 5, 16)
        model = AdaptedBlock(block, AdapterOptions(T, form=form, bottleneck=4), temporal=False, name="block")
        trained(model.adapter)
        y = block(x)
        assert torch.equal(model(x), y + model.adapter.branch(y if form == "serial" else x))


@torch.no_grad()
def test_gates_are_their_formulas() -> None:
    x, flow = torch.randn(2, 4, 7, 3), torch.randn(2, 3, 7) * 1e-3
    frames = torch.stack([flow[:, 0], (flow[:, 0] + flow[:, 1]) / 2, (flow[:, 1] + flow[:, 2]) / 2, flow[:, 2]], 1)
    gate = Gate("am_flow")
    gate.gain.fill_(0.5)
    weight, mean, std = gate(x, flow), frames.mean(-1, keepdim=True), frames.std(-1, correction=0, keepdim=True)
    assert torch.allclose(weight, 1 + 0.5 * (frames - mean) / std, atol=1e-4)
    assert torch.equal(Gate("raw")(x, 1 + flow), ((1 + flow)[:, [0, 0, 1, 2]] + (1 + flow)[:, [0, 1, 2, 2]]) / 2)
    assert Gate("constant")(x, None).shape == (1,)
    assert torch.equal(gate(x, torch.zeros(2, 3, 7)), torch.ones(2, 4, 7))  # in a still clip
    moved = x.clone()
    moved[:, 1:, 2] += 10  # one token changes between the first frames
    moved = moved[:, [0, 1, 1, 1]]
    assert Gate("frame_difference")(moved, None)[:, 0].argmax(-1).tolist() == [2, 2]
    product = Gate("flow_times_difference")
    difference = (x[:, 1:] - x[:, :-1]).norm(dim=-1)
    change = (flow - flow.amin(-1, keepdim=True)) * difference
    frames = torch.stack([change[:, 0], change[:, :2].mean(1), change[:, 1:].mean(1), change[:, 2]], 1)
    std, mean = torch.std_mean(frames, -1, correction=0, keepdim=True)
    assert torch.allclose(product(x, flow), 1 + (frames - mean) / std, atol=1e-4)
    assert torch.allclose(product(x, flow + 1), product(x, flow), atol=1e-3)  # centred or not
    assert torch.equal(product(x, torch.zeros(2, 3, 7)), torch.ones(2, 4, 7))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "tcn", "lstm", "gru", "transformer"])
def test_units_see_the_order_of_frames_but_no_other_token(kind: str) -> None:
    z = torch.randn(2, 4, 5, 8)
    unit = TemporalUnit(kind, 8)
    out = unit(z)
    assert out.shape == z.shape
    assert not torch.allclose(unit(z.flip(1)).flip(1), out, atol=1e-3)
    blind = TemporalUnit("set", 8)
    assert torch.allclose(blind(z.flip(1)).flip(1), blind(z), atol=1e-5)
    changed = z.clone()
    changed[:, :, 3] += 1
    assert torch.allclose(unit(changed)[:, :, :3], out[:, :, :3], atol=1e-5)  # other tokens do not matter
    pooled = TemporalUnit(kind, 8, pooled=True)
    assert pooled(z).shape == (2, 4, 1, 8)
    assert torch.allclose(pooled(z), pooled(z[:, :, [4, 3, 2, 1, 0]]), atol=1e-5)
    unit.reset_to_zero()
    assert torch.equal(unit(z), torch.zeros_like(z))


@torch.no_grad()
def test_a_still_clip_does_not_enter_the_unit() -> None:
    """All inputs of the unit are 0."""
    adapter = trained(Adapter(6, 4, gate=Gate("constant"), unit=TemporalUnit("conv", 4)))
    seen: list[Tensor] = []
    adapter.unit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapter.branch(torch.randn(1, 5, 6).expand(T, 5, 6), T)
    assert torch.allclose(seen[0], torch.zeros_like(seen[0]), atol=1e-6)


@torch.no_grad()
def test_an_aligning_encoder_starts_as_the_identity() -> None:
    this, following = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    encoder = AligningEncoder(8, 4)
    assert torch.equal(encoder(this, following), following)
    encoder.g.fill_(1.0)
    assert encoder(this, following).shape == following.shape
    assert not torch.equal(encoder(this, following), following)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "hiera"])
@pytest.mark.parametrize("options", [{}, {"form": "serial"}, {"align": True}, {"others": False}], ids=str)
def test_growing_keeps_output_and_trained_parameters(name: str, options: dict[str, Any]) -> None:
    model = trained(adapted(small(name), blocks="first_last", **options))
    x = images(model)
    before, parts = model(x), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    report = grow_am_flow(model, verbose=False)
    assert report.temporal == tuple(range(len(model.blocks)))
    assert torch.equal(model(x), before)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in parts.items())
    assert len(report.trainable) > len(parts)
    assert not torch.equal(trained(model)(x), before)


def test_placements_name_the_right_blocks() -> None:
    vit = small("plain")
    count = len(vit.blocks)
    assert placement(vit, "first_last") == (0, count - 1)
    assert placement(vit, "all") == tuple(range(count))
    assert placement(vit, "none") == ()
    assert placement(vit, [1, 0, 1]) == (0, 1)
    with torch.device("meta"):
        hiera_base = timm.create_model("hiera_base_224")
    assert placement(hiera_base, "third_stage") == tuple(range(5, 21))
    assert [b.attn.use_mask_unit_attn for b in hiera_base.blocks[5:7]] == [True, False]
    with pytest.raises(ValueError, match="'third_stage' is for models of stages"):
        placement(vit, "third_stage")
    with pytest.raises(ValueError, match=r"'first_last'\?"):
        placement(vit, "first-last")
    with pytest.raises(ValueError, match=f"from 0 to {count - 1}, got {count}"):
        placement(vit, [count])
    for wrong in (1, [1.0]):
        with pytest.raises(TypeError, match="blocks: expected the name of a placement or whole numbers"):
            placement(vit, wrong)
    with torch.device("meta"):
        inside = VideoClassifier(timm.create_model("hiera_base_224", num_classes=0), 2, T)
    assert placement(inside, "third_stage") == tuple(range(5, 21))


def test_the_report_counts_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = small("plain")
    report = add_adapters(model, num_frames=T, bottleneck=8, blocks=[1])
    assert report.temporal == (1,)
    assert report.ordinary == tuple(i for i in range(len(model.blocks)) if i != 1)
    assert report.trainable == {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert f"{sum(report.trainable.values()):,} of {report.total:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"align": True, "blocks": [1], "others": False}], ids=str)
def test_adapted_models_compile_to_one_graph(options: dict[str, Any]) -> None:
    model = trained(adapted(small("plain"), **options))
    x = images(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = trained(adapted(small("plain"))).train()
    x = images(model)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_own_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    """Layers of transformers checkpoint themselves, inside of the adapted block."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = trained(adapted(transformers.ViTModel(config, add_pooling_layer=False))).train()
    x = torch.randn(2 * T, 3, 32, 32, requires_grad=True)  # reentrant checkpointing needs an input with a gradient
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(x).last_hidden_state.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_any_model_with_a_list_of_blocks_takes_adapters() -> None:
    """A model of transformers, and one of plain PyTorch with ordinary adapters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    x = torch.randn(2 * T, 3, 32, 32)
    before = model(x).last_hidden_state
    adapted(model)
    assert torch.equal(model(x).last_hidden_state, before)
    assert not torch.equal(trained(model)(x).last_hidden_state, before)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    tokens = torch.randn(T, 5, 16)
    before = encoder(tokens)
    adapted(encoder, blocks="none")
    assert torch.allclose(encoder(tokens), before, atol=1e-5)  # PyTorch has another code path for inference


def test_trained_parameters_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trained.safetensors"
    one = trained(VideoClassifier(small("plain"), 4, T, bottleneck=8))
    save_trained(one, path)
    two = VideoClassifier(small("plain"), 4, T, bottleneck=8)
    two.backbone.load_state_dict(one.backbone.state_dict(), strict=True)
    trained(two)
    load_trained(two, path)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    wider = VideoClassifier(small("plain"), 4, T, bottleneck=16, blocks="all", align=True)
    before = {n: p.clone() for n, p in wider.named_parameters()}
    with pytest.raises(ValueError, match=r"missing: .*align\.g.*of another shape: .*down\.weight"):
        load_trained(wider, path)
    assert all(torch.equal(p, before[n]) for n, p in wider.named_parameters())
    with pytest.raises(ValueError, match=r"unexpected: .*unit"):
        load_trained(VideoClassifier(small("plain"), 4, T, bottleneck=8, blocks="none"), path)
    other = VideoClassifier(small("plain"), 4, T, bottleneck=8, gate="frame_difference")
    with pytest.raises(ValueError, match=r"of other options: gate 'am_flow', expected 'frame_difference'"):
        load_trained(other, path)
    load_trained(torch.compile(two), path)  # names are those of the model itself
    with pytest.raises(ValueError, match="expected one with parameters that train"):
        save_trained(small("plain").requires_grad_(False), path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        load_trained(one, path)


def test_backbones_are_created_by_name_and_from_files(tmp_path: Path) -> None:
    model = create_backbone("vit_tiny_patch16_224", None, 32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 192)
    path = tmp_path / "vit.safetensors"
    from safetensors.torch import save_file

    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}  # as in timm's own files
    save_file({**model.state_dict(), **head}, path)
    again = create_backbone("vit_tiny_patch16_224", path, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"(?s)backbone vit_small_patch16_224, weights .*size mismatch"):
        create_backbone("vit_small_patch16_224", path, 32)
    state = model.state_dict()
    state["other"] = state.pop("cls_token")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"(?s)Missing key.*cls_token.*Unexpected key.*other"):
        create_backbone("vit_tiny_patch16_224", path, 32)
    with pytest.raises(ValueError, match=r"did you mean 'hiera_base_224'"):
        create_backbone("hiera_bas_224")
    with pytest.raises(ValueError, match="there is no file"):
        create_backbone("vit_tiny_patch16_224", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="'offline' has those of vit_small_patch14_dinov2 alone"):
        create_backbone("vit_tiny_patch16_224", "offline")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "paralel"}, r"form: expected one of .*got 'paralel'; did you mean 'parallel'"),
        ({"unit": "ltsm"}, r"did you mean 'lstm'"),
        ({"gate": "amflow"}, r"did you mean 'am_flow'"),
        ({"num_frames": 1}, "num_frames: expected a whole number of at least 2, got 1"),
        ({"bottleneck": 0}, "bottleneck: expected a whole number of at least 1, got 0"),
        ({"align": True, "gate": "constant"}, "align: the gate 'constant' takes no AM flow"),
        ({"bottelneck": 3}, r"option: expected one of .*did you mean 'bottleneck'"),
        ({"blocsk": "all"}, r"option: expected one of .*did you mean 'blocks'"),
        ({"verbos": False}, r"option: expected one of .*did you mean 'verbose'"),
    ],
)
def test_bad_options_are_named_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = small("plain")
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_adapters(model, **{"num_frames": T, **options})
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("wrong", "right"), [("blocsk", "blocks"), ("adapter", "adapters"), ("unti", "unit")])
def test_a_misspelt_keyword_of_the_classifier_is_told_with_the_right_one(
    wrong: str, right: str, adapters: bool
) -> None:
    """Whosever it is: the classifier's own or one of `add_adapters`, and whether or not it would be used."""
    with pytest.raises(ValueError, match=rf"option: expected one of .*got '{wrong}'; did you mean '{right}'"):
        VideoClassifier(small("plain"), 3, T, adapters=adapters, **{wrong: "all"})


def test_bad_models_and_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a list of transformer blocks .* found none in Linear"):
        add_adapters(nn.Linear(2, 2), num_frames=T)
    with pytest.raises(TypeError, match="expected blocks of a transformer"):
        add_adapters(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}), num_frames=T)
    model = adapted(small("plain"))
    with pytest.raises(ValueError, match=f"expected a divisor of the {2 * T - 1} images, got {T}"):
        model(images(model)[1:])
    with pytest.raises(ValueError, match="has adapters already"):
        adapted(model)
    with pytest.raises(TypeError, match=r"expected one list of transformer blocks, found one\.blocks, two\.blocks"):
        adapted(nn.ModuleDict({"one": small("plain"), "two": small("plain")}))
    with pytest.raises(ValueError, match=r"without a head \(num_classes=0\), got 7 classes"):
        VideoClassifier(make(MODELS["plain"][0], **{**MODELS["plain"][1], "num_classes": 7}), 3, T)
    with pytest.raises(ValueError, match="found no adapters"):
        grow_am_flow(small("plain"))
    with pytest.raises(ValueError, match=r"clips: expected \(B, 3, 3, height, width\), got \(2, 4, 3, 8, 8\)"):
        VideoClassifier(small("plain"), 2, T)(torch.zeros(2, 4, 3, 8, 8))
    unfused = adapted(small("plain"))
    unfused.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"blocks\.1: AM flow is read where"):
        unfused(images(unfused))


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "hiera_tiny_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "vit_small_patch14_dinov2",
                *(f"vit_{size}_patch14_{kind}dinov2" for size in ("base", "large", "giant") for kind in ("", "reg4_")),
                *(f"hiera_{size}_224" for size in ("small", "base", "large")),
            )
        ),
    ],
)
def test_every_promised_backbone_takes_adapters(name: str) -> None:
    """On the meta device, without memory for weights."""
    with torch.device("meta"):
        model = VideoClassifier(create_backbone(name, None), 5, 2, blocks="all", bottleneck=8)
        assert model(torch.empty(1, 2, 3, *2 * [518 if "dinov2" in name else 224])).shape == (1, 5)


@pytest.mark.demo
def test_a_fresh_model_gives_what_the_real_dinov2_gives() -> None:
    images = torch.randn(2, 3, 70, 70)
    backbone = create_backbone("vit_small_patch14_dinov2", "offline", 70)
    with torch.no_grad():
        expected = backbone(images)
        add_adapters(backbone, num_frames=2, blocks="all", verbose=False)
        assert torch.equal(backbone(images), expected)
