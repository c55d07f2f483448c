"""``amflow doctor`` states what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from amflow_kernels import _build, _ext, doctor
from amflow_kernels.dispatch import IMPLEMENTATIONS

H200 = (9, 0)


def row(name: str) -> tuple[str, str, str]:
    """What the table of kernels says of an implementation: present, usable here, has run on this kind of GPU."""
    (columns,) = (columns for kernels, *columns in doctor.kernel_rows() if kernels == name)
    return tuple(columns)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch finds a GPU, on which nothing can be run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: H200)
    monkeypatch.setattr(_ext, "load", lambda library: "a deliberate failure\nwith a second line")


@pytest.mark.cpu
def test_the_library_of_the_cpu_kernels_is_named_with_its_instruction_set(cpu_kernels_run: bool) -> None:
    present, usable, ran = row("cpu")
    assert ran == "-"
    if cpu_kernels_run:
        assert usable == "yes"
        assert re.match(r".*amflow_native\S*\.so, (avx|neon)", present)
    else:
        assert "AVX2" in usable


def test_without_a_gpu_its_kernels_are_present_but_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("triton", "cuda"):
        present, usable, ran = row(name)
        assert present
        assert (usable, ran) == ("no: PyTorch finds no GPU", "-")


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_table_says_why_kernels_are_not_usable_in_one_line() -> None:
    assert row("cuda")[1] == "no: a deliberate failure"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("ran_on", "answer"), [(set(), "no (sm_90)"), ({80}, "no (sm_90)"), ({80, 90}, "yes (sm_90)")])
def test_kernels_have_run_on_a_gpu_if_a_committed_result_of_that_kind_shows_it(
    ran_on: set[int], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(IMPLEMENTATIONS["triton"]), "ran_on", frozenset(ran_on))
    assert row("triton")[2] == answer


@pytest.mark.parametrize("installed", [False, True])
def test_the_version_of_every_optional_package_is_given(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the extras for users name, none twice; extras for development are left out."""

    def version(name: str) -> str:
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    requirements = ["torch>=2.11", "timm>=1 ; extra == 'models'", "timm ; extra == \"demo\"", "ruff ; extra == 'dev'",
                    "amflow-kernels[models] ; extra == 'demo'"]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(importlib.metadata, "version", version)
    there, missing = doctor.package_lines()
    if installed:
        assert (there, missing) == ("installed: timm 1.2, triton 1.2", "not installed: none")
    else:
        assert (there, missing) == ("installed: none", "not installed: timm, triton")


def test_a_package_that_is_not_installed_itself_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert "amflow-kernels itself is not installed" in "\n".join(doctor.package_lines())


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "aarch64, implementer 0x41, part 0xd40"),
    ],
    ids=["x86", "arm"],
)
def test_the_processor_is_named_as_linux_names_it(cpuinfo: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM by numbers, as there is no name."""
    monkeypatch.setattr(Path, "read_text", lambda _: cpuinfo)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert doctor.cpu_model() == expected


def test_compilers_and_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "kernel_rows", lambda: [])
    report = doctor.report()
    assert re.search(r"^compiler: none: \$CXX, .*no_such_compiler, was not found$", report, re.M)
    assert re.search(r"^nvcc: none: ", report, re.M)
    assert f"cache of amflow_kernels: {_ext.cache_dir()}, not made yet" in report
    assert f"CXX={tmp_path / 'no_such_compiler'}" in report


def test_a_library_that_is_not_built_is_present_as_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_states", {})
    monkeypatch.setattr(_ext, "ahead_of_time", lambda *_: Path("/no/such/file"))
    assert _ext.presence(_build.CPU) == f"not built yet, sources in {_build.source_dir() / 'cpu'}"
