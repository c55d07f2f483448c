"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, instructions of the main loops.

python -m benchmarks.cuda_report     compiles for sm_90; writes docs/cuda_report.md and results/cuda_report.json
"""

from __future__ import annotations

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
from benchmarks import compile_report as triton_report
from benchmarks.report import Table

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "cuda_report.md"
RESULT = ROOT / "benchmarks" / "results" / "cuda_report.json"
SM = 90
TOKENS = (64, 197, 257, 261, 400, 577, 640)
NUMBERS = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
OTHERS = 32  # queries or keys that pass by in a round of the gradient kernels, half of them with more than one slice
STRIPS = r"(\d+) blocks of (\d+) x (\d+) rows, (\d+) x (\d+) keys, (\d) stages"
ARGUMENTS = {
    "forward": ("NT", "MEAN_MAP", "GROWTH"),
    "coefficients": ("NT", "MEAN_MAP", "GROWTH"),
    "gradient": ("DT", "RESULT"),
}


def build(folder: Path) -> Path:
    """The library for the report's architecture."""
    with mock.patch.dict(os.environ, {"TORCH_CUDA_ARCH_LIST": f"{SM // 10}.{SM % 10}"}):
        return _build.compile_library(_build.CUDA, folder)


def rows(built: Path) -> list[dict[str, Any]]:
    """One row for every kernel of the library."""
    usage, code = (triton_report.cuobjdump(flag, str(built)) for flag in ("--dump-resource-usage", "--dump-sass"))
    sass = {part.split("\n", 1)[0].strip(): part for part in code.split("Function : ")[1:]}
    found = []
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        match = re.search(r"am_flow_(forward|coefficients|gradient)I(13__nv_bfloat16|6__half|f)(.*?)EEv", name)
        if match is None:
            continue
        kernel, number, rest = match.groups()
        values = [int(value) for value in re.findall(r"(?:L[ib]|ResultE|GrowthE)(\d+)", rest)]
        arguments = dict(zip(ARGUMENTS[kernel], values, strict=True))
        loop = triton_report.main_loop(sass[name], innermost=False)
        each = elements(arguments, NUMBERS[number])
        kinds = {
            kind: sum(bool(re.match(pattern, word)) for word in loop) / each
            for kind, pattern in triton_report.KINDS.items()
        }
        found.append(
            {
                "dtype": NUMBERS[number],
                "kernel": f"{kernel} " + " ".join(f"{key}={value}" for key, value in arguments.items()),
                "registers": int(registers),
                "stack": int(stack),
                "all": len(loop) / each,
                **kinds,
            }
        )
    return sorted(found, key=lambda row: (row["dtype"], row["kernel"]))


def elements(arguments: dict[str, int], dtype: str) -> int:
    """Of maps, that a lane has in one round of the main loop: strips of two frames, or a tile of four numbers for 8."""
    if "NT" in arguments:
        return 2 * 4 * arguments["NT"]
    one_slice = dtype != "float32" and arguments["DT"] == 8
    return 4 * (OTHERS if one_slice else OTHERS // 2) // 8


def release() -> str:
    """nvcc's."""
    told = subprocess.run([_build.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, (V[\d.]+)", told)
    return found[1] if found else told


def problems(found: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """What must not be: other kernels, or of the same nvcc spills where there were none, or figures that got worse."""
    before = {(row["dtype"], row["kernel"]): row for row in committed["rows"]}
    if set(before) != {(row["dtype"], row["kernel"]) for row in found}:
        return ["other kernels than in the committed report"]
    reasons = []
    for row in found if committed["nvcc"] == release() else ():
        old = before[row["dtype"], row["kernel"]]
        for figure in ("stack", "all", *triton_report.KINDS):
            if row[figure] > triton_report.TOLERANCE * old[figure]:
                told = f"{figure} went from {old[figure]:.4g} to {row[figure]:.4g}"
                reasons.append(f"{row['kernel']} {row['dtype']}: {told}")
    return reasons


def model(found: list[dict[str, Any]], growth: int, triton: dict[str, list[str]]) -> list[list[str]]:
    """Modelled microseconds of the bfloat16 forward on an H100, as in the other report, beside Triton's."""
    B, T, H, D = triton_report.B, triton_report.T, triton_report.H, triton_report.D
    figures = {row["kernel"]: row for row in found if row["dtype"] == "bfloat16"}
    lines = []
    for N in TOKENS:
        told = torch.ops.amflow_cuda.describe(N, N, D, 2, False, 1.0, triton_report.SHARED[SM])
        match = re.match(STRIPS, told)
        assert match is not None, told
        blocks, groups, tile, warps, keys, _ = map(int, match.groups())
        computed = -(-N // tile) * tile * warps * keys  # groups beyond the last row do nothing
        row = figures[f"forward NT={keys // 8} MEAN_MAP=0 GROWTH={growth}"]
        busy = max(row["all"] / triton_report.ISSUED, row["ex2"] / triton_report.EXPONENTIALS)
        issue = B * T * H * computed * busy / (triton_report.PROCESSORS * triton_report.CLOCK)
        L2 = B * T * H * blocks * (warps * keys + groups * tile) * D * 2 / triton_report.L2_RATE
        others = triton.get(str(N), ["", "", ""])
        times = [f"{computed / N**2 - 1:.0%}", f"{issue * 1e6:.0f}", f"{L2 * 1e6:.0f}"]
        lines.append([str(N), f"{blocks} x {groups} x {tile}", f"{warps} x {keys}", *times, *others])
    return lines


def write(found: list[dict[str, Any]]) -> None:
    """The committed report and its data."""
    RESULT.write_text(json.dumps({"nvcc": release(), "rows": found}, indent=1) + "\n")
    heads = ["dtype", "kernel", "registers", "stack", "all", *triton_report.KINDS]
    table = [[f"{r[h]:.3g}" if isinstance(r[h], float) else str(r[h]) for h in heads] for r in found]
    committed = json.loads(triton_report.RESULT.read_text())["rows"]
    triton = {line[0]: [line[1], line[2], line[4]] for line in triton_report.model(committed)}
    modelled = ["N", "rows", "keys", "padded", "issue", "L2", "Triton: padded", "issue", "L2"]
    REPORT.write_text(f"""# What nvcc makes of the CUDA kernels

Written by `python -m benchmarks.cuda_report` with nvcc {release()} for sm_{SM}; nothing here was
measured, and the kernels are **not yet run on a GPU**.

Registers of a thread, bytes of stack (spills), then instructions of the main loop for each element of the maps that it
makes, as in [the report on Triton's](compile_report.md). All branches of a loop are counted, and inner loops once: this
is more than is executed where there are branches for keys beyond the last, for rows that are not aligned, or for
temperatures below 1; the gradient kernels have most of these, and a map, its neighbours and their products in one loop.

NT: tiles of 8 keys that a warp has. GROWTH: how e^x - 1 is made, 0 by a polynomial, 1 for temperatures below 1, 2 with
a second ex2 (uncentred flow). DT: 8 columns each of dq (RESULT 0) or dk (1), or what a mean over the heads' maps needs
(2).

**What an element needs**, in the uncentred forward: 1 MMA and 0.6 ldmatrix; 1 maximum; 1 FMA and 1 ex2; 1 sum; 1 FMA
for the change; 1 product and 1 ex2; 1 sum; 1 FMA for the sum over rows and 0.25 to store it: 11 in all, and 15 if
centred. The rest is what a warp does once for each map: masks, loading rows, barriers, what warps that share rows
exchange, sums of columns. Registers bound a warp to 19 tiles. Fewer would do if changes were rounded to 16 bits and
summed on tensor cores; that is beyond the error that is promised.

{Table("Kernels", heads, table, []).markdown()}
The bfloat16 forward at B = {triton_report.B}, T = {triton_report.T}, {triton_report.H} heads,
D = {triton_report.D} on
an H100, in microseconds, by the same model as Triton's: instructions of the loop issued or its exponentials, whichever
takes longer, and what is read from the L2. Rows: blocks x groups of warps x rows; keys: warps that share rows x keys.
Latency is left out.

{Table("Modelled times, uncentred", modelled, model(found, 2, triton), []).markdown()}

{Table("Modelled times, centred", modelled, model(found, 0, triton), []).markdown()}
""")


def main() -> int:
    """The command; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        torch.ops.load_library(str(built))
        write(rows(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
