"""How busy many cores would be: the CPU kernels' own plans, run in a simulation.

python -m benchmarks.many_threads [--write]

The work items, their costs and their order come from the plans in csrc/cpu, through a small program that is compiled
with the kernels (cpu_items.cpp). As in the kernels, a core that is idle takes the next item, and an item ends after
those whose partial sums precede its own. Memory bandwidth, caches and clock rates are not simulated: the figures say
which cores have work, not how fast they do it.

A share is the time of one core divided by that of n cores, divided by n. Beside it stands the share without the
division of chains into parts, which is the plan for one thread.
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from amflow_kernels import _build
from benchmarks import result_files
from benchmarks.result_files import Row
from benchmarks.shapes import FEATURES, TYPICAL, Shape
from benchmarks.tables import Table

CORES = (8, 32, 96)
PASSES = {
    "forward": "am_flow, forward",
    "backward": "am_flow, backward",
    "Mx": "M x, forward",
    "MTx": "M^T x, forward",
    "Mx_backward": "M x, backward",
}
SHAPES = (*TYPICAL, Shape(1, 2, 12, 257, 64))
ISAS = ("avx2", "avx512")
RESULT = result_files.RESULTS / "many_threads.json"
PROGRAM = Path(__file__).with_name("cpu_items.cpp")


class Item(NamedTuple):
    """A work item: the costs of running and of finishing it, and the sum that it adds to."""

    run: int
    finish: int
    sum: int


def compile_program(isa: str, folder: Path) -> Path:
    """The program that prints plans, for an instruction set."""
    source, flags = _build.cpu_library("x86_64").objects[f"am_flow_{isa}.o"]
    cpu = _build.source_dir() / Path(source).parent
    program = folder / isa
    command = [_build.compiler(), "-O1", "-std=c++20", *flags, f"-I{cpu}", str(PROGRAM)]
    subprocess.run([*command, str(cpu / "am_flow.cpp"), str(cpu / "matmul.cpp"), "-o", str(program)], check=True)
    return program


def plans(program: Path, requests: list[tuple[str, Shape, int]]) -> list[list[Item]]:
    """The items of each pass, shape and number of threads."""
    lines = [f"{name} {' '.join(map(str, shape))} {FEATURES} {threads}" for name, shape, threads in requests]
    output = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    return [[Item(*map(int, item.split(":"))) for item in line.split()] for line in output.splitlines()]


def duration(items: list[Item], cores: int) -> int:
    """When the last item ends."""
    idle = [0] * cores
    ends: dict[int, int] = {}  # of the items that have added to each sum
    for run, finish, sum_ in items:  # the items of a sum are in the order in which they finish
        end = max(heapq.heappop(idle) + run, ends.get(sum_, 0)) + finish
        ends[sum_] = end
        heapq.heappush(idle, end)
    return max(idle)


def rows() -> list[Row]:
    """A row for each instruction set, pass, shape and number of cores."""
    requests = [(name, shape, n) for name in PASSES for shape in SHAPES for n in (1, *CORES)]
    result: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for isa in ISAS:
            planned = dict(zip(requests, plans(compile_program(isa, Path(folder)), requests), strict=True))
            for name, shape, cores in requests:
                whole, items = planned[name, shape, 1], planned[name, shape, cores]
                alone = duration(whole, 1)
                if cores == 1:
                    continue
                row: Row = {"isa": isa, "pass": name, "shape": str(shape), "cores": cores, "items": len(items)}
                row["share"] = round(alone / duration(items, cores) / cores, 3)
                row["share_without_parts"] = round(alone / duration(whole, cores) / cores, 3)
                result.append(row)
    return result


def table(rows: list[Row], isa: str) -> Table:
    """Shares of the passes at every shape, with parts and without."""
    cells = {(row["pass"], row["shape"], row["cores"]): row for row in rows if row["isa"] == isa}
    body = []
    for name, shape in dict.fromkeys((name, shape) for name, shape, _ in cells):
        of_shape = [cells[name, shape, cores] for cores in CORES]
        body.append([PASSES[name], shape, *(f"{r['share_without_parts']:.0%} -> {r['share']:.0%}" for r in of_shape)])
    return Table(f"Busy cores, {isa}", ["pass", "(B,T,H,N,D)", *(f"{n} cores" for n in CORES)], body, [])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_threads", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.name}")
    args = parser.parse_args()
    measured = rows()
    for isa in ISAS:
        print(table(measured, isa).plain(), end="\n\n")
    if args.write:
        RESULT.write_text(result_files.dumps({"shares": measured}))


if __name__ == "__main__":
    main()
