"""The logic of the GPU suite. `python -m benchmarks.gpu.suite --dry-run` makes all of its calls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem
from benchmarks.gpu import checks, kernel_cache, machine, problems, report, section, suite, times
from benchmarks.gpu.problems import BF16, FP16, FP32, Case
from benchmarks.shapes import Shape

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.usefixtures("quick_interpreter"),
]

LIGHT = "import os, sys, time; from pathlib import Path; from benchmarks.gpu.report import append, read\n"


class Interpreted(machine.NoGpu):
    """Triton's interpreter: results are computed, and compared."""

    dry = False


@pytest.fixture
def interpreted() -> Interpreted:
    return Interpreted(kernel_cache.Lookups())


# --------------------------------------------------------------------------------------------------- problems


def test_no_problem_is_there_twice() -> None:
    cases = [*problems.correctness(), *problems.for_cuda(problems.correctness()), *problems.motion()]
    assert len({str(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_problems_reach_every_branch_of_the_choice_between_kernels(dtype: torch.dtype) -> None:
    """For any number of tokens: the same strips, or tiles, as some problem, forward and backward."""
    reached = set()
    for case in problems.correctness():
        if case.dtype == dtype or dtype == FP16:  # float16 takes the forward's strips of bfloat16
            reached |= {
                branch
                for branch in problems.branches(*case.tokens, case.D, case.dtype)
                if case.dtype == dtype or branch[0] == "strip"
            }
    for N in range(1, 1000):
        missing = problems.branches(N, N, problems.D, dtype) - reached
        assert not missing, f"N = {N}"


def test_the_problems_use_every_option_by_strips_and_by_tiles() -> None:
    cases = problems.correctness()

    def tiled(case: Case) -> bool:
        return ("strip", None) in problems.branches(*case.tokens, case.D, case.dtype)

    for reaches in (
        lambda case: case.pair,
        lambda case: case.options.get("lag") == 2,
        lambda case: case.options.get("temperature") == 0.25,
        lambda case: case.frame_step == 1e-3,
        lambda case: case.logit_std == 6.0,
    ):
        assert {tiled(case) for case in cases if reaches(case)} == {False, True}
    for reaches in (
        lambda case: case.options.get("temperature") == 3.0,
        lambda case: case.options.get("scale", 0) < 0,
        lambda case: case.options.get("head_reduction") == "mean",
        lambda case: case.only_q,
        lambda case: len(case.groups) == 2,
        lambda case: case.tokens[0] > case.tokens[1],
        lambda case: case.tokens[0] < case.tokens[1],
        lambda case: case.processors == 1,
        lambda case: case.layout == "far",
        lambda case: case.lse and case.options.get("head_reduction") == "mean_map",
    ):
        assert any(reaches(case) for case in cases)
    assert {case.layout for case in cases} >= set(tt.LAYOUTS)
    assert {case.D for case in cases} >= {17, 40, 64, 128, 256}
    assert {case.dtype for case in cases if case.options.get("head_reduction") == "mean_map"} == {BF16, FP32}


def test_the_problems_for_the_cuda_kernels_are_within_their_limits() -> None:
    cases = problems.for_cuda(problems.correctness())
    assert {case.impl for case in cases} == {"cuda"}
    assert {case.dtype for case in cases} == {BF16, FP16, FP32}
    assert max(max(case.tokens) for case in cases) == 577
    assert max(case.D for case in cases) == 128


def test_frames_that_lie_far_apart_need_wide_offsets() -> None:
    q, k = Case((5, 7), 16, layout="far", groups=(1,)).problem("meta").frames[:2]
    assert k is not None
    for x, tokens in ((q, 5), (k, 7)):
        assert x.shape == (1, 3, 1, tokens, 16)
        assert 2 * x.stride(1) + x[0, 0].numel() > 2**31


def test_given_log_sum_exps_are_those_of_the_logits() -> None:
    problem = Case((5, 7), 4, dtype=FP32, lse=True).problem("cpu")
    assert isinstance(problem, Problem)
    assert problem.lse is not None
    expected = torch.logsumexp(problem.logit_scale * (problem.q @ problem.k.mT), -1)
    torch.testing.assert_close(problem.lse, expected)


# ----------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "case",
    [
        Case((17, 17), 16, dtype=FP32, only_q=True),
        Case((33, 33), 16, dtype=FP16, pair=True, layout="offset"),
        Case((18, 18), 16, dtype=FP32, groups=(1,), features=3, options={"softmax": True}),
        pytest.param(Case((2, 2), 8, dtype=FP32, options={"head_reduction": "mean_map"}), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_correct_result_passes_and_a_wrong_one_fails(
    case: Case, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.correct(case, interpreted) == {"wrong": {}}
    run = tt.run
    monkeypatch.setattr(checks.tt, "run", lambda problem, impl: run(problem, impl) * (1 + 1e-3))
    wrong = checks.correct(case, interpreted)["wrong"]
    assert {"flow", "product"} & set(wrong)


def test_exactness_sees_one_bit(interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gives other bits than the first, whatever the reason."""
    monkeypatch.setattr(checks, "REPEATS", 1)
    cases = [Case((5, 5), 16, T=3, dtype=FP32, groups=(1,)), Case((5, 5), 16, T=3, dtype=FP32, processors=10**6)]
    assert checks._exact(cases, interpreted) == {"wrong": {}}
    results = checks.flow_and_grads
    calls = []

    def later_calls_differ(*arguments: Any) -> list[torch.Tensor]:
        calls.append(arguments)
        flow, dq, dk = results(*arguments)
        return [flow, dq, torch.nextafter(dk, torch.tensor(torch.inf)) if len(calls) > 1 else dk]

    monkeypatch.setattr(checks, "flow_and_grads", later_calls_differ)
    assert set(checks._exact(cases, interpreted)["wrong"]) == {
        "repeat 0",
        "chunks for 1000000 processors",
        "equal frames",
    }


def test_a_missing_nvidia_smi_is_recorded(monkeypatch: pytest.MonkeyPatch, interpreted: Interpreted) -> None:
    monkeypatch.setenv("PATH", "")
    assert interpreted.describe()["driver"].startswith("unknown: ")


# --------------------------------------------------------------------------------------------------- sections


def test_the_budgets_of_all_sections_are_within_eight_minutes() -> None:
    assert list(suite.BUDGETS) == list(section.SECTIONS)
    assert sum(suite.BUDGETS.values()) + suite.KILL <= suite.TOTAL <= 8 * 60


def test_a_step_that_raises_costs_only_itself(tmp_path: Path, interpreted: Interpreted) -> None:
    records = tmp_path / "records"
    steps: list[checks.Step] = [
        ("first", lambda: {"wrong": {}}),
        ("second", lambda: {"wrong": {"x": 1 // 0}}),
        ("third", lambda: {"wrong": {"y": "off"}}),
    ]
    assert section.run(iter(steps), records, interpreted) == 0
    ended = {record["step"]: record for record in report.read(records) if "begins" not in record}
    failed = report.failures(ended)
    assert set(failed) == {"second", "third"}
    assert "ZeroDivisionError" in failed["second"]


def test_a_lost_gpu_ends_the_process_and_the_next_goes_on(
    tmp_path: Path, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that CUDA repeats for every later call of the process: the other steps need a new one."""
    records = tmp_path / "records"
    ran = []

    def step(name: str) -> dict[str, Any]:
        ran.append(name)
        if name == "breaks":
            raise RuntimeError("an illegal memory access was encountered")
        return {}

    steps: list[checks.Step] = [(name, lambda name=name: step(name)) for name in ("before", "breaks", "after")]
    monkeypatch.setattr(interpreted, "broken", lambda: True)
    assert section.run(iter(steps), records, interpreted) == section.BROKEN
    assert section.run(iter(steps), records, interpreted) == 0
    assert ran == ["before", "breaks", "after"]


def finish(code: str, tmp_path: Path, deadline: float) -> tuple[dict[str, str], dict[str, Any]]:
    records = tmp_path / "records"
    problems = suite.finish([sys.executable, "-c", LIGHT + code, str(records)], records, tmp_path / "log", deadline)
    ended = {record["step"]: record for record in report.read(records) if "begins" not in record}
    return problems, ended


def test_a_step_that_ends_its_process_is_recorded_and_the_section_goes_on(tmp_path: Path) -> None:
    code = """
records = Path(sys.argv[1])
done = {record["step"] for record in read(records)}
for step in ("first", "dies", "last"):
    if step not in done:
        append(records, {"step": step, "begins": True})
        if step == "dies":
            print("a message of the driver", flush=True)
            os.abort()
        append(records, {"step": step})
"""
    problems, ended = finish(code, tmp_path, monotonic() + 100)
    assert problems == {}
    assert list(ended) == ["first", "dies", "last"]
    assert "a message of the driver" in ended["dies"]["error"]


def test_a_step_that_runs_at_the_deadline_is_named(tmp_path: Path) -> None:
    report.append(tmp_path / "records", {"step": "hangs", "begins": True})
    problems, ended = finish("time.sleep(1000)", tmp_path, monotonic())
    assert list(problems) == ["deadline"]
    assert ended["hangs"]["error"] == "did not end before the deadline"


def test_the_end_of_a_process_is_that_of_the_processes_that_it_started() -> None:
    """The pipe closes only when none of them holds it any more."""
    code = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("both run", flush=True)
time.sleep(1000)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "both run\n"
        suite._end(process)
        assert process.stdout.read() == ""


def test_a_process_that_does_not_even_begin_is_not_tried_forever(tmp_path: Path) -> None:
    problems, ended = finish("sys.exit('no module named so')", tmp_path, monotonic() + 100)
    assert list(problems) == ["process"]
    assert "no module named so" in problems["process"]
    assert ended == {}


def test_a_cache_that_misses_every_kernel_is_a_finding(
    interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Job:
        def is_compiled(self) -> bool:
            return False

    monkeypatch.setattr(section.plan, "needed", lambda *_: [(Case(), Job()), (Case(), Job())])
    monkeypatch.setattr(section.plan, "fill", lambda *_: {})
    result = section._compile(interpreted)
    assert (result["needed"], result["missing"]) == (2, 2)
    assert kernel_cache.versions()["triton"] in result["finding"]
    monkeypatch.setattr(Job, "is_compiled", lambda _: True)
    assert section._compile(interpreted) == {"needed": 2, "missing": 0}


def test_a_line_that_a_process_did_not_finish_costs_no_other(tmp_path: Path) -> None:
    records = tmp_path / "records"
    report.append(records, {"step": "first"})
    with records.open("a") as file:
        file.write('{"step": "sec')
    report.append(records, {"step": "third"})
    assert [record["step"] for record in report.read(records)] == ["first", "third"]


def test_results_are_written_after_each_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"shape": "1x2x3x4x5", "direction": "forward", "provider": "am_flow bf16", "median": 2e-4, "bytes": 10**6}

    def pretend(command: list[str], records: Path, log: Path, deadline: float) -> dict[str, str]:
        report.append(records, {"step": "a step", "wrong": {"flow": "off"}, "rows": [row]})
        return {}

    monkeypatch.setattr(suite, "finish", pretend)
    run = suite.Suite(tmp_path, tmp_path / "work")
    run.section("times", [], 1)
    assert {file.name for file in tmp_path.iterdir()} == {"suite.json", "suite.md", "work"}
    assert run.failed() == ["times"]
    assert json.loads((tmp_path / "suite.json").read_text())["times"]["steps"]["a step"]["rows"] == [row]
    for text in (capsys.readouterr().out, (tmp_path / "suite.md").read_text()):
        assert "1x2x3x4x5" in text
        assert "'flow': 'off'" in text


def test_a_peer_that_fails_costs_only_its_own_figures() -> None:
    def fails(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    table = {
        "am_flow bf16": times.Peer(FP32, torch.add),
        "eager fp32": times.Peer(FP32, fails),
        "q k^T bf16": times.Peer(FP32, torch.mul),
    }
    shape = Shape(1, 2, 1, 3, 4)
    found = times._measured(machine.NoGpu(kernel_cache.Lookups()), table, shape, "forward+backward", {})
    assert ["median" in row for row in found["rows"]] == [True, False, True]
    assert "80 GB" in found["no figures"]["eager fp32"]
    assert found["wrong"] == {}


def test_ratios_are_the_time_of_the_peer_over_ours_and_missing_peers_leave_gaps() -> None:
    row = {"shape": "1x2x3x4x5", "direction": "forward", "bytes": 2_000_000, "bound": 1e-4}
    rows = [
        {**row, "provider": "am_flow bf16", "median": 2e-4},
        {**row, "provider": "SDPA bf16", "median": 3e-4},
        {"shape": "1x2x3x4x5", "direction": "forward", "provider": "eager fp32", "reason": "out of memory"},
    ]
    assert report.time_table(rows, "forward").rows == [["1x2x3x4x5", "200", "50%", "1.50x", "", "2.0"]]
    failed = [{"shape": "1x2x3x4x5", "direction": "forward", "provider": "am_flow bf16", "reason": "?"}, *rows[1:]]
    assert report.time_table(failed, "forward").rows == [["1x2x3x4x5", "failed", "", "", "", ""]]


@pytest.mark.parametrize(("build", "built"), [("", True), ("import sys; sys.exit('there is no nvcc')", False)])
def test_the_cuda_kernels_are_checked_where_their_library_was_built(
    build: str, built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def pretend(command: list[str], records: Path, log: Path, deadline: float) -> dict[str, str]:
        commands.append(command)
        return {}

    monkeypatch.setattr(suite, "finish", pretend)
    monkeypatch.setattr(suite, "BUILD", build)
    all_sections = suite.Suite(tmp_path, tmp_path)
    suite.run(all_sections, dry=False)
    assert ["--cuda" in command for command in commands] == [False] + [built] * (len(suite.BUDGETS) - 1)
    assert all_sections.failed() == ([] if built else ["CUDA library"])
    assert built or "there is no nvcc" in all_sections.report["CUDA library"]["failed"]["build"]


def test_no_section_gets_more_time_than_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []
    monkeypatch.setattr(suite, "finish", lambda command, records, log, deadline: deadlines.append(deadline) or {})
    monkeypatch.setattr(suite, "BUILD", "")
    monkeypatch.setattr(suite, "TOTAL", 10)
    suite.run(suite.Suite(tmp_path, tmp_path), dry=False)
    first, *others = deadlines
    assert len(others) == len(suite.BUDGETS) - 1
    assert all(deadline < first for deadline in others)


def test_what_the_suite_asks_of_a_gpu_exists_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and arguments: the calls are made on a stand-in of `torch.cuda` with the signatures of the real one."""
    cuda = mock.create_autospec(torch.cuda)
    cuda.get_device_properties.return_value = mock.Mock(
        spec=["name", "major", "minor", "multi_processor_count", "L2_cache_size"], L2_cache_size=5, name="a GPU"
    )
    cuda.get_device_capability.return_value = (9, 0)
    cuda.memory_allocated.return_value = 7
    cuda.max_memory_allocated.return_value = 60
    cuda.device_count.return_value = 2
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = machine.Gpu(kernel_cache.Lookups())
    gpu.describe()
    gpu.synchronize()
    gpu.clock(lambda: None)
    assert gpu.cache_bytes() == 5
    assert gpu.architecture() == 90
    assert gpu.others() == ["cuda:1"]
    assert gpu.peak_bytes(lambda: (torch.zeros(3),)) == 60 - 7 - 12
    results, replay = gpu.captured(lambda: (torch.ones(2),))
    assert torch.equal(results[0], torch.zeros(2))
    replay()
    gpu.another_stream()
    monkeypatch.setattr(gpu, "device", "cpu")
    assert not gpu.broken()


# ------------------------------------------------------------------------------------------------------ cache


def test_an_archive_carries_all_but_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    monkeypatch.setattr(kernel_cache, "FOLDER", folder)
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "cache" / "kernels.tar.xz")
    monkeypatch.setattr(kernel_cache, "MANIFEST", tmp_path / "cache" / "manifest.json")
    assert kernel_cache.unpack() == {}
    (folder / "KEY").mkdir(parents=True)
    for name in ("a.cubin", "a.json", "a.source"):
        (folder / "KEY" / name).write_text(name)
    packed = kernel_cache.pack(1, "a target")
    folder.rename(tmp_path / "elsewhere")
    assert kernel_cache.unpack() == packed
    assert {file.name for file in folder.rglob("*.*")} == {"a.cubin", "a.json"}


MOVED = """
import sys
from pathlib import Path
from benchmarks.gpu import checks, kernel_cache, plan, problems, stub_driver
from unittest import mock
from triton.runtime import cache

case = problems.Case((17, 17), 16)
lookups = kernel_cache.install(Path("first"))
for _, kernel in list(plan.needed([case], problems.H100, 90)):
    kernel.compile()
assert len(lookups.misses) == 4, lookups
for source in Path("first").rglob("*.source"):
    source.unlink()
Path("first").rename("second")

lookups = kernel_cache.install(Path("second"))
with mock.patch.object(cache, "triton_key", lambda: "another installation"), stub_driver.machine(90):
    plan.launch_all(case, problems.H100)
assert len(lookups.hits) == 4 and not lookups.misses, lookups
"""


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_by_another_installation_in_another_place(
    cold_python: Callable[..., Any],
) -> None:
    cold_python(MOVED, env={"TRITON_INTERPRET": None})


UNPLANNED = """
from benchmarks.gpu import kernel_cache, problems
from benchmarks.gpu.checks import solve
from benchmarks.gpu.machine import NoGpu
from benchmarks.gpu.plan import launch_all

machine = NoGpu(kernel_cache.Lookups())
with machine.ready():
    launch_all(problems.Case((17, 17), 16), problems.H100)
    machine.recorded.clear()
    for tokens in (17, 65):
        case = problems.Case((tokens, tokens), 16)
        solve(case, case.problem("cpu"), machine)
        error = machine.looked_up().get("error", "")
        assert ("am_flow_strip_kernel" in error) == (tokens == 65), (tokens, error)
"""


SMOKE = """
from importlib import import_module
from triton import JITFunction
from benchmarks.gpu import checks, kernel_cache, plan, problems
from benchmarks.gpu.machine import NoGpu

cases = [step.args[0] for _, step in checks.smoke(NoGpu(kernel_cache.Lookups()), ["triton"]) if len(step.args) == 2]
launched = {kernel.name for _, kernel in plan.needed(cases, problems.H100, 90)}
modules = ("backward", "forward", "matmul", "strip", "strip_backward")
existing = {
    name
    for module in modules
    for name, value in vars(import_module(f"amflow_kernels.impl.triton.kernels.{module}")).items()
    if isinstance(value, JITFunction) and name.startswith("am_flow_")
}
assert launched == existing, launched ^ existing
"""


def test_the_smoke_runs_every_kernel(cold_python: Callable[..., Any]) -> None:
    cold_python(SMOKE, env={"TRITON_INTERPRET": None})


@pytest.mark.slow
def test_a_dry_run_finds_kernels_that_the_plan_lacks(cold_python: Callable[..., Any]) -> None:
    """What is launched on CPU tensors is looked up by the same keys as what the plan launches without storage."""
    cold_python(UNPLANNED, env={"TRITON_INTERPRET": None})
