"""The attention implementation "am_flow" of transformers, on tiny models made here: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from amflow_kernels import am_flow
from amflow_kernels import testing as tt
from amflow_kernels.integrations.transformers import BlockFlow, record_am_flow
from amflow_kernels.problem import Problem

T = 3
TINY = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "vit": (tf.ViTConfig, tf.ViTModel, {}, 1),
    "vit classifier": (tf.ViTConfig, tf.ViTForImageClassification, {}, 1),
    "dinov2": (tf.Dinov2Config, tf.Dinov2Model, {}, 1),
    "dinov2 registers": (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel, {"num_register_tokens": 4}, 5),
    "dinov3": (tf.DINOv3ViTConfig, tf.DINOv3ViTModel, {"num_register_tokens": 4}, 5),
    "clip": (tf.CLIPVisionConfig, tf.CLIPVisionModel, {}, 1),
}


def make(name: str, implementation: str = "am_flow", **options: Any) -> Any:
    config, model_class, own, _ = MODELS[name]
    torch.manual_seed(0)
    model = model_class._from_config(config(**{**TINY, **own, **options}), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # attention of freshly initialised layers is nearly uniform
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(clips: int = 2, height: int = 56, width: int = 56) -> Tensor:
    return torch.randn(clips * T, 3, height, width, generator=torch.Generator().manual_seed(1))


def result(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def is_untouched(model: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


def spied(name: str, x: Tensor, **options: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The output of such a model with "sdpa", and q and k of each of its attention calls."""
    seen = []

    def spy(module: nn.Module, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((q, k))
        return sdpa_attention_forward(module, q, k, *args, **kwargs)

    tf.AttentionInterface.register("spy", spy)
    model = make(name, "spy", **options)
    return result(model(x)), seen


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"lag": 2, "head_reduction": "mean", "center": True}], ids=str)
def test_flows_are_those_of_each_layers_q_and_k(name: str, options: dict[str, Any]) -> None:
    """Split into prefix and grid; the output is that of "sdpa" to the bit, inside and outside of recording."""
    x = images()
    expected, qk = spied(name, x)
    model = make(name)
    assert torch.equal(result(model(x)), expected)
    with record_am_flow(model, num_frames=T, **options) as flows:
        assert torch.equal(result(model(pixel_values=x)), expected)
    assert is_untouched(model)
    assert sorted(flows) == [0, 1, 2]
    prefix = MODELS[name][3]
    for index, (q, k) in enumerate(qk):
        want = am_flow(q.unflatten(0, (2, T)), k.unflatten(0, (2, T)), **options)
        assert torch.equal(flows[index].prefix, want[..., :prefix])
        assert torch.equal(flows[index].grid, want[..., prefix:].unflatten(-1, (4, 4)))
        assert flows[index].windows == 1


@torch.no_grad()
def test_images_need_not_be_square() -> None:
    model = make("dinov3")
    with record_am_flow(model, num_frames=T, blocks=[1]) as flows:
        model(images(height=56, width=84))
    assert list(flows) == [1]
    assert flows[1].grid.shape == (2, T - 1, 3, 4, 6)


def loss(out: Any, flows: dict[int, BlockFlow]) -> Tensor:
    return result(out).square().mean() + sum(100 * flow.grid.square().mean() for flow in flows.values())


def test_recomputation_records_nothing_and_gradients_agree() -> None:
    model = make("dinov2").train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with record_am_flow(model, num_frames=T, center=True) as flows:
            total = loss(model(images()), flows)
        before = dict(flows)
        total.backward()
        assert all(flows[index] is flow for index, flow in before.items())
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain_grad, grad in zip(*grads, strict=True):
        assert (grad is None) is (plain_grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, plain_grad)


@torch.no_grad()
def test_a_compiled_model_is_compiled_again_for_recording_only() -> None:
    """Recording compiles other graphs; afterwards the first ones run again."""
    torch._dynamo.reset()
    counters.clear()
    model = make("dinov2")
    x = images()
    with record_am_flow(model, num_frames=T) as want:
        expected = result(model(x))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    graphs = counters["stats"]["unique_graphs"]
    with record_am_flow(model, num_frames=T) as flows:
        torch.testing.assert_close(result(compiled(x)), expected)
    assert counters["stats"]["unique_graphs"] > graphs
    graphs = counters["stats"]["unique_graphs"]
    compiled(x)
    assert counters["stats"]["unique_graphs"] == graphs
    for index in want:
        torch.testing.assert_close(flows[index].grid, want[index].grid)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_full_size_keeps_the_error_budget() -> None:
    """CLIP-B/16 with random weights: every block changes, and stays within the budget."""
    torch.manual_seed(0)
    q_k = []

    def spy(module: nn.Module, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        q_k.append((q, k))
        return sdpa_attention_forward(module, q, k, *args, **kwargs)

    tf.AttentionInterface.register("spy", spy)
    config = tf.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    model = tf.CLIPVisionModel._from_config(config, attn_implementation="spy").eval()
    for parameter in model.parameters():
        parameter.add_(0.04 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 224, 224)
    x = x[:1] + 0.2 * x
    model(x)
    model.set_attn_implementation("am_flow")
    with record_am_flow(model, num_frames=2) as flows:
        model(x)
    assert len(flows) == 12
    for (q, k), flow in zip(q_k, flows.values(), strict=True):
        exact = tt.oracle_flow(Problem(q[None], k[None], center=True))
        assert exact.std() > 1e-4
        assert (q.shape[-1] ** -0.5 * q @ k.mT).std() <= 6  # the range of the budget
        tt.assert_flow(torch.cat((flow.prefix, flow.grid.flatten(-2)), -1), exact, 197)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not whole clips": ({"num_frames": 4}, ValueError, r"num_frames: expected a divisor of the 6 images, got 4"),
    "one frame": ({"num_frames": 1}, ValueError, r"num_frames: expected more than lag = 1"),
    "block": ({"blocks": [0, 3]}, ValueError, r"blocks: expected indices from 0 to 2, got 3"),
    "temperature": ({"temperature": 0.0}, ValueError, r"temperature: expected at least 1/64"),
    "unknown": ({"centre": True}, TypeError, r"unexpected keyword argument 'centre'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    options, error, message = BAD[name]
    model = make("vit")
    with pytest.raises(error, match=message), record_am_flow(model, **{"num_frames": T, **options}):
        model(images())
    assert is_untouched(model)


def test_other_models_and_attention_implementations_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"its attention is 'sdpa'; .*attn_implementation='am_flow'"):  # noqa: SIM117
        with record_am_flow(make("vit", "sdpa"), num_frames=T):
            pass
    bert = tf.BertModel(tf.BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64))
    for model in (bert, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"expected a transformers vision model"):  # noqa: SIM117
            with record_am_flow(model, num_frames=T):
                pass


def test_attention_with_dropout_is_refused() -> None:
    model = make("vit", attention_probs_dropout_prob=0.1).train()
    with (
        pytest.raises(RuntimeError, match=r"layers?\.0\.attention.*: drops attention at random"),
        record_am_flow(model, num_frames=T),
    ):
        model(images())
    assert is_untouched(model)


def test_the_model_is_restored_after_an_exception_and_must_run() -> None:
    model = make("vit")
    with pytest.raises(KeyError, match="mine"), record_am_flow(model, num_frames=T):
        raise KeyError("mine")
    assert is_untouched(model)
    with pytest.raises(RuntimeError, match=r"no AM flow of .*attention"), record_am_flow(model, num_frames=T):
        pass
