"""Copies, pickles, threads and compiled wrappers of a recorded model behave as those of the bare one."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import permutations
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers as tf
from small_models import images as some_images
from small_models import is_untouched, small
from torch import Tensor, nn
from torch._dynamo.utils import counters

from amflow_kernels import am_flow
from amflow_kernels.integrations import timm as timm_integration
from amflow_kernels.integrations import transformers as transformers_integration
from amflow_kernels.integrations.block_finder import find_blocks
from amflow_kernels.integrations.timm import BlockFlow, record_am_flow, record_qk

T = 3


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Subject:
    """A small model of a library, and how it is recorded and run."""

    def __init__(self, package: str) -> None:
        self.package = package

    def make(self) -> Any:
        if self.package == "timm":
            return small("plain")
        torch.manual_seed(0)
        config = tf.Dinov2Config(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64, image_size=56
        )
        model = tf.Dinov2Model._from_config(config, attn_implementation="am_flow").eval()
        with torch.no_grad():
            for parameter in model.parameters():  # attention of freshly initialised layers is nearly uniform
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def record(self, model: nn.Module, **options: Any) -> Any:
        integration: Any = timm_integration if self.package == "timm" else transformers_integration
        return integration.record_am_flow(model, num_frames=T, **options)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    @torch.no_grad()
    def flows(self, model: nn.Module, x: Tensor) -> dict[int, BlockFlow]:
        """Recorded in a deep copy, made of the bare model."""
        copy = deepcopy(model)
        with self.record(copy) as flows:
            copy(x)
        return flows


@pytest.fixture(params=["timm", "transformers"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def images(seed: int = 1, clips: int = 2) -> Tensor:
    return torch.randn(clips * T, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def assert_same(flows: dict[int, BlockFlow], want: dict[int, BlockFlow], **tolerance: float) -> None:
    assert sorted(flows) == sorted(want)
    for index, flow in flows.items():
        torch.testing.assert_close(flow.grid, want[index].grid, **tolerance or {"rtol": 0.0, "atol": 0.0})
        assert flow.grid.std() > 0


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "deepcopy twice": lambda model: deepcopy(deepcopy(model)),
    "pickle of a deepcopy": lambda model: pickle.loads(pickle.dumps(deepcopy(model))),
}


@pytest.mark.parametrize(
    "copy", ["deepcopy", "pickle", *(pytest.param(c, marks=pytest.mark.slow) for c in [*COPIES][2:])]
)
def test_a_copy_made_while_recording_is_a_bare_model(subject: Subject, copy: str) -> None:
    """It computes with its own weights, gradients included, records nothing, and can be recorded itself."""
    model, other, x = subject.make(), subject.make(), images()
    want = subject.flows(model, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    with subject.record(model) as flows:
        copied = COPIES[copy](model)
        copied.load_state_dict(other.state_dict())
        inside = subject.run(copied, x)
        assert not flows
        subject.run(model, x)
        recorded = dict(flows)
        subject.run(copied, images(2))
        assert all(flows[index] is flow for index, flow in recorded.items())
    assert_same(flows, want)
    assert is_untouched(model)
    for out in (inside, subject.run(copied, x)):
        for each in (model, copied, other):
            each.zero_grad()
        expected = subject.run(other, x)
        assert torch.equal(out, expected)
        out.square().mean().backward()
        expected.square().mean().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        for got, wanted in zip(copied.parameters(), other.parameters(), strict=True):
            assert (got.grad is None) is (wanted.grad is None)
            assert got.grad is None or torch.equal(got.grad, wanted.grad)
    with subject.record(copied) as flows:
        subject.run(copied, x)
    assert_same(flows, subject.flows(other, x))


def doubled(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 2 * type(layer).forward(layer, x, *args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_keeps_a_layers_own_forward(copy: str) -> None:
    """As accelerate sets it: with the layer as an argument, which is then the copied layer."""
    model, x = small("plain"), images()
    layer = model.blocks[1].attn
    layer.forward = partial(doubled, layer)
    with record_am_flow(model, num_frames=T):
        model(x)
        copied = COPIES[copy](model)
    for parameter in layer.parameters():
        parameter.zero_()
    bare = small("plain")
    bare.blocks[1].attn.forward = partial(doubled, bare.blocks[1].attn)
    assert torch.equal(copied(x), bare(x))
    assert not torch.equal(copied(x), model(x))


def test_a_model_saved_while_recording_loads_without_this_library() -> None:
    model = small("plain")
    with record_qk(model):
        assert b"amflow" not in pickle.dumps(model)
        model(images())


@torch.no_grad()
@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_nested_recorders_may_end_in_any_order(subject: Subject, order: tuple[int, ...]) -> None:
    """Until each one ends it records every forward, and the model is then left as it was."""
    model = subject.make()
    begun = [subject.record(model, head_reduction=reduction) for reduction in ("none", "mean", "mean_map")]
    flows = [recorder.__enter__() for recorder in begun]
    inputs = [images(seed) for seed in range(4)]
    ended: list[int] = []
    for x in inputs:
        subject.run(model, x)
        if len(ended) < 3:
            ended.append(order[len(ended)])
            begun[ended[-1]].__exit__(None, None, None)
    assert is_untouched(model)
    for x, index in zip(inputs, ended, strict=False):
        with subject.record(model, head_reduction=("none", "mean", "mean_map")[index]) as want:
            subject.run(model, x)
        assert_same(flows[index], want)


@torch.no_grad()
def test_recorders_of_other_blocks_and_kinds_may_overlap() -> None:
    """One ends, or fails to begin, while others record the same layers."""
    model, x = small("plain"), images()
    with ExitStack() as stack:
        qk = stack.enter_context(record_qk(model, blocks=[1, 2]))
        with record_am_flow(model, num_frames=T, blocks=[0, 1], replace_attention=True) as flows:
            model(x)
        with pytest.raises(ValueError, match="blocks"), record_am_flow(model, num_frames=T, blocks=[3]):
            pass
        assert torch.equal(flows[1].grid.flatten(-2), am_flow(*(part.unflatten(0, (2, T)) for part in qk[1]))[..., 1:])
        model(images(2))
        assert sorted(flows) == [0, 1]
    with record_qk(model, blocks=[1, 2]) as want:
        model(images(2))
    assert all(torch.equal(a, b) for index in qk for a, b in zip(qk[index], want[index], strict=True))
    assert is_untouched(model)


@torch.no_grad()
def test_a_forward_that_someone_else_sets_while_recording_stays() -> None:
    model, x = small("plain"), images()
    expected = model(x)
    layer = model.blocks[1].attn
    with record_am_flow(model, num_frames=T) as flows:
        wrapped = layer.forward
        layer.forward = mine = lambda *args, **kwargs: 2 * wrapped(*args, **kwargs) / 2
        model(x)
    assert len(flows) == 3
    assert layer.forward is mine
    assert torch.equal(model(x), expected)
    with record_am_flow(model, num_frames=T) as again:
        model(x)
    assert_same(again, flows)
    assert layer.forward is mine


@torch.no_grad()
def test_several_threads_record_one_model(subject: Subject) -> None:
    """Each records its own forwards, whichever began first; and a copy can be recorded at the same time."""
    model, x = subject.make(), images()
    want = subject.flows(model, x)

    def record(model: nn.Module) -> dict[int, BlockFlow]:
        with torch.no_grad(), subject.record(model) as flows:
            subject.run(model, x)
        return flows

    with subject.record(model) as flows:
        assert_same(in_thread(lambda: record(model)), want)
        assert not flows
        assert_same(in_thread(lambda: record(deepcopy(model))), want)
        subject.run(model, x)
    assert_same(flows, want)
    assert is_untouched(model)
    assert_same(in_thread(lambda: record(model)), want)


@torch.no_grad()
def test_forwards_in_other_threads_are_those_of_the_bare_model(subject: Subject) -> None:
    """Even while the recording thread is inside of its own forward: each gets the results of its own images."""
    model, mine, theirs = subject.make(), images(1), images(2)
    want, expected, expected_theirs = subject.flows(model, mine), subject.run(model, mine), subject.run(model, theirs)
    both_inside = Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        both_inside.wait()

    hook = find_blocks(model)[1][1].register_forward_pre_hook(meet)

    @torch.no_grad()
    def run_theirs() -> Tensor:
        return subject.run(model, theirs)

    with ThreadPoolExecutor(1) as pool, subject.record(model) as flows:
        for _ in range(10):
            other = pool.submit(run_theirs)
            assert torch.equal(subject.run(model, mine), expected)
            assert torch.equal(other.result(), expected_theirs)
            assert_same(flows, want)
    hook.remove()
    assert is_untouched(model)


def loss(out: Tensor, grids: list[Tensor]) -> Tensor:
    return out.square().mean() + sum(100 * grid.square().mean() for grid in grids)


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """The loss of the bare output and the flows of q and k, where nothing is recorded but these."""
    with record_qk(model) as qk:
        out = model(x)
    flows = (am_flow(*(part.unflatten(0, (-1, T)) for part in each), center=True) for each in qk.values())
    return loss(out, [flow[..., 1:] for flow in flows])


@pytest.mark.parametrize("where", ["this thread", "another thread"])
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("replace_attention", [False, True], ids=["own attention", "replaced attention"])
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "autocast"])
def test_gradients_of_a_checkpointed_model(replace_attention: bool, inside: bool, where: str, autocast: bool) -> None:
    """In whichever thread the backward runs, inside of recording or after it: those of the output plus the flows'."""
    model, x = small("plain").train(), images()
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    with precision():
        by_hand(model, x).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    with record_am_flow(model, num_frames=T, center=True, replace_attention=replace_attention) as flows:
        with precision():
            total = loss(model(x), [flow.grid for flow in flows.values()])
        before = dict(flows)
        if inside:
            (in_thread if where == "another thread" else lambda function: function())(total.backward)
    if not inside:
        (in_thread if where == "another thread" else lambda function: function())(total.backward)
    assert all(flows[index] is flow for index, flow in before.items())
    assert sorted(expected) == [name for name, p in sorted(model.named_parameters()) if p.grad is not None]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_training_step_in_another_thread_while_recording(subject: Subject) -> None:
    """With checkpointing, whose recomputation runs while this thread records: the gradients of the bare model."""
    bare, model, x = subject.make().train(), subject.make().train(), images()
    subject.run(bare, x).square().mean().backward()
    if subject.package == "timm":
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with subject.record(model) as flows:
        in_thread(lambda: subject.run(model, x).square().mean().backward())
        assert not flows
        subject.run(model, x)
    for got, wanted in zip(model.parameters(), bare.parameters(), strict=True):
        assert (got.grad is None) is (wanted.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)


def test_recomputation_leaves_recorded_q_and_k() -> None:
    model = small("plain").train()
    model.set_grad_checkpointing()
    with record_qk(model) as qk:
        out = model(images())
        before = dict(qk)
        out.square().mean().backward()
        assert all(qk[index] is pair for index, pair in before.items())


class Replica(nn.Module):
    """A wrapper like `DistributedDataParallel`, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def compiled_parts(model: Any, *parts: str) -> nn.Module:
    for name in parts:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, compiled(model.get_submodule(name)))
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "replica": Replica,
    "compiled replica": lambda model: compiled(Replica(model)),
    "replica of a compiled model": lambda model: Replica(compiled(model)),
    "average": torch.optim.swa_utils.AveragedModel,
    "blocks compiled": lambda model: compiled_parts(model, "blocks.0", "blocks.1", "blocks.2"),
    "layers compiled": lambda model: compiled_parts(model, "patch_embed", "blocks.0.attn", "blocks.1.attn"),
}


@torch.no_grad()
@pytest.mark.parametrize("first", ["run", "record"])
@pytest.mark.parametrize("name", ["plain", pytest.param("hiera", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_recorded_as_the_bare_one(wrapper: str, name: str, first: str) -> None:
    """By two recorders at once, whether it ran before or not; and afterwards it runs as the bare one."""
    bare = small(name)
    x = some_images(bare, 2 * T)
    expected = bare(x)
    with record_am_flow(bare, num_frames=T) as want, record_qk(bare) as want_qk:
        bare(x)
    wrapped = WRAPPERS[wrapper](small(name))
    if first == "run":
        torch.testing.assert_close(wrapped(x), expected)
    with record_am_flow(wrapped, num_frames=T) as flows, record_qk(wrapped) as qk:
        torch.testing.assert_close(wrapped(x), expected)
    assert_same(flows, want, rtol=1e-5, atol=1e-5)
    for index, pair in want_qk.items():
        torch.testing.assert_close(qk[index], pair)
    recorded = dict(flows)
    torch.testing.assert_close(wrapped(x), expected)
    assert all(flows[index] is flow for index, flow in recorded.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_recording_a_compiled_model_again_needs_no_other_graph(name: str) -> None:
    """A graph for each recording would exceed torch.compile's limit, after which it runs eagerly or raises."""
    subject, x = Subject(name), images()
    model = subject.make()
    want = subject.flows(model, x)
    step = torch.compile(model, backend="aot_eager", fullgraph=name == "timm")
    graphs = []
    for _ in range(12):
        with subject.record(model) as flows:
            subject.run(step, x)
        assert_same(flows, want, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


@torch.no_grad()
@pytest.mark.parametrize("replace_attention", [False, True])
def test_a_model_compiled_under_a_default_device(replace_attention: bool) -> None:
    """Which is a TorchFunctionMode, as the recorder has one in each layer."""
    model, x = small("plain"), images()
    want = Subject("timm").flows(model, x)
    with torch.device("cpu"), record_am_flow(model, num_frames=T, replace_attention=replace_attention) as flows:
        compiled(model)(x)
    assert_same(flows, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [False, True], ids="fullgraph={}".format)
def test_a_compiled_and_checkpointed_model(fullgraph: bool) -> None:
    """With `fullgraph` torch.compile must be told that recomputation need not record."""
    model, x = small("plain").train(), images()
    by_hand(model, x).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    step = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with (
        torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=fullgraph),
        record_am_flow(step, num_frames=T, center=True) as flows,
    ):
        total = loss(step(x), [flow.grid for flow in flows.values()])
    total.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) is (grad is None)
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad)
