"""DTensors: q and k sharded by batch or heads are taken as they are, and nothing is communicated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from amflow_kernels import (
    AMFlowStream,
    am_flow,
    am_flow_attention,
    am_flow_matmul,
    am_flow_matmul_pair,
    am_flow_pair,
    motion_maps,
    motion_pca,
)
from amflow_kernels import testing as tt

B, T, HEADS, N, D = 2, 4, 4, 9, 8


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as one of 2 x 2 whose communication does nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("clips", "heads"))
    torch.distributed.destroy_process_group()


def qkv(heads: int = HEADS, clips: int = B) -> list[Tensor]:
    q, k = tt.make_qk(clips, T, (heads,), N, N, D)
    return [q, k, tt.make_qk(clips, T, (heads,), N, N, D, seed=1)[0]]


def placed(x: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return DTensor.from_local(x, mesh, placements, run_check=False)


def all_functions(q: Any, k: Any, v: Any, x: Any, **options: Any) -> list[Tensor]:
    """The results of all public functions of clips or pairs; x: features of their pairs."""
    pairs = q[:, :-1], k[:, :-1], q[:, 1:], k[:, 1:]
    return [
        am_flow(q, k),
        *am_flow_attention(q, k, v, center=True, out_dtype=torch.bfloat16),
        am_flow_matmul(q, k, x),
        am_flow_pair(*pairs),
        am_flow_matmul_pair(*pairs, x, transpose=True),
        *motion_maps(q=q, k=k),
        *motion_pca(q, k, rank=2),
    ]


@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Shard(2)), (Shard(2), Replicate()), (Shard(0), Shard(0)), (Replicate(), Replicate())],
    ids=["clips and heads", "heads", "clips twice", "replicated"],
)
def test_results_are_those_of_the_local_parts_and_placed_like_q(
    placements: tuple[Placement, ...], mesh: DeviceMesh
) -> None:
    q, k, v = qkv()
    inputs = q, k, v, tt.make_features(q, k, 3, lag=1)
    found, expected = all_functions(*(placed(x, mesh, *placements) for x in inputs)), all_functions(*inputs)
    for y, local in zip(found, expected, strict=True):
        assert isinstance(y, DTensor)
        assert y.placements == placements
        assert torch.equal(y.to_local(), local)


def test_folded_frames_have_their_heads_in_dimension_1(mesh: DeviceMesh) -> None:
    """The attention's output does, too, and the flow has them in dimension 2."""
    images = [x.flatten(0, 1) for x in qkv()]
    lse = torch.logsumexp(images[0] @ images[1].mT, -1)
    q, k, v, lse = (placed(x, mesh, Shard(0), Shard(1)) for x in (*images, lse))
    out, flow = am_flow_attention(q, k, v, num_frames=T)
    assert out.placements == (Shard(0), Shard(1))
    assert out.shape == q.shape
    assert flow.placements == (Shard(0), Shard(2))
    assert flow.shape == (2 * B, T - 1, 2 * HEADS, N)
    assert am_flow(q, k, num_frames=T, lse=lse, scale=1.0).placements == flow.placements


def test_heads_may_be_reduced_where_they_are_whole(mesh: DeviceMesh) -> None:
    q, k, _ = (placed(x, mesh, Shard(0), Replicate()) for x in qkv())
    flow = am_flow(q, k, head_reduction="mean_map")
    assert flow.placements == (Shard(0), Replicate())
    assert flow.shape == (2 * B, T - 1, N)


def bad_inputs(mesh: DeviceMesh) -> dict[str, tuple[Any, Any, dict[str, Any], str]]:
    q, k, _ = qkv()
    sharded = placed(q, mesh, Replicate(), Shard(2))
    uneven = distribute_tensor(torch.zeros(2, T, 3, N, D), mesh, (Replicate(), Shard(2)))
    odd_clips = distribute_tensor(torch.zeros(3, T, 4, N, D), mesh, (Shard(0), Replicate()))
    tokens, pending = placed(q, mesh, Replicate(), Shard(3)), placed(q, mesh, Partial(), Replicate())
    return {
        "a plain tensor": (sharded, k, {}, r"k: expected DTensors .* got a plain tensor beside DTensors"),
        "tokens": (tokens, tokens, {}, r"q: expected DTensors .*batch or heads.*\(dimensions 0 and 2\), got .*dim=3"),
        "a sum": (pending, pending, {}, r"q: expected DTensors .*got .*Partial"),
        "other shards": (sharded, placed(k, mesh, Shard(2), Replicate()), {}, r"k: expected .* in the same way.*q is"),
        "uneven heads": (uneven, uneven, {}, r"q: expected a heads dimension \(2\) that 2 ranks share even.*\(2, 4, 3"),
        "uneven clips": (odd_clips, odd_clips, {}, r"q: expected a batch dimension \(0\) that 2 ranks share evenly"),
        "mean": (sharded, sharded, {"head_reduction": "mean"}, r"head_reduction: expected 'none'.*shard.*\.mean\(2\)"),
        "lag": (sharded, sharded, {"lag": T}, r"q: expected more frames .* than lag = 4"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a plain tensor", "tokens", "a sum", "other shards", "uneven heads", "uneven clips",
                                  "mean", "lag"])  # fmt: skip
def test_anything_else_raises(name: str, mesh: DeviceMesh) -> None:
    q, k, options, message = bad_inputs(mesh)[name]
    with pytest.raises((TypeError, ValueError), match=message):
        am_flow(q, k, **options)


def test_a_stream_takes_plain_tensors(mesh: DeviceMesh) -> None:
    q = placed(torch.zeros(2, 3, 5, 4), mesh, Replicate(), Replicate())
    with pytest.raises(TypeError, match=r"q: expected a plain tensor, got a DTensor; pass q\.to_local\(\)"):
        AMFlowStream()(q, q)


# ---------------------------------------------------------------------------------------------------- processes


class Attention(nn.Module):
    """Attention of an image model, which gives its flow as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(HEADS * D, HEADS * D) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        out, flow = am_flow_attention(q, k, v, num_frames=T)
        return self.proj(out.transpose(1, 2).flatten(2)), flow


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def loss(out: Tensor, flow: Tensor) -> Tensor:
    return out.square().sum() + (full(flow) * tt.make_dflow((B, T - 1, HEADS, N))).sum()


def two_ranks(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    inputs = [x.requires_grad_() for x in qkv()]
    generator = torch.Generator().manual_seed(0)
    expected = am_flow_attention(*inputs)
    weights = [torch.randn(y.shape, generator=generator) for y in expected]
    expected_grads = torch.autograd.grad(expected, inputs, weights)
    for placement in (Shard(0), Shard(2), Replicate()):
        sharded = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in inputs]
        incoming = [distribute_tensor(w, mesh, [placement]) for w in weights]
        compiled = torch.compile(am_flow_attention, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()  # or torch 2.11 fails to partition a graph of DTensors with dynamic shapes

        def results(function: Callable[..., Any], sharded: list[Any] = sharded, incoming: Any = incoming) -> list[Any]:
            found = function(*sharded)
            return [*found, *torch.autograd.grad(found, sharded, incoming)]

        with CommDebugMode() as communication:
            eager = results(am_flow_attention)
        assert communication.get_total_counts() == 0
        for found in (eager, results(compiled)):
            for y, z in zip(found, (*expected, *expected_grads), strict=True):
                assert y.placements == (placement,)
                torch.testing.assert_close(y.full_tensor(), z, rtol=1e-5, atol=1e-6)
    flow = am_flow(*(distribute_tensor(x.detach(), mesh, [Shard(2)]) for x in inputs[:2]))
    torch.testing.assert_close(flow.mean(2).full_tensor(), am_flow(*inputs[:2], head_reduction="mean"))

    torch.manual_seed(0)
    plain, model, x = Attention(), Attention(), torch.randn(B * T, N, HEADS * D)
    model.load_state_dict(plain.state_dict())
    columns = ColwiseParallel(use_local_output=False)
    parallelize_module(model, mesh, {"q": columns, "k": columns, "v": columns, "proj": RowwiseParallel()})
    loss(*plain(x)).backward()
    loss(*model(x)).backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            full(parameter.grad), other.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Forward and backward, eager and compiled, without communication; also as a tensor-parallel model's attention."""
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
