"""All kernels that the GPU suite launches, in the order in which it does, and how they are compiled beforehand."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from time import perf_counter
from unittest import mock

import torch

from amflow_kernels.impl.triton import configs, launch
from amflow_kernels.problem import MatmulProblem
from benchmarks.gpu import checks, environments, problems, sanitizer, times
from benchmarks.gpu.kernel_cache import Kernel, install, record
from benchmarks.gpu.problems import Case

Job = tuple[Case, Kernel]  # a kernel, and a case that launches it


def cases(*, dry: bool) -> list[Case]:
    """The problems, those of a dry run or those of a real one."""
    correctness = [*problems.correctness(), *problems.motion()]
    exactness = problems.exactness()
    few_frames = [replace(case, T=2) for case in exactness if case.processors is None]
    listed = [*checks.SMOKE, *times.cases(dry), *correctness, *exactness, *few_frames]
    listed += [*environments.CASES, *sanitizer.CASES]
    return list({str(case): case for case in listed}.values())


def launch_all(case: Case, device: configs.Device) -> None:
    """The launches of a case, on tensors without storage: forward, of the centred flow, too, and backward."""
    if case.processors is not None:
        device = replace(device, processors=case.processors)
    problem = case.problem("meta")
    with mock.patch.object(configs.Device, "of", return_value=device):
        if isinstance(problem, MatmulProblem):
            y = launch.am_flow_matmul(problem)
            launch.am_flow_matmul_backward(problem, torch.empty_like(y), [True] * 5)
            return
        launch.am_flow(replace(problem, center=True))
        flow, saved = launch.am_flow(problem)
        launch.am_flow_backward(problem, flow, saved, [True, True, problem.pair, problem.pair])
        if case.only_q:
            launch.am_flow_backward(problem, flow, saved, [True, False, False, False])


def needed(listed: list[Case], device: configs.Device, architecture: int) -> Iterator[Job]:
    """Every kernel that the cases launch, once, with the first case that does."""
    seen: set[str] = set()
    with record(device, architecture) as recorded:
        for case in listed:
            recorded.clear()
            launch_all(case, device)
            for kernel in recorded:
                if kernel.digest not in seen:
                    seen.add(kernel.digest)
                    yield case, kernel


def fill(jobs: list[Job], device: configs.Device, architecture: int, workers: int) -> dict[str, str]:
    """Compile kernels by several processes, and give the errors."""
    failed = {}
    start = perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, case, job.digest, device, architecture): (case, job) for case, job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            case, kernel = futures[future]
            if error := future.result():
                failed[f"{kernel.name} of {case}"] = error
            if done % 20 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} kernels compiled, {perf_counter() - start:.0f} s", flush=True)
    return failed


def _compile(case: Case, digest: str, device: configs.Device, architecture: int) -> str:
    """Compile one of the kernels of a case: they can't be sent to another process. Gives the error, if any."""
    install()
    with record(device, architecture) as recorded:
        launch_all(case, device)
    try:
        next(kernel for kernel in recorded if kernel.digest == digest).compile()
    except Exception as error:  # reported beside the others
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""
