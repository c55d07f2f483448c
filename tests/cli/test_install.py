"""First build and installation, in cold processes.

Most tests replace the compiler by a stand-in, which records that it ran and delivers the library that the test process
itself uses. One test compiles for real.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import amflow_kernels
from amflow_kernels import _build, _ext
from amflow_kernels.impl.cpu import Cpu

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
explanation = explain(q, k)
assert explanation.impl == "chunked"
try:
    am_flow(q, k, impl="cpu")
except RuntimeError as raised:
    error = raised
else:
    raise AssertionError("impl='cpu' ran")
for text in (str(caught[0].message), str(explanation), str(explain()), str(error)):
    assert REASON in text, text
"""
)


@dataclass(frozen=True)
class Compiler:
    """A stand-in for a C++ compiler, which counts the libraries that it links."""

    path: Path
    log: Path

    def env(self, cache: Path) -> dict[str, str | None]:
        return {"ATEN_CPU_CAPABILITY": None, "CXX": str(self.path), "XDG_CACHE_HOME": str(cache)}

    @property
    def links(self) -> int:
        return self.log.read_text().count("link") if self.log.exists() else 0


@pytest.fixture(scope="session")
def library(cpu_kernels_run: bool) -> Path:
    """The compiled library that this process uses."""
    if not cpu_kernels_run:
        pytest.skip("there are no kernels for this CPU, nothing is ever compiled on it")
    assert _ext.load(_build.CPU) is None
    file = _ext.binary(_build.CPU)
    assert file is not None
    return file


@pytest.fixture
def stand_in(library: Path, tmp_path: Path) -> Callable[..., Compiler]:
    """Makes a compiler that delivers `library` after `seconds`, or else fails with exit status 1."""

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


def check_first_call(run: Callable[[], subprocess.CompletedProcess[str]], cache: Path) -> None:
    """The first process compiles once, says so, and keeps the library; the second one loads it."""
    first = run()
    assert first.stderr.count(COMPILING) == 1
    files = [*_build.CPU.objects, _build.CPU.file]
    done = re.findall(rf"^amflow_kernels: \[(\d+)/{len(files)}\] (\S+)$", first.stderr, re.M)  # one line for each
    assert [int(number) for number, _ in done] == [*range(1, len(files) + 1)]
    assert sorted(name for _, name in done) == sorted(files)
    assert [p.name for p in cache.rglob("build_*")] == []  # no leftovers
    second = run()
    assert COMPILING not in second.stderr
    assert second.stdout == first.stdout
    assert Path(second.stdout.split()[1]).is_relative_to(cache)


def test_first_call_compiles_and_the_next_process_loads(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    compiler = stand_in()
    check_first_call(lambda: cold_python(RUNS_NATIVE, env=compiler.env(cache)), cache)
    assert compiler.links == 1


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_first_call_compiles_with_the_real_compiler(cache: Path, cold_python: Run) -> None:
    env = {"ATEN_CPU_CAPABILITY": None, "XDG_CACHE_HOME": str(cache)}
    check_first_call(lambda: cold_python(RUNS_NATIVE, env=env), cache)


@pytest.mark.usefixtures("library")
def test_without_a_compiler_the_reference_runs_with_one_warning_that_names_the_reason(
    no_compiler: dict[str, str | None], cache: Path, cold_python: Run
) -> None:
    """`explain` and the error of ``impl="cpu"`` name the reason, too."""
    reason = "no C++ compiler found"
    cold_python(f"REASON = {reason!r}{FALLS_BACK}", env={**no_compiler, "XDG_CACHE_HOME": str(cache)})


def test_a_failing_compile_is_tried_once_per_process_and_its_log_is_kept(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    compiler = stand_in(fails=True)
    cold_python(f"REASON = 'deliberate failure'{FALLS_BACK}", env=compiler.env(cache))
    assert compiler.links == 1
    (log,) = cache.rglob("build.log")
    assert "deliberate failure" in log.read_text()
    assert list(cache.rglob("build_*")) == []


@pytest.mark.slow
def test_a_failing_compile_is_tried_again_by_the_next_process(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    compiler = stand_in(fails=True)
    cold_python(f"REASON = 'deliberate failure'{FALLS_BACK}", env=compiler.env(cache))
    compiler = stand_in()
    cold_python(RUNS_NATIVE, env=compiler.env(cache))
    assert compiler.links == 2


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", pytest.param("HOME", marks=pytest.mark.slow)])
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    variable: str, stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    compiler, file, temporary = stand_in(), cache / "file", cache / "tmp"
    file.write_text("")
    temporary.mkdir()
    env = {**compiler.env(file), "TMPDIR": str(temporary)}
    if variable == "HOME":
        env.update(XDG_CACHE_HOME=None, HOME=str(file))
    result = cold_python(RUNS_NATIVE, env=env)
    assert "can't write to" in result.stderr
    assert Path(result.stdout.split()[1]).is_relative_to(temporary)
    assert not list(temporary.glob("amflow_kernels*"))  # deleted at the end


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "no checksum", "no library"])
def test_damaged_library_in_the_cache_is_compiled_again(
    damage: str, library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[_build.Library] = []

    def compile_library(native: _build.Library, *_: object) -> Path:
        compiled.append(native)
        return library

    monkeypatch.setattr(_build, "compile_library", compile_library)
    cached, checksum = cache / _build.CPU.file, cache / f"{_build.CPU.file}.sha256"
    _ext.install(library, cached)
    content = bytearray(library.read_bytes())
    if damage == "truncated":
        cached.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        cached.write_bytes(b"")
    elif damage == "other bytes":
        content[len(content) // 2] ^= 0xFF
        cached.write_bytes(content)
    else:
        (checksum if damage == "no checksum" else cached).unlink()
    for _ in range(2):  # the second time it is whole
        assert _ext._cached(_build.CPU, cache) == cached
    assert compiled == [_build.CPU]
    assert cached.read_bytes() == library.read_bytes()
    assert _ext._is_whole(cached)


@pytest.mark.parametrize("native", [_build.CPU, _build.CUDA], ids=lambda native: native.name)
def test_source_key_changes_with_any_source_of_the_library_and_with_nothing_else(
    native: _build.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(_build.source_dir(), sources)
    key = _build.source_key(native)
    monkeypatch.setattr(_build, "source_dir", lambda: sources)
    assert _build.source_key(native) == key  # their folder does not matter
    own = [path for name in native.sources for path in ({sources / name} | {*(sources / name).rglob("*")})]
    for path in (p for p in sources.rglob("*") if p.is_file()):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert (_build.source_key(native) != key) == (path in own and path.suffix in (".cpp", ".cu", ".h"))
        path.write_bytes(before)
    assert {source for source, _ in native.objects.values()} <= {str(path.relative_to(sources)) for path in own}


def test_build_key_changes_with_the_sources_the_compiler_torch_and_the_machine(
    stand_in: Callable[..., Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [_build.build_key(_build.CPU)]
    with monkeypatch.context() as patch:
        patch.setattr(_build, "source_key", lambda _: "others")
        keys.append(_build.build_key(_build.CPU))
    with monkeypatch.context() as patch:  # a compiler of the same name and version on another kind of machine
        patch.setattr(_build, "MACHINE", "aarch64" if _build.MACHINE != "aarch64" else "x86_64")
        keys.append(_build.build_key(_build.CPU))
    assert _build.build_key(_build.CPU) == keys[0]
    monkeypatch.setenv("CXX", str(stand_in("c++").path))
    keys.append(_build.build_key(_build.CPU))
    monkeypatch.setattr(_build.torch, "__version__", "2.99.0")
    keys.append(_build.build_key(_build.CPU))
    assert len(set(keys)) == 5


@pytest.mark.parametrize(
    ("native", "platform", "machine", "error"),
    [
        (_build.CPU, "linux", "aarch64", None),
        (_build.CPU, "darwin", "aarch64", None),
        (_build.CPU, "darwin", "x86_64", "the CPU kernels are built on Linux and on macOS with Apple silicon only"),
        (_build.CPU, "win32", "AMD64", "the CPU kernels are built on Linux and on macOS with Apple silicon only"),
        (_build.CUDA, "darwin", "aarch64", "the CUDA kernels are built on Linux only, this is darwin on aarch64"),
    ],
)
def test_platforms_without_a_build_are_told(
    native: _build.Library, platform: str, machine: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(_build, "MACHINE", machine)
    with pytest.raises(_build.BuildError, match=error) if error else nullcontext():
        _build.build_key(native)


def test_every_machine_has_its_own_instruction_sets() -> None:
    """One compiled file per source and instruction set, and the bindings; nothing for a machine without kernels."""
    objects = {machine: set(_build.cpu_library(machine).objects) for machine in ("x86_64", "aarch64", "ppc64le")}
    assert "am_flow_avx512_bf16.o" in objects["x86_64"]
    assert "matmul_neon_bf16.o" in objects["aarch64"]
    assert objects["x86_64"] & objects["aarch64"] == objects["ppc64le"] == {"bindings.o"}


@pytest.mark.parametrize(
    ("machine", "capability", "reason"),
    [
        ("aarch64", "DEFAULT", None),
        ("aarch64", "SVE256", None),
        ("x86_64", "DEFAULT", "the kernels need AVX2, AVX-512 or a 64-bit ARM CPU"),
    ],
)
def test_arm_needs_no_capability_of_torch(
    machine: str, capability: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NEON is there whatever torch calls its capability; x86 without AVX2 is told what is needed."""
    monkeypatch.setattr(_build, "MACHINE", machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_ext, "load", lambda library: None)
    why_not = Cpu().unavailable()
    assert why_not is None if reason is None else reason in str(why_not)


def test_missing_ninja_is_an_error_that_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was built ahead of time may have been installed without it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(_build.BuildError, match="pip install ninja"):
        _build.compile_library(_build.CPU, tmp_path)


def test_processes_that_start_together_compile_once(stand_in: Callable[..., Compiler], cache: Path) -> None:
    """On an empty cache one process compiles, the other waits, and both compute the right flow."""
    compiler = stand_in(seconds=2)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **compiler.env(cache)}
    env = {name: value for name, value in env.items() if value is not None}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUNS_NATIVE], env=env, cwd=cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert compiler.links == 1
    assert sum(COMPILING in stderr.decode() for _, stderr in outputs) == 1
    assert len({stdout for stdout, _ in outputs}) == 1


@pytest.mark.slow
def test_threads_whose_first_calls_coincide_compile_once(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
    """All of them compute the right flow."""
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


@pytest.mark.slow
def test_a_process_killed_while_compiling_leaves_neither_a_lock_nor_a_library(
    stand_in: Callable[..., Compiler], cache: Path, cold_python: Run
) -> None:
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
    """A copy of this checkout, which takes the files that installing from it creates."""
    here = {distribution.name for distribution in importlib.metadata.distributions()}
    if not {"pip", "setuptools"} <= here:
        pytest.skip("installing needs pip and setuptools, which this environment does not have")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.sha256", "build", "*.egg-info", "tests")
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=leave_out)


def pip(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> None:
    """Runs pip without network and without installing dependencies."""
    variables = {**os.environ, **(env or {})}
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments), "--no-deps", "--no-index"],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def build(hook: str, source: Path, target: Path) -> Path:
    """What a hook of the build backend, such as ``build_sdist``, makes in `target`."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return target / result.stdout.splitlines()[-1]


def package_files(folder: Path, models: str = ".") -> set[str]:
    wanted = (".py", ".typed", ".yaml")
    packages = ((folder, "amflow_kernels"), (folder / models, "amflow_models"))
    return {str(p.relative_to(top)) for top, name in packages for p in (top / name).rglob("*") if p.suffix in wanted}


def cpp_sources(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".cpp", ".h")}


def test_installed_package_contains_every_module_and_source_and_nothing_else(
    stand_in: Callable[..., Compiler], checkout: Path, cache: Path, tmp_path: Path, cold_python: Run
) -> None:
    """It compiles the sources that it contains."""
    compiler, target = stand_in(), tmp_path / "installed"
    pip("install", checkout, "--no-build-isolation", "--target", target)
    assert package_files(target) == package_files(ROOT, "models")
    assert cpp_sources(target / "amflow_kernels" / "csrc") == cpp_sources(ROOT / "csrc")
    assert list(target.rglob("*.so")) == []
    top = {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")}
    assert top <= {"amflow_kernels", "amflow_models", "bin"}
    code = RUNS_NATIVE + '; import amflow_kernels; print("package", amflow_kernels.__file__)'
    result = cold_python(code, env=compiler.env(cache), path=target)
    assert compiler.links == 1
    assert Path(result.stdout.split()[-1]).is_relative_to(target)


@pytest.mark.slow
def test_package_built_ahead_of_time_needs_neither_a_compiler_nor_a_cache(
    stand_in: Callable[..., Compiler],
    no_compiler: dict[str, str | None],
    checkout: Path,
    cache: Path,
    tmp_path: Path,
    cold_python: Run,
) -> None:
    """AMFLOW_BUILD=1 compiles while building the wheel, which serves every version of Python on this platform."""
    compiler, target = stand_in(), tmp_path / "installed"
    env = {**compiler.env(cache), "AMFLOW_BUILD": "1"}
    pip("wheel", checkout, "--no-build-isolation", "--wheel-dir", tmp_path, env=env)
    assert compiler.links == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    pip("install", wheel, "--target", target)
    result = cold_python(RUNS_NATIVE, env={**no_compiler, "XDG_CACHE_HOME": str(cache)}, path=target)
    assert Path(result.stdout.split()[1]).is_relative_to(target)
    assert COMPILING not in result.stderr
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_repository_and_nothing_else(tmp_path: Path) -> None:
    """So that it can be built, tested and documented. Its tests can be collected, with all that they import."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout, so that nothing says which files belong to it")
    files = {name for name in listed.stdout.split("\0") if name}
    checkout, unpacked = tmp_path / "checkout", tmp_path / "unpacked"
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    shutil.unpack_archive(build("build_sdist", checkout, tmp_path / "dist"), unpacked)
    (folder,) = unpacked.iterdir()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found - files if "egg-info" not in name} == {"PKG-INFO", "setup.cfg"}
    assert files <= found
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout


@pytest.mark.parametrize("source", [None, "https://example.org/us/amflow"])
def test_the_readmes_links_are_absolute_where_the_publisher_has_set_an_address(
    source: str | None, checkout: Path, tmp_path: Path
) -> None:
    """Pictures show on a package index only then; no address is made up."""
    readme = "![picture](docs/demo.png) [page](docs/maths.md#definition) [here](#limits) [there](https://example.com)"
    (checkout / "README.md").write_text(readme)
    if source is not None:
        with (checkout / "pyproject.toml").open("a") as project:
            project.write(f'\n[project.urls]\nSource = "{source}"\n')
    folder = build("prepare_metadata_for_build_wheel", checkout, tmp_path / "metadata")
    text = (folder / "METADATA").read_text()
    if source is None:
        assert readme in text
        assert "Project-URL" not in text
    else:
        version = amflow_kernels.__version__
        links = re.findall(r"\]\((.*?)\)", text.splitlines()[-1])
        assert links == [
            f"{source}/raw/v{version}/docs/demo.png", f"{source}/blob/v{version}/docs/maths.md#definition", "#limits",
            "https://example.com",
        ]  # fmt: skip
        assert f"Project-URL: Source, {source}" in text


def distributions_of(name: str) -> set[str]:
    """A distribution and all that it requires here, by name."""
    names: set[str] = set()
    waiting = [name]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in names:
            continue
        names.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return names


def link_distribution(name: str, target: Path) -> None:
    """Links the files of an installed distribution into another site-packages folder."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        link = target / top
        if not link.exists():
            link.symlink_to(str(distribution.locate_file(top)))


@pytest.fixture
def torch_environment(checkout: Path, tmp_path: Path) -> Path:
    """The programs of an environment that contains torch with its requirements, this project's wheel and nothing else.

    torch is not installed again: its folder is linked.
    """
    pip("wheel", checkout, "--no-build-isolation", "--wheel-dir", tmp_path)
    (wheel,) = tmp_path.glob("amflow_kernels-*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for name in distributions_of("torch") - {"triton"}:
        link_distribution(name, site_packages)
    pip("--python", environment / "bin" / "python", "install", wheel)
    return environment / "bin"


@pytest.mark.slow
def test_wheel_with_only_torch_runs_the_doctor_and_names_missing_extras(torch_environment: Path, cache: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["XDG_CACHE_HOME"] = str(cache)

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(torch_environment / program), *words]
        return subprocess.run(command, env=env, cwd=cache, capture_output=True, text=True, timeout=300, check=False)

    installed = run("python", "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))")
    assert not {"timm", "einops", "safetensors", "rich", "av", "triton"} & set(installed.stdout.split())
    for program, *words in (["amflow", "doctor"], ["python", "-m", "amflow_kernels"]):
        report = run(program, *words)
        assert report.returncode == 0, report.stderr
        assert re.search(r"^not installed: .*\btimm\b", report.stdout, re.M)
        assert re.search(r"^cpu +\S", report.stdout, re.M)
    usage = run("amflow", "--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    for extra, line in (
        ("demo", "demo"),
        ("demo", "visualize bikes"),
        ("train", "train --config k400_vitb_am12"),
        ("train", "evaluate --config k400_vitb_am12"),
        ("train", "data check list.txt --kind mmaction"),
    ):
        assert line.split()[0] in usage.stdout
        failed = run("amflow", *line.split())
        assert failed.returncode == 1, failed.stderr
        message = f"amflow: the package \\S+ is missing; it comes with: pip install 'amflow-kernels\\[{extra}\\]'"
        assert re.fullmatch(message, failed.stderr.splitlines()[-1])  # PyTorch's warning about NumPy may come before
        assert "Traceback" not in failed.stderr
