"""Figures of the compiled Triton kernels, without a GPU: registers, spills, instructions of the main loops, and what is
executed for each element of a map.

python -m benchmarks.gpu.triton_report           writes docs/triton_report.md and results/triton_report.json
python -m benchmarks.gpu.triton_report --check   compiles only for sm_90; fails if a figure got worse than committed,
                                                 if a kernel sums in several orders (layouts.py), or if it computes
                                                 offsets in 32 bits that need 64 (offsets.py)

The host code of `amflow_kernels` runs on tensors without storage, and the kernels that it would launch are compiled.
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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amflow_kernels.impl.triton import configs, launch
from amflow_kernels.impl.triton.saved import saved_sizes
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu import compile_matrix, executed, layouts, offsets
from benchmarks.result_files import RESULTS, add_write, dumps
from benchmarks.tables import Table

REPORT = Path(__file__).resolve().parents[2] / "docs" / "triton_report.md"
RESULT = RESULTS / "triton_report.json"
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
B, T, H, D = 8, 16, 12, 64
STRIPS, TILED = (64, 197, 257, 400, 577), (1370, 4096)  # N; in float32, all are tiled
REST = (65, 129, 193)  # more N for the rule of layouts.py: here, as for 257, a single key or row follows the tiles
MAX_EXPONENTIALS = 2.3  # in one pass, per map element
TOLERANCE = 1.05  # factor on the committed figures, which are compared if the version of Triton is the same

# An H100: multiprocessors, clock in Hz; per multiprocessor and cycle, thread instructions issued and exponentials.
PROCESSORS, CLOCK, ISSUED, EXPONENTIALS = 132, 1.7e9, 128, 16
L2_RATE, SECTOR = 5.5e12, 32  # bytes a second between its L2 and all multiprocessors, assumed; bytes of an access
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory that a program can have, by architecture
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
    """The launches that `launch` would make on a GPU."""
    recorded: list[Launch] = []

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        recorded.append((kernel, arguments, options))

    device = configs.Device(architecture, SHARED[architecture], PROCESSORS)
    with (
        mock.patch.object(launch, "run", record),
        mock.patch.object(configs.Device, "of", return_value=device),
    ):
        yield recorded


def launches(dtype: torch.dtype, N: int, architecture: int) -> list[Launch]:
    """Every kernel launch of a forward and a backward, with its arguments."""
    problem = Problem(*torch.empty(2, B, T, H, N, D, dtype=dtype, device="meta"))
    saved = torch.empty(sum(saved_sizes(problem)), device="meta")
    dflow = torch.empty(problem.flow_shape, device="meta")
    with _recording(architecture) as recorded:
        launch.am_flow(problem)
        launch.am_flow_backward(problem, dflow, saved, [True, True, False, False])
    return recorded


def wide_launches(dtype: torch.dtype, head_reduction: str, architecture: int) -> list[Launch]:
    """Launches of all operators for tensors with strides of frames, heads and tokens that pass 2^31, or almost.

    129 tokens have two tiles in a strip, and a row and a key after them.
    """
    q = torch.empty_strided((1, 3, 2, 129, D), (2**40, 2**39, 2**30, 2**26, 1), dtype=dtype, device="meta")
    problem = Problem(q, q, head_reduction=head_reduction)
    saved = torch.empty(sum(saved_sizes(problem)), device="meta")
    dflow = torch.empty(problem.flow_shape, device="meta")
    features = torch.empty(1, 2, 2, 129, 20, device="meta")
    with _recording(architecture) as recorded:
        launch.am_flow(problem)
        launch.am_flow_backward(problem, dflow, saved, [True, True, False, False])
        for transpose in (False, True):
            motion = MatmulProblem(q, q, x=features, transpose=transpose, softmax=True)
            launch.am_flow_matmul(motion)
        launch.am_flow_matmul_backward(motion, features, [True, True, False, False, True])
    return recorded


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name, with the fields of `CONST` and `TILING` among them."""
    fields = {**options["CONST"]._asdict(), **options["TILING"]._asdict()}
    plain = {name: field.value if isinstance(field, tl.constexpr) else field for name, field in fields.items()}
    return {**plain, **options}


def name(kernel: Any) -> str:
    """As the report names a kernel."""
    return str(kernel.__name__).removeprefix("am_flow_").removesuffix("_kernel")


def compile_launch(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any], N: int, architecture: int
) -> dict[str, Any]:
    """Figures of one kernel as it would be launched, compiled for sm_{architecture}."""
    compiled = compile_kernel(kernel, args, options, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    threads, shared = options["num_warps"] * 32, compiled.metadata.shared
    loop = main_loop(code)
    elements = loop_elements(name(kernel), flat(options), N)
    counts = {kind: sum(bool(re.match(pattern, name)) for name in loop) for kind, pattern in KINDS.items()}
    return {
        "kernel": f"{name(kernel)}, N = {N}" if "strip" in name(kernel) else name(kernel),
        "registers": registers,
        "stack": stack,
        "shared bytes": shared,
        "programs": min(65536 // (registers * threads), 2048 // threads, (227 << 10) // max(1, shared)),
        "all": len(loop) * threads / elements,
        **{kind: count * threads / elements for kind, count in counts.items()},
    }


def compile_kernel(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: int) -> Any:
    """The kernel compiled as Triton's launcher would, which derives types and constants from the arguments."""
    constants = {option: value for option, value in options.items() if option in kernel.arg_names}
    fixed: dict[tuple[int, ...], int | None] = {}  # integers that are 1, and None, become constants
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            parts = [typed(item, (*path, n)) for n, item in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, float):
            return "fp32"
        if value is None or (isinstance(value, int) and value == 1):
            fixed[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # tensors that PyTorch allocates are aligned
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[value.dtype]
        return "i32" if value < 2**31 else "i64"

    named = zip(kernel.arg_names, args, strict=False)
    signature = {argument: typed(value, (n,)) for n, (argument, value) in enumerate(named)}
    signature |= dict.fromkeys(constants, "constexpr")
    known: dict[Any, Any] = {**constants, **fixed}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={option: value for option, value in options.items() if option not in constants},
    )


def loop_elements(kernel: str, o: dict[str, Any], N: int) -> int:
    """Map elements that one round of the main loop computes, without padding in the last tile of a strip."""
    M, K = o["BLOCK_M"], o["BLOCK_N"]
    strips = {"strip": M * o["ROW_TILES"], "bwd_strip_q": M, "bwd_strip_k": K}
    return strips[kernel] * N if kernel in strips else M * K


def cuobjdump(flag: str, file: str) -> str:
    """The output of NVIDIA's disassembler for a compiled file."""
    return subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True).stdout


def main_loop(code: str, innermost: bool = True) -> list[str]:
    """Names of the instructions in the longest innermost loop, or in the longest loop of all, inner ones included."""
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


def rows(architectures: tuple[int, ...], *, execute: bool) -> list[dict[str, Any]]:
    """One row for every kernel, dtype and architecture; with its executed counts if asked for and known."""
    table = []
    for architecture, dtype, N in itertools.product(architectures, DTYPES, (*STRIPS, TILED[0])):
        key = {"sm": architecture, "dtype": str(dtype).removeprefix("torch.")}
        shown = shown_launches(dtype, N, architecture)
        counted = execute and shown and architecture in executed.ARCHITECTURES
        counts = executed.counts(dtype, N, D, architecture) if counted else {}
        for kernel, args, options in shown:
            table.append({**key, **compile_launch(kernel, args, options, N, architecture)})
            table[-1]["executed"] = counts.get(name(kernel))
            print(*table[-1].values(), file=sys.stderr)
    return table


def shown_launches(dtype: torch.dtype, N: int, architecture: int) -> list[Launch]:
    """The launches that the report shows for N: strips by their N, the kernels that work in tiles once."""
    return [one for one in launches(dtype, N, architecture) if N in TILED or "strip" in name(one[0])]


def several_orders(architecture: int) -> list[str]:
    """Sums and products that a kernel computes in more than one way."""
    reasons = []
    for dtype, N in itertools.product(DTYPES, (*STRIPS, *REST, TILED[0])):
        for kernel, args, options in shown_launches(dtype, N, architecture):
            ttgir = compile_kernel(kernel, args, options, architecture).asm["ttgir"]
            where = f"{name(kernel)}, N = {N} {str(dtype).removeprefix('torch.')} sm_{architecture}"
            reasons += [f"{where}: {finding}" for finding in layouts.findings(ttgir)]
    return reasons


def narrow_offsets(architecture: int) -> list[str]:
    """Offsets that a kernel computes in 32 bits where they need 64. Mean maps exist only in tiles."""
    reasons = set()
    for dtype, head_reduction in ((torch.bfloat16, "none"), (torch.float32, "mean_map")):
        for kernel, args, options in wide_launches(dtype, head_reduction, architecture):
            ttir = compile_kernel(kernel, args, options, architecture).asm["ttir"]
            reasons |= {f"{name(kernel)} {dtype}: {finding}" for finding in offsets.findings(ttir)}
    return sorted(reasons)


def regressions(table: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """Spills, float64 arithmetic, too many exponentials, and figures that got worse than the committed ones."""
    reasons = []
    before = {(row["sm"], row["dtype"], row["kernel"]): row for row in committed["rows"]}
    for row in table:
        where = f"{row['kernel']} {row['dtype']} sm_{row['sm']}"
        if row["stack"] or row["local"]:
            reasons.append(f"{where}: spills ({row['stack']} bytes of stack)")
        if row["fp64"]:
            reasons.append(f"{where}: float64 arithmetic, from a constant that float32 can't represent")
        if not row["kernel"].startswith("bwd") and row["ex2"] > MAX_EXPONENTIALS:
            reasons.append(f"{where}: {row['ex2']:.2f} exponentials per element")
        old = before.get((row["sm"], row["dtype"], row["kernel"]))
        if old and committed["triton"] == triton.__version__:
            reasons += [f"{where}: {change}" for change in increases(row, old, "registers", "shared bytes")]
    return reasons


def increases(row: dict[str, Any], old: dict[str, Any], *figures: str) -> list[str]:
    """Which of the figures, stack and instructions of a kernel exceed those of the committed report."""
    return [
        f"{figure} went from {old[figure]:.4g} to {row[figure]:.4g}"
        for figure in (*figures, "stack", "all", *KINDS)
        if row[figure] > TOLERANCE * old[figure]
    ]


def cost(kernel: str, o: dict[str, Any], row: dict[str, Any], N: int) -> tuple[float, float, float]:
    """Modelled seconds of a launch by what its multiprocessors do and by its accesses to global memory; its padding."""
    o, maps = flat(o), B * T * H
    M, K = o["BLOCK_M"], o["BLOCK_N"]
    if "strip" in kernel:
        owned = M * o["ROW_TILES"] if kernel != "bwd_strip_k" else K
        lines = -(-N // owned) * owned - (owned - 16 if o.get("TAIL") else 0)
        across = o["TILES"] * (M if kernel == "bwd_strip_k" else K) + o["REST"]
        work = lines * N  # the figures of strips count only elements of the map, no padding
    else:
        owned, inner = (K, M) if kernel in ("fwd", "bwd_dk") else (M, K)
        lines = -(-N // owned) * owned
        across = N // inner * inner + o["TAIL"] if "TAIL" in o else -(-N // inner) * inner
        work = lines * across
        if kernel in ("bwd_dq", "bwd_dk"):  # two rounds more for each chunk than there are pairs
            maps = B * H * (T - 1 + 2 * -(-(T - 1) // o["CHUNK"]))
    counts = row["executed"]
    cycles = max(work * row["all"] / ISSUED, N**2 * max(counts["ex2"] / EXPONENTIALS, counts["wavefronts"]))
    accesses = N**2 * counts["sectors"] * SECTOR
    return maps * cycles / (PROCESSORS * CLOCK), maps * accesses / L2_RATE, lines * across / N**2 - 1


def model(table: list[dict[str, Any]]) -> list[list[str]]:
    """Modelled microseconds of the bfloat16 forward and backward on an H100, against the forward's bound."""
    figures = {r["kernel"]: r for r in table if (r["sm"], r["dtype"]) == (90, "bfloat16")}
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


def beside(row: dict[str, Any], kind: str) -> str:
    """An executed figure, after the compiled one if there is that."""
    figure = f"{row['executed'][kind]:.3g}"
    return f"{row[kind]:.3g} / {figure}" if kind in row else figure


def page(results: dict[str, Any]) -> str:
    """docs/triton_report.md from the data."""
    table = results["rows"]
    heads = ["sm", "dtype", "kernel", "registers", "stack", "shared bytes", "programs", "all", *KINDS]
    cells = [[f"{r[h]:.3g}" if isinstance(r[h], float) else str(r[h]) for h in heads] for r in table]
    kinds = ["all", *executed.KINDS, *executed.ACCESSES]
    counted = [[*(str(r[h]) for h in heads[:3]), *(beside(r, kind) for kind in kinds)] for r in table if r["executed"]]
    spills = [[*map(str, key), str(allowed)] for key, allowed in compile_matrix.SPILLS.items()]
    return f"""# Compile report of the Triton kernels

Written by `python -m benchmarks.gpu.triton_report` with Triton {results["triton"]}. Nothing here was measured, and the
kernels have **not yet run on a GPU**. The launches are those of clips of (B, T, heads, D) = {B, T, H, D}; the figures
of the kernels that work in tiles are for N = {TILED[0]}.

Registers per thread; bytes of stack (spills) and of shared memory per program; programs that fit on a multiprocessor;
then instructions of the main loop for each element of the map that it computes: all of them, matrix instructions (one
does many multiply-adds for many threads), exponentials, float32 arithmetic, shuffles, shared memory, local memory
(spills), float64 arithmetic (a mistake). Where a loop has branches, all of them are counted.

{Table("Kernels", heads, cells, []).markdown()}
The same instructions as a machine for PTX executes them on the CPU ([ptx_machine.md](ptx_machine.md)), which counts
what runs and not what stands in a loop: for each element of a map, without padding, in a round of the loop over frames.
Where a column is above, its figure comes first. The assembler makes other instructions of PTX, so that the sum of all
and those of float32 differ. Then accesses of warps for each element: wavefronts of shared memory, those of them that
bank conflicts cause, and sectors of {SECTOR} bytes of global memory.

{Table("Executed", [*heads[:3], *kinds], counted, []).markdown()}
For other widths of heads and for the motion operator, `python -m benchmarks.gpu.compile_matrix` compiles every kernel.
These are the most bytes of stack that it allows on any architecture; nothing else may spill.

{Table("Spills", ["kernel", "dtype", "D", "bytes"], spills, []).markdown()}
Forward and backward in bfloat16 at B = {B}, T = {T}, {H} heads, D = {D} on an H100, in microseconds, by a model that
counts instructions and leaves latency out. The forward is one pass by strips up to N = 640 and three by tiles beyond,
the backward two by strips up to N = 320 and three by tiles beyond.

- *Padded*: the work on padding, relative to that on the maps.
- *Issue*: each pass takes as long as its instructions, its executed exponentials or its executed wavefronts of shared
  memory, whichever is longest ({PROCESSORS} multiprocessors, {CLOCK / 1e9:g} GHz; {ISSUED} thread instructions,
  {EXPONENTIALS} exponentials and one wavefront per cycle).
- *lse given*: the same without the pass that the log-sum-exps of an attention call save.
- *L2*: the executed sectors at {L2_RATE / 1e12:g} TB/s (assumed; hits in the first-level cache are not subtracted).
- *Bound*: two exponentials for each element of each map, all in the special-function units; *bound / model* divides it
  by the larger of issue and L2. The longest rows are computed three times, with five exponentials for each element, so
  three passes reach at most 40% of the bound.

{Table("Modelled times", MODELLED, model(table), []).markdown()}
"""


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.triton_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if a figure of sm_90 is worse than committed, or a sum has several orders",
    )
    add_write(parser, RESULT, REPORT)
    args = parser.parse_args()
    if args.check and args.write:
        parser.error("--check compares with the committed figures, --write replaces them: expected one of the two")
    if not args.check:
        results = {"triton": triton.__version__, "rows": rows(ARCHITECTURES, execute=True)}
        if args.write:
            RESULT.write_text(dumps(results))
            REPORT.write_text(page(results))
        print(page(results))
        return 0
    reasons = regressions(rows((90,), execute=False), json.loads(RESULT.read_text())) + several_orders(90)
    reasons += narrow_offsets(90)
    print(
        "\n".join(reasons)
        or "compile report: no spills, no figure worse than committed, one order of each sum, wide offsets"
    )
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
