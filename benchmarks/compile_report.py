"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, instructions of the main loops.

python -m benchmarks.compile_report           writes docs/compile_report.md and benchmarks/results/compile_report.json
python -m benchmarks.compile_report --check   compiles for sm_90 alone and fails if anything got worse than committed

The host code of `amflow_kernels` runs on tensors without storage, and what it would launch is compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amflow_kernels.impl.gpu import saved_sizes
from amflow_kernels.impl.triton import configs, launch
from benchmarks.report import Table

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "compile_report.md"
RESULT = ROOT / "benchmarks" / "results" / "compile_report.json"
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
B, T, H, D = 8, 16, 12, 64
STRIPS, TILED = (64, 197, 257, 400), (577, 1370, 4096)  # N; in float32, all are tiled
MOST_EXPONENTIALS = 2.3  # of one pass, per map element
TOLERANCE = 1.05  # over the committed figures, of the same Triton version

# An H100: multiprocessors, clock, instructions of threads that one multiprocessor issues in a cycle, exponentials.
PROCESSORS, CLOCK, ISSUED, EXPONENTIALS = 132, 1.7e9, 128, 16
L2_RATE = 5.5e12  # bytes a second from its L2 to all multiprocessors: assumed
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a program can have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KINDS = {
    "MMA": r"HMMA|HGMMA|QGMMA|UTC\w*MMA",
    "ex2": r"MUFU\.EX2",
    "fp32": r"F(ADD|MUL|FMA)2?\b",
    "shuffle": r"SHFL",
    "shared": r"LDS|STS|LDSM|STSM",
    "local": r"LDL|STL",
    "fp64": r"D(ADD|MUL|FMA|SETP)\b|MUFU\.\w+64H",
}


MODELLED = ["N", "padded", "issue", "lse given", "L2", "bound", "bound / model"]
MODELLED += ["backward: padded", "issue", "L2"]

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a kernel, its arguments, its options


@contextmanager
def _recording(architecture: int) -> Iterator[list[Launch]]:
    """What `launch` would run on a GPU."""
    found: list[Launch] = []

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((kernel, arguments, options))

    device = configs.Device(architecture, SHARED[architecture], PROCESSORS)
    with (
        mock.patch.object(launch, "run", record),
        mock.patch.object(configs.Device, "of", return_value=device),
    ):
        yield found


def launches(dtype: torch.dtype, N: int, architecture: int) -> list[Launch]:
    """Every kernel launch of a forward and a backward, with its arguments."""
    q, k = torch.empty(2, B, T, H, N, D, dtype=dtype, device="meta")
    saved = torch.empty(sum(saved_sizes(q, False, 1, "none")), device="meta")
    with _recording(architecture) as found:
        options = (D**-0.5, 1, 1.0, "none")
        launch.am_flow(q, k, None, None, *options, False, None, None, saved)
        dflow = torch.empty(B, T - 1, H, N, device="meta")
        launch.am_flow_backward(dflow, q, k, None, None, *options, [True, True, False, False], saved)
    return found


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name, with the fields of `CONST` and `TILING` among them."""
    fields = {**options["CONST"]._asdict(), **options["TILING"]._asdict()}
    return {**{name: field.value for name, field in fields.items()}, **options}


def name(kernel: Any) -> str:
    return str(kernel.__name__).removeprefix("am_flow_").removesuffix("_kernel")


def compile_launch(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any], N: int, architecture: int
) -> dict[str, Any]:
    """Figures of one kernel as it would be launched, compiled for sm_{architecture}."""
    constants = {option: value for option, value in options.items() if option in kernel.arg_names}
    ones: dict[tuple[int, ...], int | None] = {}  # the launcher makes constants of integers that are 1, and of None
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            parts = [typed(item, (*path, n)) for n, item in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, float):
            return "fp32"
        if value is None:
            ones[path] = value
            return "constexpr"
        if isinstance(value, int) and value == 1:
            ones[path] = 1
            return "constexpr"
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # as the launcher finds of PyTorch's own tensors
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
            return "*" + names[value.dtype]
        return "i32" if value < 2**31 else "i64"

    named = zip(kernel.arg_names, args, strict=False)
    signature = {argument: typed(value, (n,)) for n, (argument, value) in enumerate(named)}
    signature |= dict.fromkeys(constants, "constexpr")
    known: dict[Any, Any] = {**constants, **ones}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={option: value for option, value in options.items() if option not in constants},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    threads = options["num_warps"] * 32
    loop = main_loop(code)
    # Elements of the map that one round of the loop makes, without those that only fill up a strip's last tile.
    fields, strip = flat(options), "strip" in name(kernel)
    M, K = fields["BLOCK_M"], fields["BLOCK_N"]
    owned = {"strip": M * fields["ROW_TILES"], "bwd_strip_q": M, "bwd_strip_k": K}
    elements = owned[name(kernel)] * N if strip else M * K
    counts = {kind: sum(bool(re.match(pattern, name)) for name in loop) for kind, pattern in KINDS.items()}
    return {
        "kernel": f"{name(kernel)}, N = {N}" if strip else name(kernel),
        "registers": registers,
        "stack": stack,
        "shared bytes": compiled.metadata.shared,
        "programs": min(
            65536 // (registers * threads), 2048 // threads, (227 << 10) // max(1, compiled.metadata.shared)
        ),
        "all": len(loop) * threads / elements,
        **{kind: count * threads / elements for kind, count in counts.items()},
    }


def cuobjdump(flag: str, file: str) -> str:
    """What it says of a compiled file."""
    return subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True).stdout


def main_loop(code: str, innermost: bool = True) -> list[str]:
    """Names of the instructions in the longest innermost loop, or in the longest with all loops that are in it."""
    pattern = r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    instructions = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, code, re.M)]
    loops = []
    for at, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    if innermost:
        loops = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return [name for at, name, _ in instructions if begin <= at <= end]


def rows(architectures: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for every kernel, dtype and architecture."""
    found = []
    for architecture, dtype in itertools.product(architectures, DTYPES):
        key = {"sm": architecture, "dtype": str(dtype).removeprefix("torch.")}
        for N in (*STRIPS, TILED[0]):
            for kernel, args, options in launches(dtype, N, architecture):
                if N in TILED or "strip" in name(kernel):
                    found.append({**key, **compile_launch(kernel, args, options, N, architecture)})
                    print(*found[-1].values(), file=sys.stderr)
    return found


def problems(found: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """What must not be."""
    reasons = []
    before = {(r["sm"], r["dtype"], r["kernel"]): r for r in committed["rows"]} if committed else {}
    for row in found:
        where = f"{row['kernel']} {row['dtype']} sm_{row['sm']}"
        if row["stack"] or row["local"]:
            reasons.append(f"{where}: spills ({row['stack']} bytes of stack)")
        if row["fp64"]:
            reasons.append(f"{where}: float64 arithmetic, from a constant that is no float32")
        if not row["kernel"].startswith("bwd") and row["ex2"] > MOST_EXPONENTIALS:
            reasons.append(f"{where}: {row['ex2']:.2f} exponentials per element")
        old = before.get((row["sm"], row["dtype"], row["kernel"]))
        if old and committed["triton"] == triton.__version__:
            for figure in ("registers", "stack", "shared bytes", "all", *KINDS):
                if row[figure] > TOLERANCE * old[figure]:
                    reasons.append(f"{where}: {figure} went from {old[figure]:.4g} to {row[figure]:.4g}")
    return reasons


def cost(kernel: str, o: dict[str, Any], row: dict[str, Any], N: int) -> tuple[float, float, float]:
    """Modelled seconds of a launch by instructions or exponentials, by what it reads of q and k; what it pads."""
    o, blocks = flat(o), 1
    M, K = o["BLOCK_M"], o["BLOCK_N"]
    if "strip" in kernel:
        owned = M * o["ROW_TILES"] if kernel != "bwd_strip_k" else K
        blocks = -(-N // owned)
        lines = blocks * owned - (owned - 16 if o.get("TAIL") else 0)
        across = o["TILES"] * (M if kernel == "bwd_strip_k" else K) + o["REST"]
        work = lines * N  # the figures of strips are for elements of the map alone
        read = lines + blocks * across * (1 if kernel == "strip" else 2)
    else:
        owned, inner = (K, M) if kernel in ("fwd", "bwd_dk") else (M, K)
        blocks, tiles = -(-N // owned), -(-N // inner)
        lines, across = blocks * owned, N // inner * inner + o["TAIL"] if "TAIL" in o else tiles * inner
        work = lines * across
        # The first pass keeps its queries, the others go through frames tile by tile, the last two through three.
        each = {"rows": inner, "bwd_dq": 3 * M + 4 * K, "bwd_dk": 4 * M + 3 * K}.get(kernel, M + K)
        read = blocks * (tiles * each + (owned if kernel == "rows" else 0))
    busy = max(row["all"] / ISSUED, row["ex2"] / EXPONENTIALS) / (PROCESSORS * CLOCK)
    maps = B * T * H
    return maps * work * busy, maps * read * D * 2 / L2_RATE, lines * across / N**2 - 1


def model(found: list[dict[str, Any]]) -> list[list[str]]:
    """Modelled microseconds of the bfloat16 forward and backward on an H100, against the forward's bound."""
    figures = {r["kernel"]: r for r in found if (r["sm"], r["dtype"]) == (90, "bfloat16")}
    lines = []
    for N in sorted((*STRIPS, *TILED)):
        costs: dict[str, list[tuple[float, float, float]]] = {"forward": [], "backward": [], "rows": [(0.0, 0.0, 0.0)]}
        for kernel, _, o in launches(torch.bfloat16, N, 90):
            row = figures[f"{name(kernel)}, N = {N}" if "strip" in name(kernel) else name(kernel)]
            one = cost(name(kernel), o, row, N)
            costs["backward" if name(kernel).startswith("bwd") else "forward"].append(one)
            if name(kernel) == "rows":
                costs["rows"].append(one)
        (issue, L2), (b_issue, b_L2), (given, _) = (
            [sum(one[n] for one in costs[key]) for n in range(2)] for key in ("forward", "backward", "rows")
        )
        bound = B * T * H * N**2 * 2 / EXPONENTIALS / (PROCESSORS * CLOCK)
        times = [f"{seconds * 1e6:.0f}" for seconds in (issue, issue - given, L2, bound)]
        padded = [f"{max(one[2] for one in costs[key]):.0%}" for key in ("forward", "backward")]
        share = f"{bound / max(issue, L2):.0%}"
        lines.append([str(N), padded[0], *times, share, padded[1], f"{b_issue * 1e6:.0f}", f"{b_L2 * 1e6:.0f}"])
    return lines


def write(found: list[dict[str, Any]]) -> None:
    """The committed report and its data."""
    RESULT.write_text(json.dumps({"triton": triton.__version__, "rows": found}, indent=1) + "\n")
    heads = ["sm", "dtype", "kernel", "registers", "stack", "shared bytes", "programs", "all", *KINDS]
    table = [[f"{r[h]:.3g}" if isinstance(r[h], float) else str(r[h]) for h in heads] for r in found]
    REPORT.write_text(f"""# What the compiler makes of the Triton kernels

Written by `python -m benchmarks.compile_report` with Triton {triton.__version__}; nothing here was measured, and the
kernels are **not yet run on a GPU**. The launches are those of clips of (B, T, heads, D) = {B, T, H, D}, for the
kernels in tiles with N = {TILED[0]}.

Registers of a thread; bytes of stack (spills) and of shared memory of a program; programs that fit on a multiprocessor;
then instructions of the main loop for each element of the map that it makes: all, matrix (one such instruction does
many multiply-adds of many threads), exponentials, float32 arithmetic, shuffles, shared memory, local memory (spills),
float64 arithmetic (a mistake).
Where a loop has branches, all of them are counted: bwd_dq and bwd_dk make up to three maps of a frame and its
neighbours.

{Table("Kernels", heads, table, []).markdown()}
Forward and backward in bfloat16 at B = {B}, T = {T}, {H} heads, D = {D} on an H100, in microseconds. Issue: each pass
at its instructions issued or its exponentials, whichever takes longer ({PROCESSORS} multiprocessors, {CLOCK / 1e9:g}
GHz, {ISSUED} instructions of threads and {EXPONENTIALS} exponentials a cycle); the forward is one pass by strips up
to N = 512 and three by tiles, the backward two by strips up to N = 320 and three by tiles. lse given: without the
pass that a log-sum-exp from the attention call saves. L2: what the programs read of q and k, at {L2_RATE / 1e12:g}
TB/s (assumed; what the first-level cache saves is not counted). Latency is left out. Bound: two exponentials for each
element of each map, all in the special-function units; then that over the larger of the two. Padded: the work on what
only fills up tiles, over that on the maps. The longest rows are made three times, with five exponentials for each
element: 40% of the bound is the most that three passes can reach.

{Table("Modelled times", MODELLED, model(found), []).markdown()}
""")


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if sm_90 got worse than the committed report")
    if not parser.parse_args().check:
        write(rows(ARCHITECTURES))
        return 0
    reasons = problems(rows((90,)), json.loads(RESULT.read_text()))
    print("\n".join(reasons) or "compile report: no spills, nothing worse than committed")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
