"""Runs every rule on every implementation that it concerns; what `conformance.SUBJECTS` says of each is done here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.arm import executed
from tests.kernels import conformance
from tests.kernels.conformance import SUBJECTS, Subject
from tests.ptx import cuda

NUMPY_WARNINGS = "ignore:.* encountered:RuntimeWarning"  # of infinities, in Triton's interpreter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises `impl` or `subject` by the implementations, and the case tables by theirs.

    ``@pytest.mark.subjects("cpu", ...)`` limits a rule to some implementations, ``@pytest.mark.operator`` to those that
    have the motion operator.
    """
    marker = metafunc.definition.get_closest_marker("subjects")
    subjects = [SUBJECTS[name] for name in (marker.args if marker else SUBJECTS)]
    if marker is None and not metafunc.module.__name__.endswith("conformance"):
        subjects = [subject for subject in subjects if subject.own_python]
    if metafunc.definition.get_closest_marker("operator"):
        subjects = [subject for subject in subjects if subject.matmul]
    if "flow_case" in metafunc.fixturenames:
        _parametrize_cases(metafunc, "flow_case", {s: conformance.flow_cases(s) for s in subjects})
    elif "matmul_case" in metafunc.fixturenames:
        _parametrize_cases(metafunc, "matmul_case", {s: conformance.matmul_cases(s) for s in subjects})
    elif "subject" in metafunc.fixturenames and "batch" not in metafunc.fixturenames:
        parameters = [pytest.param(subject, id=subject.name, marks=_marks(subject)) for subject in subjects]
        metafunc.parametrize("subject", parameters, indirect=True)


def _parametrize_cases(metafunc: pytest.Metafunc, name: str, tables: dict[Subject, list[Any]]) -> None:
    parameters = [
        pytest.param(subject, case, id=f"{subject}-{case}", marks=[*_marks(subject), *([pytest.mark.slow] * slow)])
        for subject, cases in tables.items()
        for case, slow in conformance.tiers(subject, cases)
    ]
    metafunc.parametrize(("subject", name), parameters, indirect=["subject"])


def _marks(subject: Subject) -> list[pytest.MarkDecorator]:
    interpreted = [pytest.mark.filterwarnings(NUMPY_WARNINGS)]
    marks = {"cpu": [pytest.mark.cpu], "triton": interpreted, "cuda": interpreted}
    return marks.get(subject.name, [])


@pytest.hookimpl(tryfirst=True)  # before pytest itself looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out combinations that an implementation does not take: dtypes, large shapes.

    Where an implementation runs slowly here, all but a few combinations of each rule are marked slow or exhaustive.
    """
    kept, left_out = [], []
    combinations: Counter[tuple[Any, Subject]] = Counter()
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        subject = parameters.get("subject")
        taken = not isinstance(subject, Subject) or subject.takes(parameters)
        (kept if taken else left_out).append(item)
        if taken and isinstance(subject, Subject) and not {"flow_case", "matmul_case"} & parameters.keys():
            rule = (item.function, subject)
            number = combinations[rule]
            if subject.all_combinations is not None and number >= subject.all_combinations:
                item.add_marker(pytest.mark.exhaustive)
            elif subject.plain_combinations is not None and number >= subject.plain_combinations:
                item.add_marker(pytest.mark.slow)
            combinations[rule] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture
def subject(request: pytest.FixtureRequest, cpu_kernels_run: bool) -> Iterator[Subject]:
    """The implementation under test, ready to run."""
    chosen: Subject = request.param
    if chosen.name == "cpu" and not cpu_kernels_run:
        pytest.skip("below AVX2 impl='cpu' raises, which test_cpu.py asserts")
    for fixture in chosen.fixtures:
        request.getfixturevalue(fixture)
    with chosen.context():
        yield chosen


@pytest.fixture
def impl(subject: Subject) -> str:
    """Its name."""
    return subject.name


@pytest.fixture(scope="session")
def cuda_compiled() -> None:
    """The CUDA kernels as nvcc compiles them, to be executed (tests/ptx)."""
    if cuda.nvcc() is None:
        pytest.skip("nvcc was not found: pip install nvidia-cuda-nvcc nvidia-cuda-cccl")
    cuda.load()


@pytest.fixture(scope="session")
def arm_compiled() -> None:
    """The CPU kernels for ARM, to be executed under qemu (tests/arm)."""
    reason = executed.missing()
    if reason is not None:
        pytest.skip(reason)
    executed.program()
