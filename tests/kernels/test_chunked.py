"""Rules of impl="chunked" only: its memory, any device, and where it takes the place of the kernels.

`conformance.SUBJECTS` runs it, cut into small blocks, on all other rules.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amflow_kernels import am_flow, am_flow_matmul, dispatch, explain
from amflow_kernels import testing as tt
from amflow_kernels.impl.base import Implementation
from amflow_kernels.impl.chunked import MEMORY, Chunked
from amflow_kernels.impl.reference import Reference
from amflow_kernels.problem import HEAD_REDUCTIONS, MatmulProblem, Problem


class PeakMemory(TorchDispatchMode):
    """`peak`: the most bytes, of those allocated inside the ``with`` block, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(storage) for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if id(storage) not in inputs | self.live.keys():
                self.live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, id(storage))
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def results(problem: Problem | MatmulProblem, impl: Implementation) -> list[Tensor]:
    """The result and all gradients."""
    needs = [x is not None for x in problem.frames]
    if isinstance(problem, MatmulProblem):
        y = impl.matmul(problem)
        return [y, *impl.matmul_backward(problem, y, [*needs, True])]
    flow, _ = impl.forward(problem)  # which saves nothing
    return [flow, *impl.backward(problem, flow, meta(0), needs)]


def clip(B: int, T: int, *groups: int, N: int, D: int, lag: int = 1, **options: Any) -> Problem:
    q = meta(B, T, *groups, N, D, dtype=options.pop("dtype", torch.float32))
    return Problem(q, q, lag=lag, **options)


def matmul(B: int, T: int, *groups: int, N: int, D: int, C: int, lag: int = 1, **options: Any) -> MatmulProblem:
    q = meta(B, T, *groups, N, D, dtype=options.pop("dtype", torch.float32))
    return MatmulProblem(q, q, x=meta(B, T - lag, *groups, N, C), lag=lag, **options)


LARGE = {
    "many frames": clip(2, 100, 6, N=65, D=64),
    "bf16": clip(2, 8, 6, N=257, D=64, dtype=torch.bfloat16),
    "float64": clip(1, 4, 3, N=577, D=64, dtype=torch.float64),
    "long maps": clip(1, 2, 1, N=2_000, D=16),
    "a long lag": clip(1, 32, 4, N=257, D=64, lag=20),
    "windows": clip(2, 8, 4, 16, N=64, D=40, head_reduction="mean"),
    "mean of maps": clip(1, 4, 4, N=257, D=80, head_reduction="mean_map"),
    "pairs": Problem(*[meta(1, 8, 6, 257, 64)] * 2, q_b=meta(1, 8, 6, 257, 64), k_b=meta(1, 8, 6, 257, 64)),
    "D = 256": clip(1, 8, 3, N=261, D=256),
    "M": matmul(1, 8, 6, N=257, D=64, C=256),
    "M^T": matmul(1, 100, 6, N=65, D=64, C=64, transpose=True),
    "P": matmul(1, 8, 3, N=257, D=64, C=256, softmax=True, dtype=torch.float16),
    "P^T": matmul(1, 8, 6, N=257, D=64, C=16, softmax=True, transpose=True),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_besides_inputs_and_results_stays_within_the_bound(name: str) -> None:
    """Forward and backward of problems whose maps are larger than the bound."""
    problem, bound = LARGE[name], 4 << 20
    assert problem.q.shape[:-1].numel() * problem.Nk * problem.result_dtype.itemsize > bound
    with PeakMemory() as memory:
        made = results(problem, Chunked(bound))
    assert memory.peak - sum(x.numel() * x.element_size() for x in made) <= bound
    assert memory.peak > bound / 8  # blocks are not needlessly small


@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_it_runs_on_meta_tensors(head_reduction: str) -> None:
    """So its control flow depends on no value, and nothing in it on a kind of device."""
    problem = clip(2, 5, 3, 2, N=7, D=6, lag=2, head_reduction=head_reduction, dtype=torch.bfloat16)
    flow, dq, dk, *_ = results(problem, Chunked())
    assert flow.shape == problem.flow_shape
    assert flow.dtype == torch.float32
    assert (dq.shape, dk.shape, dq.dtype) == (problem.q.shape, problem.k.shape, torch.bfloat16)
    operator = matmul(2, 5, 3, 2, N=7, D=6, C=4, lag=2, softmax=True)
    y, *_, dx = results(operator, Chunked())
    assert (y.shape, dx.shape) == (operator.product_shape, operator.x.shape)


def test_blocks_of_any_size_give_the_same_result() -> None:
    q, k = tt.make_qk(2, 7, (2, 2), 5, 8, 16)
    for problem in (
        Problem(q, k, lag=2, temperature=0.5),
        Problem(q, k, lag=5, head_reduction="mean"),  # frames 2, 3 and 4 are in no pair
        Problem(q, k, head_reduction="mean_map", center=True),
        Problem(q[:, :3], k[:, :3], q_b=q[:, 3:6], k_b=k[:, 3:6]),
        MatmulProblem(q, k, x=tt.make_features(q, k, 5, lag=3), lag=3, softmax=True),
    ):
        for memory in (1, 1 << 15, MEMORY):
            expected, found = results(problem, Reference()), results(problem, Chunked(memory))
            for x, y in zip(expected, found, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)


def test_it_runs_where_no_kernel_does(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """impl=None takes it with one warning that names the reason and the price; float64 without one."""
    monkeypatch.setattr(dispatch, "_PREFERENCE", {})
    q, k = tt.make_qk(1, 3, (2,), 7, 9, 8)
    flow = am_flow(q.requires_grad_(), k)
    flow.square().sum().backward()
    am_flow_matmul(q, k, tt.make_features(q, k, 3, lag=1))
    (warning,) = recwarn.list
    assert re.search(r"no fused kernel .*\(no fused kernel for cpu\).*slower than a kernel", str(warning.message))
    assert torch.equal(flow, am_flow(q, k, impl="chunked"))
    assert explain(q, k).impl == "chunked"
    assert "in 64 MB" in str(explain(q, k))


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_every_device_without_a_kernel_gets_it(device: str) -> None:
    class OtherDevice(torch.Tensor):
        """Claims to be on a device that is not here."""

        @property
        def device(self) -> torch.device:
            return torch.device(device)

    q = torch.zeros(1, 2, 1, 3, 4).as_subclass(OtherDevice)
    choice = dispatch.choose(Problem(q, q), None)
    assert (choice.name, choice.fallback, choice.reason) == ("chunked", True, f"no fused kernel for {device}")
