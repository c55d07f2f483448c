"""Executes the CPU kernels for 64-bit ARM under qemu and counts the instructions of their products, for docs/arm.md.

python -m benchmarks.arm_report --write
"""

from __future__ import annotations

import argparse
import bisect
import datetime
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amflow_kernels import _build
from amflow_kernels import testing as tt
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.result_files import RESULTS, Row, add_write, dumps
from benchmarks.tables import Table
from tests.arm import executed, loops
from tests.kernels import conformance as c

PAGE = Path(__file__).resolve().parents[1] / "docs" / "arm.md"
RESULT = RESULTS / "arm_qemu.json"
SUBJECTS = ("neon", "neon_bf16")


def flow_shares(case: c.Case, impl: str) -> Iterator[tuple[str, float]]:
    """Errors of a flow and of its gradients, as shares of their budgets."""
    problem, exact = case.problem(), c.centred_oracle(case)
    base = problem.Nq / problem.Nk
    budget = tt.flow_budget(base + exact.max().item(), case.temperature, case.logit_error(problem))
    yield "flow", (tt.run(problem, impl).double() - base - exact).abs().max().item() / budget
    dflow = case.incoming(problem.flow_shape)
    grads = c.gradients(problem, case.needed(), dflow, impl)
    exact_grads, tie = tt.oracle_grads(problem, dflow), tt.grad_tie(problem, dflow)
    yield "gradients of the flow", _grad_share(grads, exact_grads, tie, tt.grad_magnitude(problem, dflow))


def matmul_shares(case: c.MatmulCase, impl: str) -> Iterator[tuple[str, float]]:
    """Errors of a product and of its gradients, as shares of their budgets."""
    problem = case.problem()
    yield case.operator + " x", _product_share(tt.run(problem, impl), problem)
    dy = case.incoming(problem.product_shape)
    *grads, dx = c.gradients(problem, case.needed(), dy, impl)
    if dx is not None:
        transposed = replace(problem, x=dy.contiguous(), transpose=not problem.transpose)
        yield "gradients of products by x", _product_share(dx, transposed)
    if any(grad is not None for grad in grads):
        exact, tie = tt.oracle_matmul_grads(problem, dy), tt.matmul_tie(problem, dy)
        share = _grad_share(grads, exact, tie, tt.matmul_magnitude(problem, dy))
        yield "gradients of products by q and k", share


def _product_share(y: Tensor, problem: MatmulProblem) -> float:
    exact, budget, info = tt.oracle_matmul(problem), tt.matmul_budget(problem), torch.finfo(y.dtype)
    if y.dtype != torch.float32:
        budget = budget + info.eps / 2 * (exact.abs() + budget)
    budget = budget + info.smallest_normal * info.eps
    return ((y.double() - exact).abs() / budget).max().item()


def _grad_share(
    grads: list[Tensor | None], exact: tuple[Tensor, ...], tie: tuple[Tensor, ...], magnitude: tuple[Tensor, ...]
) -> float:
    shares = [0.0]
    for grad, *of_exact in zip(grads, exact, tie, magnitude, strict=True):
        if grad is not None:
            budget = tt.grad_budget(of_exact[0], of_exact[1], grad.dtype, of_exact[2])
            error = (grad.double() - of_exact[0]).norm().item()
            shares.append(error / budget if error else 0.0)
    return max(shares)


def error_rows() -> list[Row]:
    """For each instruction set, result and dtype: how many cases, and the largest error as a share of its budget."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for name in SUBJECTS:
        subject = replace(c.SUBJECTS[name], all_rows=None)
        with subject.context():
            tables: list[tuple[Any, Any]] = [(c.flow_cases, flow_shares), (c.matmul_cases, matmul_shares)]
            for cases, shares in tables:
                for case in cases(subject):
                    for result, share in shares(case, name):
                        key = (name, result, str(case.dtype).removeprefix("torch."))
                        found.setdefault(key, []).append(share)
    return [
        {"kernels": name, "result": result, "dtype": dtype, "cases": len(shares), "worst": round(max(shares), 3)}
        for (name, result, dtype), shares in sorted(found.items())
    ]


def counted(isa: str, problem: Problem, *, backward: bool) -> tuple[int, int]:
    """Instructions of one call on one thread: in the inner products, and in the rest of the kernels."""
    with tempfile.TemporaryDirectory() as folder:
        plugin, counts = Path(folder) / "count.so", Path(folder) / "counts"
        source = Path(__file__).with_name("arm_count.c")
        subprocess.run([_build.compiler(), "-x", "c", "-O2", "-shared", "-fPIC", source, "-o", plugin], check=True)
        options = ["-plugin", f"file={plugin},out={counts}"]
        process = executed.Executed(isa, options)
        if backward:
            process.backward(problem, tt.make_dflow(problem.flow_shape), torch.empty(0), [True, True, False, False])
        else:
            process.forward(problem)
        process.close()
        blocks = [line.split() for line in counts.read_text().splitlines()]
    symbols = loops.functions()
    addresses = [address for address, _ in symbols]
    products = rest = 0
    for address, instructions, runs in blocks:
        function = symbols[max(0, bisect.bisect(addresses, int(address, 16)) - 1)][1]
        if "product_tile<" in function:
            products += int(instructions) * int(runs)
        else:
            rest += int(instructions) * int(runs)
    return products, rest


def count_rows() -> list[Row]:
    """Instructions per element of the maps, each map counted once, for single calls with 257 tokens and D = 64."""
    rows = []
    for isa, dtype in (("neon", c.FP32), ("neon", c.BF16), ("neon_bf16", c.BF16), ("neon", c.FP16)):
        q, k = tt.make_qk(1, 3, (1,), 257, 257, 64, dtype=dtype)
        problem = Problem(q, k)
        for backward in (False, True):
            products, rest = counted(isa, problem, backward=backward)
            elements = 3 * 257 * 257
            rows.append(
                {
                    "kernels": isa,
                    "pass": "backward" if backward else "forward",
                    "dtype": str(dtype).removeprefix("torch."),
                    "products": round(products / elements, 1),
                    "rest": round(rest / elements, 1),
                }
            )
    return rows


def document() -> Row:
    """Everything that the page shows."""
    emulator = subprocess.run([executed.EMULATOR, "--version"], capture_output=True, text=True, check=True).stdout
    compiler = subprocess.run([executed.COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "sources": _build.source_key(_build.cpu_library("aarch64")),
        "emulator": emulator.splitlines()[0],
        "compiler": compiler.splitlines()[0],
        "errors": error_rows(),
        "instructions": count_rows(),
        "loops": [asdict(loop) for loop in loops.product_loops()],
    }


def error_table(saved: Row) -> Table:
    header = ["kernels", "result", "dtype", "cases", "largest error, of its budget"]
    rows = [[r["kernels"], r["result"], r["dtype"], str(r["cases"]), f"{r['worst']:.2f}"] for r in saved["errors"]]
    made = f"Made on {saved['date']} with {saved['emulator']} and {saved['compiler']}."
    return Table("Errors against float64", header, rows, [made])


def loop_table(saved: Row) -> Table:
    """The largest tile of every number of vectors; the rest are for what is left over."""
    largest: dict[tuple[str, int], Row] = {}
    for loop in saved["loops"]:
        key = (loop["element"], loop["vectors"])
        if key not in largest or loop["rows"] > largest[key]["rows"]:
            largest[key] = loop
    names = {"Float": "float32", "Bf16Pair": "bfloat16, two along k at once"}
    rows = [
        [names[e], f"{r['rows']} x {v}", str(r["instructions"]), str(r["multiply_adds"]), str(r["spills"])]
        for (e, v), r in sorted(largest.items(), reverse=True)
    ]
    header = ["numbers", "rows x vectors", "instructions", "multiply-adds", "spills"]
    return Table("Inner loops of the products, one step along k", header, rows, [])


def count_table(saved: Row) -> Table:
    header = ["kernels", "dtype", "pass", "products", "the rest"]
    rows = [[r["kernels"], r["dtype"], r["pass"], f"{r['products']}", f"{r['rest']}"] for r in saved["instructions"]]
    return Table("Executed instructions per element of a map (257 tokens, D = 64)", header, rows, [])


def write_page(saved: Row) -> None:
    """Replaces the page's tables."""
    page = PAGE.read_text()
    tables = {"errors": error_table(saved), "instructions": count_table(saved), "loops": loop_table(saved)}
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        page = re.sub(f"(?s){begin}.*{end}", lambda _: begin + table.markdown() + "\n" + end, page)  # noqa: B023
    PAGE.write_text(page)


def main() -> None:
    """Measures and prints; with ``--write``, writes the page's tables and their data."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_write(parser, RESULT, PAGE)
    write = parser.parse_args().write
    saved = document()
    for table in (error_table(saved), count_table(saved), loop_table(saved)):
        print(table.plain(), end="\n\n")
    if write:
        RESULT.write_text(dumps(saved))
        write_page(saved)


if __name__ == "__main__":
    main()
