"""Which package imports which: the kernels need only torch, and the models import their names lazily."""

from __future__ import annotations

import ast
import importlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import amflow_models
import pytest

ROOT = Path(__file__).resolve().parents[2]


def imported_modules(source: str) -> Iterator[str]:
    """The modules that a file imports anywhere, also inside functions, and all strings, which may name some."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # perhaps of import_module("...")


def test_kernels_never_import_the_models() -> None:
    sources = [*(ROOT / "amflow_kernels").rglob("*.py")]
    assert len(sources) > 20
    importing = {
        str(path.relative_to(ROOT))
        for path in sources
        for module in imported_modules(path.read_text())
        if module.split(".")[0] == "amflow_models"
    }
    assert importing == set()


@pytest.mark.parametrize("source", ["import amflow_models.cli", "def f():\n from amflow_models import x",
                                    "from importlib import import_module as i; i('amflow_models.train')"])  # fmt: skip
def test_the_rule_about_imports_sees_every_kind_of_import(source: str) -> None:
    assert any(module.split(".")[0] == "amflow_models" for module in imported_modules(source))


def test_every_exported_name_of_the_models_is_that_of_its_module() -> None:
    tree = ast.parse(Path(str(amflow_models.__file__)).read_text())
    imports = {  # those that type checkers see
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("amflow_models.")
        for alias in node.names
    }
    assert sorted(imports) == sorted(amflow_models.__all__) == sorted(amflow_models._MODULES)
    for name, module in imports.items():
        assert amflow_models._MODULES[name] == module.rpartition(".")[2]
        assert getattr(amflow_models, name) is getattr(importlib.import_module(module), name)
        assert name in dir(amflow_models)


def test_unknown_name_of_the_models_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'amflow_models' has no attribute 'adaptor'"):
        amflow_models.adaptor  # noqa: B018 -- the access raises
    with pytest.raises(ImportError, match="cannot import name 'adaptor'"):
        from amflow_models import adaptor  # noqa: F401


def test_importing_the_models_imports_nothing_else(
    cold_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = "import sys; import amflow_models; assert not {'torch', 'timm', 'amflow_kernels'} & set(sys.modules)"
    cold_python(code, path=ROOT / "models")


def test_kernels_can_be_imported_without_triton_timm_and_a_compiler(
    tmp_path: Path, cold_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`import amflow_kernels` neither needs nor imports an optional package, and builds nothing."""
    code = """
import sys
import torch
others = {"timm", "transformers", "ninja", "av", "onnx", "matplotlib"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {*others, "triton"} or name == "torch.utils.cpp_extension":
            raise ImportError(f"{name} was imported")
refuse = Refuse()
sys.meta_path.insert(0, refuse)
import amflow_kernels
sys.meta_path.remove(refuse)  # PyTorch itself looks for many of them when an op is called
q, k = torch.randn(2, 1, 3, 2, 17, 8)
assert amflow_kernels.am_flow(q, k, impl="reference").shape == (1, 2, 2, 17)
assert not others & set(sys.modules)
"""
    (tmp_path / "bin").mkdir()
    result = cold_python(code, env={"ATEN_CPU_CAPABILITY": None, "PATH": str(tmp_path / "bin"), "CXX": None})
    assert "compiling" not in result.stderr
