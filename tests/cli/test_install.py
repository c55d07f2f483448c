"""Import, first build and installation, each in cold processes.

One real compile is made for the whole file. Where a test needs an empty cache, a stand-in compiler takes the real
one's place: it notes that it ran and delivers the library compiled before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from amflow_kernels import _build, _ext

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.build

Run = Callable[..., subprocess.CompletedProcess[str]]

COMPILING = "compiling the CPU kernels"

SETUP = """
import sys, threading, warnings
import torch
from amflow_kernels import _build, _ext, am_flow, explain
torch.manual_seed(0)
q, k = torch.randn(2, 1, 3, 2, 17, 8)
expected = am_flow(q, k, impl="reference")
def check(impl):
    torch.testing.assert_close(am_flow(q, k, impl=impl), expected, rtol=0, atol=1e-6)
"""

RUNS_NATIVE = SETUP + 'check("cpu"); print("library", _ext.binary(_build.CPU))'

FALLS_BACK = (
    SETUP
    + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        check(None)
assert len(caught) == 1, [str(w.message) for w in caught]
assert caught[0].category is RuntimeWarning
told = explain(q, k)
assert told.impl == "reference"
try:
    am_flow(q, k, impl="cpu")
except RuntimeError as raised:
    error = raised
else:
    raise AssertionError("impl='cpu' ran")
for text in (str(caught[0].message), str(told), str(explain()), str(error)):
    assert REASON in text, text
"""
)


@dataclass(frozen=True)
class Compiler:
    """A stand-in for a C++ compiler, and how often it linked a library."""

    path: Path
    log: Path

    def env(self, cache: Path) -> dict[str, str | None]:
        return {"ATEN_CPU_CAPABILITY": None, "CXX": str(self.path), "XDG_CACHE_HOME": str(cache)}

    @property
    def links(self) -> int:
        return self.log.read_text().count("link") if self.log.exists() else 0


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A cache folder in which a cold process has just compiled the library for real, and what that process said."""
    cache = tmp_path_factory.mktemp("cache")
    env = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    env.update(PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(cache))
    capability = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    if subprocess.check_output(capability, env=env, text=True).strip() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2, nothing is ever compiled on it")
    result = subprocess.run(
        [sys.executable, "-c", RUNS_NATIVE], env=env, cwd=cache, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return cache, result


@pytest.fixture
def stand_in(built: tuple[Path, object], tmp_path: Path) -> Callable[..., Compiler]:
    """Makes a compiler that delivers the library of `built` after `seconds`, or else fails with exit status 1."""
    (library,) = built[0].rglob(_build.CPU.file)

    def make(name: str = "c++", seconds: float = 0, fails: bool = False) -> Compiler:
        compiler = Compiler(tmp_path / name, tmp_path / f"{name}.log")
        deliver = "echo 'deliberate failure'; exit 1" if fails else f'/bin/cp "{library}" "$out"'
        compiler.path.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in 1.0"; exit; fi
out=; for word in "$@"; do [ "$previous" = -o ] && out=$word; previous=$word; done
case " $* " in
  *" -shared "*) echo link >> "{compiler.log}"; /bin/sleep {seconds}; {deliver} ;;
  *) : > "$out" ;;
esac
""")
        compiler.path.chmod(0o755)
        return compiler

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str | None]:
    """An environment in which no compiler can be found."""
    (tmp_path / "bin").mkdir()
    return {"ATEN_CPU_CAPABILITY": None, "PATH": str(tmp_path / "bin"), "CXX": None}


def test_import_needs_only_torch(no_compiler: dict[str, str | None], cold_python: Run) -> None:
    """`import amflow_kernels` neither needs nor imports timm, Triton, ninja or a compiler, and builds nothing."""
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
    result = cold_python(code, env=no_compiler)
    assert COMPILING not in result.stderr


def test_first_call_compiles(built: tuple[Path, subprocess.CompletedProcess[str]], cold_python: Run) -> None:
    """The first call ever compiles once, says so, and keeps the library; the next process loads it at once."""
    cache, first = built
    assert first.stderr.count(COMPILING) == 1
    assert [p.name for p in cache.rglob("build_*")] == []  # no leftovers
    second = cold_python(RUNS_NATIVE, env={"ATEN_CPU_CAPABILITY": None, "XDG_CACHE_HOME": str(cache)})
    assert COMPILING not in second.stderr
    assert second.stdout == first.stdout
    assert Path(second.stdout.split()[1]).is_relative_to(cache)


def test_without_compiler(built: object, no_compiler: dict[str, str | None], cache: Path, cold_python: Run) -> None:
    """Without a compiler the reference runs with exactly one warning that names the reason; `explain` tells it too."""
    reason = "no C++ compiler found"
    cold_python(f"REASON = {reason!r}{FALLS_BACK}", env={**no_compiler, "XDG_CACHE_HOME": str(cache)})


def test_failing_compile(stand_in: Callable[..., Compiler], cache: Path, cold_python: Run) -> None:
    """A compile that fails is tried once per process, its output is in the reason, and its log is kept."""
    compiler = stand_in(fails=True)
    cold_python(f"REASON = 'deliberate failure'{FALLS_BACK}", env=compiler.env(cache))
    assert compiler.links == 1
    (log,) = cache.rglob("build.log")
    assert "deliberate failure" in log.read_text()
    assert list(cache.rglob("build_*")) == []


def test_compile_that_worked_after_one_that_failed(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    """A failure is not kept beyond its process: once the compiler works, the kernels are there."""
    compiler = stand_in(fails=True)
    cold_python(f"REASON = 'deliberate failure'{FALLS_BACK}", env=compiler.env(cache))
    compiler = stand_in()
    cold_python(RUNS_NATIVE, env=compiler.env(cache))
    assert compiler.links == 2


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_unwritable_cache(variable: str, stand_in: Callable[..., Compiler], cache: Path, cold_python: Run) -> None:
    """If the cache folder can't be written, a private temporary one is used, and the user is told."""
    compiler, file, temporary = stand_in(), cache / "file", cache / "tmp"
    file.write_text("")
    temporary.mkdir()
    env = {**compiler.env(file), "TMPDIR": str(temporary)}
    if variable == "HOME":
        env.update(XDG_CACHE_HOME=None, HOME=str(file))
    result = cold_python(RUNS_NATIVE, env=env)
    assert "can't write to" in result.stderr
    assert Path(result.stdout.split()[1]).is_relative_to(temporary)
    assert not list(temporary.glob("amflow_kernels*"))  # nothing is left behind


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "no checksum", "no library"])
def test_damaged_library_is_rebuilt(
    damage: str,
    built: tuple[Path, object],
    stand_in: Callable[..., Compiler],
    cache: Path,
    cold_python: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged library in the cache is compiled again, never loaded."""
    compiler = stand_in()
    monkeypatch.setenv("CXX", str(compiler.path))
    folder = cache / "amflow_kernels" / _build.build_key(_build.CPU)
    folder.mkdir(parents=True)
    library, checksum = folder / _build.CPU.file, folder / f"{_build.CPU.file}.sha256"
    (whole,) = built[0].rglob(_build.CPU.file)
    _ext.install(whole, library)
    content = bytearray(whole.read_bytes())
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "other bytes":
        content[len(content) // 2] ^= 0xFF
        library.write_bytes(content)
    else:
        (checksum if damage == "no checksum" else library).unlink()
    cold_python(RUNS_NATIVE, env=compiler.env(cache))
    assert compiler.links == 1
    assert library.read_bytes() == whole.read_bytes()
    assert _ext._is_whole(library)


@pytest.mark.parametrize("library", [_build.CPU, _build.CUDA], ids=lambda library: library.name)
def test_source_key(library: _build.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key changes with any source of the library, and with nothing else."""
    sources = tmp_path / "csrc"
    shutil.copytree(_build.source_dir(), sources)
    key = _build.source_key(library)
    monkeypatch.setattr(_build, "source_dir", lambda: sources)
    assert _build.source_key(library) == key  # where the sources lie does not matter
    own = [path for name in library.sources for path in ({sources / name} | {*(sources / name).rglob("*")})]
    for path in (p for p in sources.rglob("*") if p.is_file()):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert (_build.source_key(library) != key) == (path in own and path.suffix in (".cpp", ".cu", ".h"))
        path.write_bytes(before)
    assert {source for source, _ in library.objects.values()} <= {str(path.relative_to(sources)) for path in own}


def test_build_key(stand_in: Callable[..., Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    """The key changes with the sources, with the compiler and with torch."""
    keys = [_build.build_key(_build.CPU)]
    with monkeypatch.context() as patch:
        patch.setattr(_build, "source_key", lambda library: "others")
        keys.append(_build.build_key(_build.CPU))
    assert _build.build_key(_build.CPU) == keys[0]
    monkeypatch.setenv("CXX", str(stand_in("c++").path))
    keys.append(_build.build_key(_build.CPU))
    monkeypatch.setattr(_build.torch, "__version__", "2.99.0")
    keys.append(_build.build_key(_build.CPU))
    assert len(set(keys)) == 4


def test_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, and the remedy: where a package is built ahead of time, ninja may be missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(_build.BuildError, match="pip install ninja"):
        _build.compile_library(_build.CPU, tmp_path)


def test_racing_processes(stand_in: Callable[..., Compiler], cache: Path) -> None:
    """Processes that start together on an empty cache compile once; the others wait, and all get the right flow."""
    compiler = stand_in(seconds=2)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **compiler.env(cache)}
    env = {name: value for name, value in env.items() if value is not None}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUNS_NATIVE], env=env, cwd=cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert compiler.links == 1
    assert sum(COMPILING in stderr.decode() for _, stderr in outputs) == 1
    assert len({stdout for stdout, _ in outputs}) == 1


def test_racing_threads(stand_in: Callable[..., Compiler], cache: Path, cold_python: Run) -> None:
    """Threads whose first calls come at once compile once, and all get the right flow."""
    compiler = stand_in(seconds=1)
    code = (
        SETUP
        + """
failures, start = [], threading.Barrier(8)
def work():
    try:
        start.wait()
        check("cpu")
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
"""
    )
    result = cold_python(code, env=compiler.env(cache))
    assert compiler.links == 1
    assert result.stderr.count(COMPILING) == 1


def test_killed_while_compiling(stand_in: Callable[..., Compiler], cache: Path, cold_python: Run) -> None:
    """A process killed in the middle of compiling leaves neither a lock nor half a library behind."""
    compiler = stand_in(seconds=30)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **compiler.env(cache)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUNS_NATIVE],
        env={name: value for name, value in env.items() if value is not None},
        cwd=cache,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while compiler.links == 0:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()  # the compiler it started lives on: it must not hold the lock
        process.wait()
        compiler = stand_in()  # at the same path, so with the same key
        cold_python(RUNS_NATIVE, env=compiler.env(cache))
        assert compiler.links == 2
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout, so that installing from it leaves nothing behind here."""
    here = {distribution.name for distribution in importlib.metadata.distributions()}
    if not {"pip", "setuptools"} <= here:
        pytest.skip("installing needs pip and setuptools, which this environment does not have")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.sha256", "build", "*.egg-info", "tests")
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=leave_out)


def pip_install(checkout: Path, target: Path, env: dict[str, str | None]) -> None:
    variables = {**os.environ, **env}
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "install", str(checkout), *options, "--target", str(target)],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def package_files(folder: Path, models: str = ".") -> set[str]:
    wanted = (".py", ".typed", ".yaml")
    packages = ((folder, "amflow_kernels"), (folder / models, "amflow_models"))
    return {str(p.relative_to(top)) for top, name in packages for p in (top / name).rglob("*") if p.suffix in wanted}


def cpp_sources(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".cpp", ".h")}


def test_installed_package(built: tuple[Path, object], checkout: Path, tmp_path: Path, cold_python: Run) -> None:
    """A plain install carries every module, the C++ sources and nothing else, and runs with a library built before."""
    target = tmp_path / "installed"
    pip_install(checkout, target, {})
    assert package_files(target) == package_files(ROOT, "models")
    assert cpp_sources(target / "amflow_kernels" / "csrc") == cpp_sources(ROOT / "csrc")
    assert list(target.rglob("*.so")) == []
    top = {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")}
    assert top <= {"amflow_kernels", "amflow_models", "bin"}
    code = RUNS_NATIVE + '; import amflow_kernels; print("package", amflow_kernels.__file__)'
    result = cold_python(code, env={"ATEN_CPU_CAPABILITY": None, "XDG_CACHE_HOME": str(built[0])}, path=target)
    assert COMPILING not in result.stderr
    assert Path(result.stdout.split()[-1]).is_relative_to(target)


def test_installed_with_library(
    stand_in: Callable[..., Compiler],
    no_compiler: dict[str, str | None],
    checkout: Path,
    cache: Path,
    tmp_path: Path,
    cold_python: Run,
) -> None:
    """AMFLOW_BUILD=1 compiles while installing; the package then runs where there is no compiler and no cache."""
    compiler, target = stand_in(), tmp_path / "installed"
    pip_install(checkout, target, {**compiler.env(cache), "AMFLOW_BUILD": "1"})
    assert compiler.links == 1
    result = cold_python(RUNS_NATIVE, env={**no_compiler, "XDG_CACHE_HOME": str(cache)}, path=target)
    assert Path(result.stdout.split()[1]).is_relative_to(target)
    assert COMPILING not in result.stderr
    assert list(cache.iterdir()) == []
