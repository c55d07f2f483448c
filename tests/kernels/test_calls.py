"""Calls that nothing watches go straight to a kernel, and only the first of a kind is checked."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from amflow_kernels import am_flow, am_flow_matmul, am_flow_pair, calls, dispatch, ops, plain
from amflow_kernels.problem import MapPairs

pytestmark = [pytest.mark.cpu, pytest.mark.fallback]

IMPL = "chunked"  # runs everywhere, and asked for without a warning


class Mode(TorchDispatchMode):
    """Sees every op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """Sees every function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Image(Tensor):
    """A subclass, which results should have, too."""


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that the public functions call."""
    names: list[str] = []

    def counted(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (names.append(name), op(*args))[1]

    for name in ("am_flow", "am_flow_matmul"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return names


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the problems that were checked."""
    names: list[str] = []
    check = MapPairs.__post_init__
    monkeypatch.setattr(MapPairs, "__post_init__", lambda self: (names.append(type(self).__name__), check(self))[1])
    return names


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="eager", fullgraph=True)


def frames() -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, 1, 3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    return q, k


def test_calls_of_one_kind_are_checked_once_and_call_no_op(op_calls: list[str], checks: list[str]) -> None:
    q, k = frames()
    x = torch.randn(1, 2, 2, 5, 4)
    for n in range(3):
        am_flow(q + n, k, impl=IMPL)
        am_flow_pair(q, k, q + n, k, impl=IMPL)
        am_flow_matmul(q, k, x + n, impl=IMPL)
    assert checks == ["Problem", "Problem", "MatmulProblem"]
    with torch.no_grad():
        am_flow(q.requires_grad_(), k, impl=IMPL)
    with torch.inference_mode():
        am_flow(q, k, impl=IMPL)
    assert len(checks) == 3
    assert op_calls == []


def test_results_are_those_of_the_op(op_calls: list[str]) -> None:
    """Also gradients."""
    q, k = (x.requires_grad_() for x in frames())
    x = torch.randn(1, 2, 2, 5, 4, requires_grad=True)

    def results() -> list[Tensor]:
        flow, y = am_flow(q, k, impl=IMPL), am_flow_matmul(q, k, x, impl=IMPL)
        assert flow.grad_fn is not None
        return [flow, y, *torch.autograd.grad(flow.square().sum() + y.square().sum(), (q, k, x))]

    direct = [*results(), *results()]
    assert op_calls == []
    with Mode():
        by_op = results()
    assert op_calls == ["am_flow", "am_flow_matmul"]
    assert all(map(torch.equal, direct, [*by_op, *by_op]))


@pytest.mark.parametrize(
    "watched",
    [Mode, FunctionMode, forward_ad.dual_level, lambda: profile(activities=[ProfilerActivity.CPU])],
    ids=["dispatch mode", "function mode", "forward mode", "profiler"],
)
def test_whatever_watches_sees_the_op(watched: Callable[[], AbstractContextManager[Any]], op_calls: list[str]) -> None:
    q, k = frames()
    am_flow(q, k, impl=IMPL)
    assert op_calls == []
    with watched():
        am_flow(q, k, impl=IMPL)
    assert op_calls == ["am_flow"]


@pytest.mark.parametrize(
    "transform",
    [
        torch.vmap,
        torch.func.functionalize,
        lambda f: torch.jit.trace(f, (frames()[0],), check_trace=False),
        compiled,
    ],
    ids=["vmap", "functionalize", "jit.trace", "compile"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transforms_see_the_op(transform: Callable[..., Any], op_calls: list[str]) -> None:
    """And give its results. Compiled code, which has the op in its graph, does not call it by its Python name."""
    torch._dynamo.reset()
    q, k = frames()

    def flow(q: Tensor) -> Tensor:
        return am_flow(q, k, impl=IMPL)

    expected = flow(q)
    clips = q[None].expand(2, *q.shape)
    for _ in range(2):
        found = transform(flow)(clips if transform is torch.vmap else q)
        assert torch.equal(found, expected.expand_as(found))
    assert op_calls or transform is compiled


def test_the_profiler_shows_the_op() -> None:
    q, k = frames()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        am_flow(q, k, impl=IMPL)
    assert "amflow::am_flow" in [event.name for event in found.events()]


def test_tensors_of_subclasses_call_the_op(op_calls: list[str]) -> None:
    q, k = frames()
    am_flow(q, k, impl=IMPL)
    assert type(am_flow(q.as_subclass(Image), k, impl=IMPL)) is Image
    assert op_calls == ["am_flow"]


def test_negated_views_call_the_op(op_calls: list[str]) -> None:
    """Their memory holds the opposite of their values."""
    q, k = frames()
    negated = torch._neg_view(q)
    assert negated.is_neg()
    expected = am_flow(-q, k, impl=IMPL)
    assert op_calls == []
    assert torch.equal(am_flow(negated, k, impl=IMPL), expected)
    assert op_calls == ["am_flow"]


def test_below_autograd_nothing_is_recorded() -> None:
    """As in the kernels of other ops, where gradients are not switched off."""
    q, k = frames()
    q.requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        assert not am_flow(q, k, impl=IMPL).requires_grad


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lag": True}, "lag: expected an int, got bool"),
        ({"lag": 1.0}, "lag: expected an int, got float"),
        ({"temperature": True}, "temperature: expected a number, got bool"),
        ({"center": 0}, "center: expected a bool, got int"),
        ({"lag": [1]}, "lag: expected an int, got list"),
        ({"scale": torch.tensor(1.0)}, "scale: expected a number, got Tensor"),
        ({"impl": "best"}, "impl: expected None or one of"),
        ({"impl": ["cpu"]}, "impl: expected None or a str, got list"),
        ({"q": torch.randn(1, 3, 2, 8, 5).mT}, "q: expected a contiguous last dimension"),
        ({"q": torch.randn(1, 3, 2, 5, 8).double()}, "k: expected the dtype of q"),
        ({"q": torch.randn(1, 3, 2, 5, 8).to_sparse()}, "q: expected a dense tensor"),
        ({"q": torch.randn(1, 3, 2, 5, 8).to_mkldnn()}, "q: expected a dense tensor"),
        ({"q": torch.randn(1, 3, 2, 5, 8, device="meta")}, "k: expected the device of q"),
        ({"q": None}, "q: expected a torch.Tensor, got NoneType"),
        ({"q": 1.0}, "q: expected a torch.Tensor, got float"),
    ],
)
def test_checks_hold_after_a_similar_call(change: dict[str, Any], error: str) -> None:
    q, k = frames()
    good: dict[str, Any] = {"q": q, "k": k, "lag": 1, "temperature": 1.0, "center": False, "scale": 1.0, "impl": IMPL}
    am_flow(**good)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=error):
            am_flow(**good | change)


def test_equal_options_of_other_types_are_equal_calls() -> None:
    q, k = frames()
    expected = am_flow(q, k, temperature=2.0, scale=1.0, impl=IMPL)
    assert torch.equal(am_flow(q, k, temperature=2, scale=1, impl=IMPL), expected)


def test_meta_tensors_have_shapes_only() -> None:
    q = torch.empty(1, 3, 2, 5, 8, device="meta")
    for _ in range(2):
        assert am_flow(q, q).is_meta


def test_a_remembered_call_keeps_no_tensor() -> None:
    q, k = frames()
    am_flow(q, k, impl=IMPL)
    remembered = weakref.ref(q)
    del q
    gc.collect()
    assert calls._known
    assert remembered() is None


def test_not_more_than_a_limit_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST", 3)
    q, k = frames()
    for n in range(10):
        flow = am_flow(q, k, temperature=1.0 + n, impl=IMPL)
        assert len(calls._known) <= 3
    assert torch.equal(flow, am_flow(q, k, temperature=10.0, impl=IMPL))


def test_a_call_that_warns_is_not_remembered() -> None:
    q = torch.randn(1, 2, 8, 3, 4)  # fewer tokens than heads
    for _ in range(2):
        dispatch._warned.clear()
        with pytest.warns(UserWarning, match="8 heads of 3 tokens"):
            am_flow(q, q, impl=IMPL)


def test_without_the_private_names_of_pytorch_all_calls_go_by_the_op(
    op_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = frames()
    expected = am_flow(q, k, impl=IMPL)
    monkeypatch.setattr(plain, "_COMPLETE", False)
    assert torch.equal(am_flow(q, k, impl=IMPL), expected)
    assert op_calls == ["am_flow"]
    assert plain.untraced(abs)(-1) == 1
