"""Whether results are right: within their budgets of the oracle, and the same to the bit where they must be.

Every step gives a dict; its entry "wrong" maps what is wrong to the reason. A dry run makes every call, and compares
only small problems, whose results it ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from amflow_kernels import explain
from amflow_kernels import testing as tt
from amflow_kernels.impl import cuda
from amflow_kernels.impl.triton import configs
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu import problems
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.problems import BF16, Case

Step = tuple[str, Callable[[], dict[str, Any]]]
LARGEST_DRY = 70  # tokens of the problems that a dry run compares
REPEATS = 20
SMOKE = (Case(), Case((730, 730)), Case((577, 577), dtype=torch.float32), Case((577, 577), features=64))


def smoke(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """Every kernel once, without a comparison: what can't run at all shows in the first minute."""
    yield "choice", partial(_choice, machine)
    seen: set[tuple[object, ...]] = set()
    for case in [*SMOKE, *problems.correctness(), *problems.motion()]:
        kind = (case.features > 0, *sorted(problems.branches(*case.tokens, case.D, case.dtype), key=str), *case.options)
        if (kind := (*kind, case.dtype, case.D > 64, case.pair, case.lse)) not in seen:
            seen.add(kind)
            yield from ((str(each), partial(_runs, each, machine)) for each in _by(case, impls))


def _by(case: Case, impls: Sequence[str]) -> list[Case]:
    return [case, *(problems.for_cuda([case]) if "cuda" in impls else [])]


def _choice(machine: Gpu) -> dict[str, Any]:
    """Which implementation a user gets who asks for none."""
    q = torch.empty(1, 2, 1, 257, 64, device=machine.device, dtype=BF16)
    explanation = explain(q)
    wrong = {} if explanation.impl == "triton" else {"impl": f"{explanation.impl}: {explanation.reason}"}
    return {"explain": str(explanation), "wrong": wrong}


def _runs(case: Case, machine: Gpu) -> dict[str, Any]:
    results = solve(case, case.problem(machine.device), machine)
    machine.synchronize()
    finite = all(bool(x.isfinite().all()) for x in results.grads)
    return {"wrong": {} if finite else {"gradients": "not finite"}}


def correctness(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """All problems of the table, by every implementation that can solve them."""
    cases = problems.correctness()
    if "cuda" in impls:
        cases += problems.for_cuda(cases)
    for case in (*cases, *problems.motion()):
        yield str(case), partial(correct, case, machine)


class Results(NamedTuple):
    """What a problem's calls gave."""

    result: Tensor
    centred: Tensor
    given: Tensor  # the gradient of the result
    grads: Sequence[Tensor]  # those of the inputs for it
    only_q: Tensor | None  # dq of a call that was asked for nothing else


def solve(case: Case, problem: Any, machine: Gpu) -> Results:
    """Makes all calls of a case: forward, centred, backward; outputs and scratch are NaN before."""
    inputs = [x.detach().requires_grad_() for x in tt.inputs_of(problem)]
    problem = tt.with_inputs(problem, inputs)
    with tt.poison_allocations(), processors(machine, case.processors):
        result = centred = tt.run(problem, case.impl)
        if isinstance(problem, Problem):
            centred = tt.run(replace(problem, center=True), case.impl)
        given = tt.make_dflow(result.shape, device=machine.device)
        grads = torch.autograd.grad(result, inputs, given)
        only_q = torch.autograd.grad(tt.run(problem, case.impl), inputs[0], given)[0] if case.only_q else None
    return Results(result.detach(), centred.detach(), given, grads, only_q)


def correct(case: Case, machine: Gpu) -> dict[str, Any]:
    """Solves a case; wrong is what exceeds its budget."""
    problem = case.problem(machine.device)
    results = solve(case, problem, machine)
    machine.synchronize()
    if machine.dry and max(case.tokens) > LARGEST_DRY:
        return {"wrong": {}}
    if isinstance(problem, MatmulProblem):
        return {"wrong": _wrong_product(problem, results)}
    return {"wrong": _wrong_flow(case, problem, results)}


def _wrong_flow(case: Case, problem: Problem, results: Results) -> dict[str, str]:
    exact = tt.oracle_flow(replace(problem, center=True))
    temperature, given = problem.temperature, results.given
    magnitude = tt.grad_magnitude(problem, given) if problem.Nk <= 2 else None
    wrong = collected(
        flow=lambda: tt.assert_flow(results.result, exact, problem.Nq, temperature=temperature),
        centred=lambda: tt.assert_centred(
            results.centred, exact, problem.Nq, frame_step=case.frame_step, temperature=temperature
        ),
        gradients=lambda: tt.assert_grads(
            results.grads, tt.oracle_grads(problem, given), tt.grad_tie(problem, given), magnitude
        ),
    )
    if results.only_q is not None and not torch.equal(results.only_q, results.grads[0]):
        wrong["dq"] = "differs where dk is not asked for"
    return wrong


def _wrong_product(problem: MatmulProblem, results: Results) -> dict[str, str]:
    dy = results.given
    *grads, dx = results.grads
    transposed = replace(problem, x=dy, transpose=not problem.transpose)
    return collected(
        product=lambda: tt.assert_matmul(results.result, tt.oracle_matmul(problem), tt.matmul_budget(problem)),
        dx=lambda: tt.assert_matmul(dx, tt.oracle_matmul(transposed), tt.matmul_budget(transposed)),
        gradients=lambda: tt.assert_grads(grads, tt.oracle_matmul_grads(problem, dy), tt.matmul_tie(problem, dy)),
    )


def collected(**assertions: Callable[[], None]) -> dict[str, str]:
    """What the assertions that fail say, by name."""
    wrong = {}
    for name, assertion in assertions.items():
        try:
            assertion()
        except AssertionError as error:
            wrong[name] = str(error)[:300]
    return wrong


def exactness(machine: Gpu, impls: Sequence[str]) -> Iterator[Step]:
    """Equal frames give Nq / Nk and no gradient; the same call gives the same bits again, in chunks of any size."""
    for impl in impls:
        for (tokens, dtype), cases in groupby(problems.exactness(), lambda case: (case.tokens, case.dtype)):
            name = f"{impl}, N = {tokens[0]}, {str(dtype).removeprefix('torch.')}"
            yield name, partial(_exact, [replace(case, impl=impl) for case in cases], machine)


def _exact(cases: Sequence[Case], machine: Gpu) -> dict[str, Any]:
    """The first case is the clip as it is, the others are the same clip in other chunks."""
    case = cases[0]
    problem = case.problem(machine.device)
    q, k = problem.q, problem.k
    expected = flow_and_grads(q, k, case.impl)
    wrong = {}

    def compare(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor] = expected) -> None:
        different = sum(int((x != y).sum()) for x, y in zip(got, wanted, strict=True))
        if different:
            wrong[name] = f"{different} elements differ"

    for n in range(1 if machine.dry else REPEATS):
        compare(f"repeat {n}", flow_and_grads(q, k, case.impl))
    for other in cases[1:]:
        with processors(machine, other.processors):
            compare(f"chunks for {other.processors} processors", flow_and_grads(q, k, case.impl))
    for t in (0, case.T - 2):
        flow, *_ = flow_and_grads(q[:, t : t + 2].contiguous(), k[:, t : t + 2].contiguous(), case.impl)
        compare(f"T = 2, from frame {t}", [flow], [expected[0][:, t : t + 1]])
    still_q, still_k = (x[:, :1].expand(-1, case.T, -1, -1, -1).contiguous() for x in (q, k))
    flow, *grads = flow_and_grads(still_q, still_k, case.impl)
    compare("equal frames", [flow, *grads], [torch.ones_like(flow), *map(torch.zeros_like, grads)])
    machine.synchronize()
    return {"wrong": wrong}


def flow_and_grads(q: Tensor, k: Tensor, impl: str) -> list[Tensor]:
    """Flow, dq and dk."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    flow = tt.run(Problem(q, k), impl)
    return [flow.detach(), *torch.autograd.grad(flow, (q, k), tt.make_dflow(flow.shape, device=q.device))]


@contextmanager
def processors(machine: Gpu, count: int | None) -> Iterator[None]:
    """Launches see this number of multiprocessors, by which they choose the size of chunks; None: the true one."""
    if count is None:
        yield
        return
    device = replace(machine.launch_device(), processors=count)
    find = cuda._device
    with (
        mock.patch.object(configs.Device, "of", return_value=device),
        mock.patch.object(cuda, "_device", lambda q: (count, *find(q)[1:])),
    ):
        yield
