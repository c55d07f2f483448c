"""The same results in every environment: graphs, streams, autocast, compiled code, others' log-sum-exps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, library
from torch.nn.attention import SDPBackend

from amflow_kernels import am_flow, am_flow_attention
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem
from benchmarks.gpu.checks import Step, collected, flow_and_grads
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.problems import BF16, FP16, FP32, Case
from benchmarks.providers import attention

SIZES = (257, 730)  # by strips and by tiles
CLIPS = [Case((N, N), T=4, dtype=dtype) for N in SIZES for dtype in (BF16, FP32)]
WITH_LSE = [Case((730, 730), dtype=d, frame_step=s, lse=True) for d in (BF16, FP16) for s in (0.2, 1e-3)]
WITH_LSE += [Case((730, 730), dtype=BF16, lse=True, options={"head_reduction": "mean_map"})]
CASES = [*CLIPS, *WITH_LSE, Case((197, 197), T=4), Case((197, 197), T=4, features=8)]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def environments(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """Every environment with a clip that runs by strips and with one that runs by tiles."""
    checks: dict[str, Callable[[Gpu, int], dict[str, Any]]] = {
        "CUDA graph": _graph,
        "another stream": _stream,
        "autocast": _autocast,
        "torch.compile": _compiled,
        "reduce-overhead": partial(_compiled, mode="reduce-overhead"),
        "another GPU": _another_gpu,
    }
    for (name, check), N in product(checks.items(), SIZES):
        yield f"{name}, N = {N}", partial(check, machine, N)
    yield "opcheck of am_flow", partial(_opcheck, machine)
    yield "opcheck of am_flow_matmul", partial(_opcheck_matmul, machine)


def _clip(machine: Gpu, N: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return tt.make_qk(1, 4, (2,), N, N, 64, dtype=dtype, device=machine.device)


def _same(machine: Gpu, got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, Any]:
    machine.synchronize()
    different = [n for n, (x, y) in enumerate(zip(got, expected, strict=True)) if not torch.equal(x.cpu(), y.cpu())]
    return {"wrong": {"results": f"numbers {different} of flow, dq, dk differ"} if different else {}}


def _graph(machine: Gpu, N: int) -> dict[str, Any]:
    q, k = _clip(machine, N)
    expected = flow_and_grads(q, k, "triton")
    q, k = q.requires_grad_(), k.requires_grad_()
    dflow = tt.make_dflow(expected[0].shape, device=machine.device)  # copies from the host can't be captured

    def step() -> tuple[Tensor, ...]:
        flow = am_flow(q, k, impl="triton")
        return flow.detach(), *torch.autograd.grad(flow, (q, k), dflow)

    results, replay = machine.captured(step)
    replay()
    return _same(machine, results, expected)


def _stream(machine: Gpu, N: int) -> dict[str, Any]:
    q, k = _clip(machine, N)
    expected = flow_and_grads(q, k, "triton")
    machine.synchronize()
    with machine.another_stream():
        got = flow_and_grads(q, k, "triton")
    return _same(machine, got, expected)


def _autocast(machine: Gpu, N: int) -> dict[str, Any]:
    """`am_flow` casts nothing; `am_flow_attention` casts as attention does."""
    q, k = _clip(machine, N, FP32)
    v = torch.randn_like(q)
    flow = am_flow(q, k, impl="triton")
    low = [x.to(BF16) for x in (q, k, v)]
    expected = [flow, *am_flow_attention(low[0], low[1], low[2], impl="triton")]
    with torch.autocast(machine.device, BF16):
        got = [am_flow(q, k, impl="triton"), *am_flow_attention(q, k, v, impl="triton")]
    return _same(machine, got, expected)


def _compiled(machine: Gpu, N: int, **options: Any) -> dict[str, Any]:
    """Forward and backward, three times: graphs are recorded in the second."""
    q, k = _clip(machine, N)
    expected = flow_and_grads(q, k, "triton")
    torch.compiler.reset()
    flow_of = machine.compiled(partial(am_flow, impl="triton"), **options)
    dflow = tt.make_dflow(expected[0].shape, device=machine.device)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        inputs = [x.detach().requires_grad_() for x in (q, k)]
        flow = flow_of(*inputs)
        got = [flow.detach().clone(), *(x.clone() for x in torch.autograd.grad(flow, inputs, dflow))]
    return _same(machine, got, expected)


def _another_gpu(machine: Gpu, N: int) -> dict[str, Any]:
    others = machine.others()
    if not others:
        return {"skipped": "there is one GPU"}
    q, k = _clip(machine, N)
    return _same(
        machine,
        flow_and_grads(q.to(others[0]), k.to(others[0]), "triton"),
        flow_and_grads(q, k, "triton"),
    )


def _opcheck(machine: Gpu) -> dict[str, Any]:
    q, k = (x.requires_grad_() for x in _clip(machine, 197))
    return _checked(
        machine, torch.ops.amflow.am_flow, (q, k, None, None, None, None, 0.125, 1, 1.0, "none", False, "triton")
    )


def _opcheck_matmul(machine: Gpu) -> dict[str, Any]:
    q, k = (x.requires_grad_() for x in _clip(machine, 197))
    x = tt.make_features(q, k, 8, lag=1)
    return _checked(
        machine, torch.ops.amflow.am_flow_matmul, (q, k, None, None, x, 0.125, 1, 1.0, False, False, "triton")
    )


def _checked(machine: Gpu, op: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not machine.dry:  # it compares results
        tests.append("test_aot_dispatch_static")
    return {"passed": library.opcheck(op.default, arguments, test_utils=tests)}


def log_sum_exps(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """The drop-in attention, by the attention kernel that PyTorch prefers and by those whose log-sum-exps are taken."""
    yield "PyTorch's choice", partial(_choices, machine)
    for N, dtype, frame_step in product(SIZES, (BF16, FP16), (0.2, 1e-3)):
        name = f"drop-in, N = {N}, {_short(dtype)}, frame step {frame_step}"
        yield name, partial(_drop_in, machine, N, dtype, frame_step, None)
    for backend, case in product(BACKENDS, WITH_LSE):
        name = f"{backend.name.lower()}, {_short(case.dtype)}, frame step {case.frame_step}"
        if "head_reduction" not in case.options:
            yield f"{name}: log-sum-exps", partial(_forced, machine, backend, case)
            yield f"{name}: drop-in", partial(_drop_in, machine, 730, case.dtype, case.frame_step, backend)
        else:
            yield f"{name}: mean_map", partial(_forced, machine, backend, case)


def _choices(machine: Gpu) -> dict[str, Any]:
    return {
        "backend": {f"N = {N}, {_short(dtype)}": backend_of(machine, N, dtype) for N in SIZES for dtype in (BF16, FP32)}
    }


def backend_of(machine: Gpu, N: int, dtype: torch.dtype) -> str:
    """The name of the backend that `scaled_dot_product_attention` takes."""
    q = torch.empty(2, 2, N, 64, dtype=dtype, device=machine.device)
    return str(SDPBackend(torch._fused_sdp_choice(q, q, q)).name)


def _drop_in(machine: Gpu, N: int, dtype: torch.dtype, frame_step: float, backend: SDPBackend | None) -> dict[str, Any]:
    """`am_flow_attention`: the attention's output to the bit, and the flow within its budgets."""
    q, k = tt.make_qk(1, 3, (2,), N, N, 64, dtype=dtype, frame_step=frame_step, device=machine.device)
    v = torch.randn_like(q)
    exact = tt.oracle_flow(Problem(q, k, center=True))
    with machine.attention_by(backend):
        expected = attention(q, k, v)
        out, centred = am_flow_attention(q, k, v, center=True, impl="triton")
        _, flow = am_flow_attention(q, k, v, impl="triton")
    machine.synchronize()
    wrong = collected(
        flow=lambda: tt.assert_flow(flow, exact, N),
        centred=lambda: tt.assert_centred(centred, exact, N, frame_step=frame_step),
    )
    if not torch.equal(out, expected):
        wrong["output"] = "other bits than scaled_dot_product_attention's"
    return {"wrong": wrong}


def _forced(machine: Gpu, backend: SDPBackend, case: Case) -> dict[str, Any]:
    """Log-sum-exps of one attention kernel: their shape, their error, and the flow that takes them."""
    problem = case.problem(machine.device)
    assert isinstance(problem, Problem)
    q, k, scale = problem.q, problem.k, problem.logit_scale
    q4, k4 = q.flatten(0, 1), k.flatten(0, 1)
    if backend == SDPBackend.FLASH_ATTENTION:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        _, lse = machine.attention_op(op, q4, k4, k4, scale=scale)
    else:
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        _, lse = machine.attention_op(op, q4, k4, k4, None, True, scale=scale)
    shape = tuple(lse.shape)
    exact = torch.logsumexp(scale * (q.double() @ k.double().mT), -1)
    lse = lse.reshape(exact.shape)
    centred = am_flow(q, k, lse=lse, center=True, impl="triton", **case.options)
    machine.synchronize()
    true_flow = tt.oracle_flow(Problem(q, k, center=True, **case.options))
    N = case.tokens[0]
    return {
        "shape": shape,
        "dtype": str(lse.dtype),
        "error as a natural logarithm": (lse - exact).abs().max().item(),
        "error as a logarithm to base 2": (lse * torch.log(torch.tensor(2.0)).item() - exact).abs().max().item(),
        "wrong": collected(centred=lambda: tt.assert_centred(centred, true_flow, N, frame_step=case.frame_step)),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
