"""The commands under benchmarks and examples, and what `pytest benchmarks/` measures and leaves out."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import providers, result_files, timing
from benchmarks.providers import FORWARD, PROVIDERS, Provider
from benchmarks.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}


def test_there_are_commands() -> None:
    assert {"benchmarks.precision", "benchmarks.gpu.cuda_report", "examples.motion.draw"} <= FILES.keys()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # imported before it runs
@pytest.mark.parametrize("program", FILES)
def test_help_is_printed_and_nothing_runs(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = ast.walk(ast.parse(FILES[program].read_text()))
    calls = {node.func.attr for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    assert calls & {"parse_args", "parse_intermixed_args"}  # otherwise it would now run, for minutes or hours
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    before = {path: path.stat().st_mtime_ns for path in result_files.RESULTS.iterdir()}
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(program, run_name="__main__")
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {program.removesuffix('.__main__')} ")
    assert {path: path.stat().st_mtime_ns for path in result_files.RESULTS.iterdir()} == before


@pytest.mark.parametrize("program", FILES)
def test_a_command_that_writes_committed_files_has_an_option_for_it(program: str) -> None:
    """RESULTS is the folder of the figures, PAGE and REPORT are pages made from them."""
    source = FILES[program].read_text()
    if re.search(r"(RESULT|PAGE|REPORT)\.write_text|RESULTS /", source):
        assert "add_write(" in source


@pytest.mark.parametrize(("text", "shape"), [("1x8x12x257x64", (1, 8, 12, 257, 64)), ("2x2x1x1x8", (2, 2, 1, 1, 8))])
def test_shapes_are_read_as_they_are_written(text: str, shape: tuple[int, ...]) -> None:
    assert Shape.parse(text) == shape
    assert str(Shape.parse(text)) == text


@pytest.mark.parametrize("text", ["", "1x8x12x257", "1x8x12x257x64x1", "1x8x12x0x64", "1x8x12xNx64", "1x1x12x257x64"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"expected .*, got {text!r}"):
        Shape.parse(text)


@pytest.mark.parametrize(
    ("capability", "units", "left_out"),
    [("AVX2", True, {"sdpa_bf16"}), ("AVX512", False, {"sdpa_bf16"}), ("AVX512", True, set())],
)
def test_peers_in_bfloat16_are_left_out_on_a_cpu_without_units_for_it(
    capability: str, units: bool, left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hardware may have units that ATEN_CPU_CAPABILITY=avx2 hides. The peak is then that of float32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert {name for name, provider in PROVIDERS.items() if providers.is_left_out(provider)} == left_out
    assert left_out.isdisjoint(providers.names("am_flow", FORWARD))
    peak = torch.float32 if left_out else torch.bfloat16
    assert timing._peak_key(PROVIDERS["ours_bf16"]) == (peak, "cpu")


@pytest.mark.parametrize(("seconds_of_256", "size"), [(1e-6, 2048), (1e-3, 1024), (1e-2, 512), (1.0, 256)])
def test_the_peak_is_measured_by_the_largest_product_that_is_short_enough(
    seconds_of_256: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_mean_duration", lambda call, repeats: seconds_of_256)
    assert timing.Peak.of(torch.float32, "cpu").size == size


def test_a_peer_whose_call_takes_too_long_is_tried_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes long, too, so a slow first call is followed by a second. This library is never left out."""
    calls: list[str] = []

    def slow(shape: Shape) -> Any:
        return lambda *operands: calls.append("eager") or PROVIDERS["ours"].build(shape)(*operands)

    monkeypatch.setitem(providers.PROVIDERS, "eager", Provider("eager", "eager", slow, baseline="ours"))
    monkeypatch.setattr(timing, "names", lambda function, direction: ["ours", "eager"])
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    measured = timing.measure("am_flow", Shape(1, 2, 1, 5, 8), FORWARD, 0.0, min_rounds=2)
    assert list(measured.times) == ["ours"]
    assert list(measured.left_out) == ["eager"]
    assert len(calls) == 2


def test_ratios_say_how_many_times_as_fast_this_library_is() -> None:
    assert timing.ratio(PROVIDERS["eager"], 6.0, 2.0) == 3  # eager's time, am_flow's
    assert timing.ratio(PROVIDERS["attention"], 2.0, 6.0) == 3  # am_flow_attention's time, SDPA's
