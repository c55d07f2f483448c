"""Imports go one way, and each implementation stands by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.conformance import ROOT

PACKAGE = ROOT / "amflow_kernels"
SHARED = "amflow_kernels.impl.base"

# Each may import those that come before it.
LAYERS = ("problem", "_build", "_ext", "impl", "dispatch", "ops", "api", "attention", "stream", "motion", "testing")


def imports(file: Path) -> Iterator[str]:
    """The modules and names of the package that a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(layer: str) -> list[Path]:
    folder = PACKAGE / layer
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer}.py"]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_module_imports_a_later_layer(layer: str) -> None:
    later = {f"amflow_kernels.{name}" for name in (*LAYERS[LAYERS.index(layer) + 1 :], "integrations", "doctor")}
    for file in files_of(layer):
        found = {".".join(name.split(".")[:2]) for name in imports(file)}
        assert not found & later, file


def test_implementations_do_not_import_each_other() -> None:
    for file in files_of("impl"):
        own = file.relative_to(PACKAGE / "impl").parts[0].removesuffix(".py")
        for name in imports(file):
            if name.startswith("amflow_kernels.impl."):
                assert name.startswith((SHARED, f"amflow_kernels.impl.{own}")), f"{file} imports {name}"


def test_ops_name_no_implementation() -> None:
    """Choosing one is the business of dispatch.py."""
    words = {
        node.value for node in ast.walk(ast.parse((PACKAGE / "ops.py").read_text())) if isinstance(node, ast.Constant)
    }
    assert not words & {"reference", "cpu", "triton", "cuda"}


def test_no_test_module_imports_another() -> None:
    """But for the one that runs the rules of test_conformance.py on executed kernels."""
    for file in set((ROOT / "tests").rglob("*.py")) - {ROOT / "tests" / "ptx" / "test_conformance.py"}:
        modules = {part for name in imports(file) for part in name.split(".")}
        assert not {part for part in modules if part.startswith("test_")}, file
