"""Figures of the compiled CUDA kernels, without a GPU: registers, spills, instructions of the main loops.

python -m benchmarks.gpu.cuda_report     compiles for sm_90; writes docs/cuda_report.md and results/cuda_report.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from amflow_kernels import _build
from benchmarks.gpu import triton_report
from benchmarks.result_files import RESULTS, add_write, dumps
from benchmarks.tables import Table

REPORT = Path(__file__).resolve().parents[2] / "docs" / "cuda_report.md"
RESULT = RESULTS / "cuda_report.json"
SM = 90
TOKENS = (64, 197, 257, 261, 400, 577, 640)
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
STRIPS = r"(\d+) blocks of (\d+) x (\d+) rows, (\d+) x (\d+) keys, (\d) stages"
MODELLED = ["N", "rows", "keys", "padded", "issue", "L2", "Triton: padded", "issue", "L2"]
ARGUMENTS = ("NT", "MEAN_MAP", "GROWTH")


def build(folder: Path) -> Path:
    """The library for the report's architecture."""
    with mock.patch.dict(os.environ, {"TORCH_CUDA_ARCH_LIST": f"{SM // 10}.{SM % 10}"}):
        return _build.compile_library(_build.CUDA, folder)


def rows(built: Path) -> list[dict[str, Any]]:
    """One row for every kernel that computes maps."""
    usage, code = (triton_report.cuobjdump(flag, str(built)) for flag in ("--dump-resource-usage", "--dump-sass"))
    sass = {part.split("\n", 1)[0].strip(): part for part in code.split("Function : ")[1:]}
    table = []
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        match = re.search(r"am_flow_forwardI(13__nv_bfloat16|6__half|f)(.*?)EEv", name)
        if match is None:
            continue
        values = [int(value) for value in re.findall(r"(?:L[ib]|GrowthE)(\d+)", match[2])]
        label = " ".join(f"{key}={value}" for key, value in zip(ARGUMENTS, values, strict=True))
        loop = triton_report.main_loop(sass[name], innermost=False)
        row = {"dtype": DTYPES[match[1]], "kernel": label, "registers": int(registers), "stack": int(stack)}
        elements = (
            2 * 4 * values[0]
        )  # per lane in one round of the loop: strips of two frames, four for a tile of 8 keys
        table.append({**row, **_instructions(loop, elements)})
    return sorted(table, key=lambda row: (row["dtype"], row["kernel"]))


def _instructions(loop: list[str], elements: int) -> dict[str, float]:
    """Instructions of a loop per element of the maps, all of them and by kind."""
    kinds = triton_report.KINDS.items()
    counts = {kind: sum(bool(re.match(pattern, word)) for word in loop) / elements for kind, pattern in kinds}
    return {"all": len(loop) / elements, **counts}


def release() -> str:
    """The version of nvcc."""
    output = subprocess.run([_build.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, (V[\d.]+)", output)
    return version[1] if version else output


def regressions(table: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """Kernels that differ from the committed ones, and with the same nvcc figures that got worse."""
    before = {(row["dtype"], row["kernel"]): row for row in committed["rows"]}
    if set(before) != {(row["dtype"], row["kernel"]) for row in table}:
        return ["other kernels than in the committed report"]
    if committed["nvcc"] != release():
        return []
    return [
        f"{row['kernel']} {row['dtype']}: {change}"
        for row in table
        for change in triton_report.increases(row, before[row["dtype"], row["kernel"]])
    ]


def model(table: list[dict[str, Any]], growth: int) -> list[list[str]]:
    """Modelled microseconds of the bfloat16 forward on an H100, as in the report on Triton's kernels, and theirs."""
    B, T, H, D = triton_report.B, triton_report.T, triton_report.H, triton_report.D
    figures = {row["kernel"]: row for row in table if row["dtype"] == "bfloat16"}
    committed = json.loads(triton_report.RESULT.read_text())["rows"]
    triton = {line[0]: [line[1], line[2], line[4]] for line in triton_report.model(committed)}
    lines = []
    for N in TOKENS:
        description = torch.ops.amflow_cuda.describe(N, N, D, 2, False, 1.0, triton_report.SHARED[SM])
        match = re.match(STRIPS, description)
        assert match is not None, description
        blocks, groups, tile, warps, keys, _ = map(int, match.groups())
        computed = -(-N // tile) * tile * warps * keys  # groups beyond the last row do nothing
        row = figures[f"NT={keys // 8} MEAN_MAP=0 GROWTH={growth}"]
        busy = max(row["all"] / triton_report.ISSUED, row["ex2"] / triton_report.EXPONENTIALS)
        issue = B * T * H * computed * busy / (triton_report.PROCESSORS * triton_report.CLOCK)
        L2 = B * T * H * blocks * (warps * keys + groups * tile) * D * 2 / triton_report.L2_RATE
        times = [f"{computed / N**2 - 1:.0%}", f"{issue * 1e6:.0f}", f"{L2 * 1e6:.0f}"]
        line = [str(N), f"{blocks} x {groups} x {tile}", f"{warps} x {keys}", *times]
        lines.append(line + triton.get(str(N), ["", "", ""]))
    return lines


def page(results: dict[str, Any], uncentred: list[list[str]], centred: list[list[str]]) -> str:
    """docs/cuda_report.md from the data and the modelled times of the uncentred and the centred forward."""
    heads = ["dtype", "kernel", "registers", "stack", "all", *triton_report.KINDS]
    table = [[f"{r[h]:.3g}" if isinstance(r[h], float) else str(r[h]) for h in heads] for r in results["rows"]]
    B, T, H, D = triton_report.B, triton_report.T, triton_report.H, triton_report.D
    return f"""# Compile report of the CUDA kernels

Written by `python -m benchmarks.gpu.cuda_report` with nvcc {results["nvcc"]} for sm_{SM}. Nothing here was measured,
and the kernels have **not yet run on a GPU**.

Registers per thread, bytes of stack (spills), then instructions of the main loop for each element of the maps that it
computes, as in [the report on Triton's kernels](triton_report.md). All branches of a loop are counted, and inner loops
once: more than is executed where branches handle keys beyond the last or unaligned rows. Triton's kernels compute the
gradients.

- NT: tiles of 8 keys per warp.
- GROWTH: how e^x - 1 is computed. 0: by a polynomial; 1: for temperatures below 1; 2: by a second ex2 (uncentred flow).

**What an element needs**, in the uncentred forward: 1 MMA and 0.6 ldmatrix; 1 maximum; 1 FMA and 1 ex2; 1 sum; 1 FMA
for the change; 1 product and 1 ex2; 1 sum; 1 FMA for the sum over rows and 0.25 to store it: 11 in all, and 15 if
centred. The rest is the work of a warp once per map: masks, loading rows, barriers, exchange between warps that share
rows, sums of columns. Registers limit a warp to 19 tiles. Rounding changes to 16 bits and summing them on tensor cores
would take fewer instructions, but would exceed the promised error.

{Table("Kernels", heads, table, []).markdown()}
The bfloat16 forward at B = {B}, T = {T}, {H} heads, D = {D} on an H100, in microseconds, by the same model as Triton's:
instructions of the loop issued or its exponentials, whichever takes longer, and reads from L2. Latency is left out.
Rows: blocks x groups of warps x rows; keys: warps that share rows x keys.

{Table("Modelled times, uncentred", MODELLED, uncentred, []).markdown()}

{Table("Modelled times, centred", MODELLED, centred, []).markdown()}
"""


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.cuda_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_write(parser, RESULT, REPORT)
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        torch.ops.load_library(str(built))
        table = rows(built)
        results = {"nvcc": release(), "rows": table}
        text = page(results, model(table, 2), model(table, 0))
    if write:
        RESULT.write_text(dumps(results))
        REPORT.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
