"""Fixtures of all tests: cold processes, a quicker interpreter of Triton, and a clean state before each test."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on CPU tensors

from amflow_kernels import calls, dispatch
from amflow_kernels.impl import cpu

pytest.register_assert_rewrite("tests.kernels.conformance")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Each test starts with PyTorch's thread count as it was, with no warning given yet and no call remembered."""
    threads = torch.get_num_threads()
    warned = set(dispatch._warned)
    dispatch._warned.clear()
    calls._known.clear()
    cpu._vector_bits.cache_clear()
    yield
    torch.set_num_threads(threads)
    dispatch._warned.clear()
    dispatch._warned.update(warned)
    cpu._vector_bits.cache_clear()


@pytest.fixture(autouse=True)
def _assets_of_demo_tests(request: pytest.FixtureRequest) -> None:
    """They are downloaded before a test, which then sees no message about it."""
    if request.node.get_closest_marker("demo"):
        request.getfixturevalue("assets")


@pytest.fixture(scope="session")
def assets() -> None:
    """The weights and clips of the demo are at hand."""
    from amflow_models.cli import assets, offline

    for asset in (offline.WEIGHTS, *offline.CLIPS.values()):
        assets.asset_file(asset)


@pytest.fixture(autouse=True, scope="session")
def _own_inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """PyTorch's compile cache would hand AVX-512 code to a later run under ATEN_CPU_CAPABILITY=default."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def cpu_kernels_run() -> bool:
    """Whether the CPU kernels must run: only the CPU decides, so that a broken build can't hide."""
    capability = torch.backends.cpu.get_cpu_capability()
    return platform.machine() in ("aarch64", "arm64") or capability in ("AVX2", "AVX512")


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter patches `triton.language` in every call of a device function, half of its time.

    Here it does so for the kernel and the first call from each module, until the launch ends and takes it back.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch_language(function)

    def launch_anew(*args: Any, **options: Any) -> None:
        patched.clear()
        launch(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(scope="session")
def hardware_products() -> Iterator[None]:
    """Triton's interpreter multiplies bfloat16 and TF32, and rounds to bfloat16, as a GPU does.

    By itself it multiplies the bit patterns of bfloat16 as integers, truncates to bfloat16, and ignores TF32.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir

    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(x).bfloat16().view(torch.int16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)
        return convert(x, source, target, rounding_mode)

    def operand(x: Any, precision: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return rounded(x.data, tl.bfloat16, tl.float32, None)
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            return (x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return x.data

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(operand(a, precision), operand(b, precision), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture
def cold_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh Python process, in an empty folder, with this checkout on the path."""

    def run(
        code: str,
        *,
        env: Mapping[str, str | None] | None = None,
        path: Path = ROOT,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        variables = {**os.environ, "PYTHONPATH": str(path), **(env or {})}
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    return run
