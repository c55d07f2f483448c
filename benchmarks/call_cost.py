"""What a small call costs besides the kernel: instructions, counted by callgrind.

python -m benchmarks.call_cost [--write]

At a tiny clip the kernels are a part of a call's cost; the rest is Python and PyTorch's dispatcher. Each call is
compared with an *empty op*: the same schema, registered with `Library.define` and `Library.impl`, whose kernel only
allocates the results. Where gradients are needed, it is compared with two empty ops and an empty
`torch.autograd.Function` of as many arguments. What is subtracted as the kernel's own part is a call of the native op
with all its arguments and results at hand, and for attention SDPA.

Needs valgrind, which emulates AVX2 at most. On one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import scaled_dot_product_attention

from amflow_kernels import AMFlowStream, _build, am_flow, am_flow_attention, am_flow_matmul, am_flow_pair, ops
from benchmarks import result_files
from benchmarks.machine import machine
from benchmarks.result_files import Row
from benchmarks.shapes import HARD
from benchmarks.tables import Table

CALLS = 40
RESULT = result_files.RESULTS / "call_cost.json"

_LIBRARY = library.Library("amflow_benchmark", "FRAGMENT")
Call = Callable[[], object]


def empty_op(op: Any, result: Callable[[], object]) -> Any:
    """An op with the schema of `op` that returns `result()`."""
    name = op._opname
    _LIBRARY.define(str(op._schema).partition("::")[2])
    _LIBRARY.impl(name, lambda *args: result(), "CompositeExplicitAutograd")
    return getattr(torch.ops.amflow_benchmark, name).default


class EmptyNode(torch.autograd.Function):
    """One autograd node."""

    @staticmethod
    def forward(ctx: Any, result: Callable[[], Tensor], *args: Any) -> Tensor:
        """A new tensor."""
        return result()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Not called."""
        return (None,) * 13


def calls() -> dict[str, Call]:
    """The measured calls by name."""
    torch.manual_seed(0)
    shape = next(shape for shape in HARD if shape.T == 2)
    q, k, v = torch.randn(3, *shape).unbind()
    x = torch.randn(shape.features())
    q_grad = q.clone().requires_grad_()
    options = (shape.D**-0.5, 1, 1.0)
    flow_args = (None, None, None, None, *options, "none", False, None)
    flow, y = torch.empty(shape.flow()), torch.empty(shape.features())
    am_flow(q, k)  # loads the native ops
    native, bits = torch.ops.amflow_native, {"AVX2": 256, "AVX512": 512}[torch.backends.cpu.get_cpu_capability()]
    empty_flow = empty_op(ops.am_flow, lambda: (torch.empty(shape.flow()), torch.empty(0)))
    empty_matmul = empty_op(ops.am_flow_matmul, lambda: torch.empty(shape.features()))
    q_images, k_images, v_images = (t.flatten(0, 1) for t in (q, k, v))
    first, second = (tuple(t[:, n : n + 1] for t in (q, k)) for n in (0, 1))
    frame = [t[:, 0] for t in (q, k)]
    stream = AMFlowStream()
    stream(*frame)
    return {
        "nothing": lambda: None,
        "empty op": lambda: empty_flow(q, k, *flow_args),
        "empty op, motion operator": lambda: empty_matmul(q, k, None, None, x, *options, False, False, None),
        "empty autograd node": lambda: EmptyNode.apply(lambda: torch.empty(shape.flow()), q_grad, k, *flow_args),
        "SDPA": lambda: scaled_dot_product_attention(q_images, k_images, v_images),
        "native am_flow": lambda: native.am_flow.default(flow, q, k, None, None, *options, 0, False, bits),
        "native am_flow_matmul": lambda: native.am_flow_matmul.default(
            y, q, k, None, None, x, *options, False, False, bits
        ),
        "am_flow": lambda: am_flow(q, k),
        "am_flow, folded": lambda: am_flow(q_images, k_images, num_frames=shape.T),
        "am_flow, gradients": lambda: am_flow(q_grad, k),
        "am_flow_pair": lambda: am_flow_pair(*first, *second),
        "am_flow_matmul": lambda: am_flow_matmul(q, k, x),
        "am_flow_matmul, gradients": lambda: am_flow_matmul(q_grad, k, x),
        "am_flow_attention": lambda: am_flow_attention(q_images, k_images, v_images, num_frames=shape.T),
        "AMFlowStream": lambda: stream(*frame),
    }


class Compared(NamedTuple):
    """A call, the part of it that is not overhead, and what its overhead is compared with; all by name."""

    call: str
    kernel: tuple[str, ...]
    yardstick: tuple[str, ...]


FLOW, MATMUL, NODE = "empty op", "empty op, motion operator", "empty autograd node"
COMPARED = (
    Compared("am_flow", ("native am_flow",), (FLOW,)),
    Compared("am_flow, folded", ("native am_flow",), (FLOW,)),
    Compared("am_flow, gradients", ("native am_flow",), (FLOW, FLOW, NODE)),
    Compared("am_flow_pair", ("native am_flow",), (FLOW,)),
    Compared("am_flow_matmul", ("native am_flow_matmul",), (MATMUL,)),
    Compared("am_flow_matmul, gradients", ("native am_flow_matmul",), (MATMUL, MATMUL, NODE)),
    Compared("am_flow_attention", ("native am_flow", "SDPA"), (FLOW,)),
    Compared("AMFlowStream", ("native am_flow",), (FLOW,)),
)


def rows(counts: dict[str, int]) -> list[Row]:
    """A row for each compared call: the instructions of its overhead and of the yardstick."""
    result: list[Row] = []
    for compared in COMPARED:
        overhead = counts[compared.call] - sum(counts[name] for name in compared.kernel)
        plain = sum(counts[name] for name in compared.yardstick)
        row: Row = {"call": compared.call, "instructions": overhead, "yardstick": plain}
        result.append(row | {"multiple": round(overhead / plain, 2)})
    return result


def table(rows: list[Row]) -> Table:
    """The overhead of each call beside that of an empty op."""
    header = ["call", "instructions", "of an empty op", "multiple"]
    body = [[row["call"], *(f"{row[n] / 1e3:.0f}k" for n in ("instructions", "yardstick"))] for row in rows]
    return Table(
        "Overhead", header, [[*line, f"{row['multiple']:.1f}x"] for line, row in zip(body, rows, strict=True)], []
    )


def instructions() -> dict[str, int]:
    """Instructions of each call, from a process under valgrind that counts only there: importing PyTorch takes long."""
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.so"
        subprocess.run(
            [_build.compiler(), "-x", "c", "-shared", "-fPIC", "-", "-o", requests], input=_REQUESTS, check=True
        )
        subprocess.run(
            ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out", sys.executable,
             "-m", "benchmarks.call_cost", "--count-with", requests],
            check=True, capture_output=True,
        )  # fmt: skip
        totals = {}
        for path in Path(folder).glob("out.*"):
            text = path.read_text()
            if name := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE):
                totals[name[1]] = int(re.findall(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)[-1])
    return {name: (total - totals["nothing"]) // CALLS for name, total in totals.items()}


_REQUESTS = b"""
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def count_with(requests: ctypes.CDLL) -> None:
    """Makes each call under valgrind, and dumps the count under its name."""
    measured, zero, dump = calls(), requests.zero, requests.dump
    for call in measured.values():  # loads and imports what it needs before anything is counted
        call()
    gc.disable()
    requests.start()
    for name, call in measured.items():
        label = name.encode()
        call()
        zero()
        for _ in range(CALLS):
            call()
        dump(label)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call_cost", description=__doc__.partition("\n")[0])
    result_files.add_write(parser, RESULT)
    parser.add_argument("--count-with", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.count_with:
        count_with(ctypes.CDLL(args.count_with))
        return
    counts = instructions()
    measured = rows(counts)
    print(table(measured).plain())
    if args.write:
        document = {"machine": machine(), "overhead": measured, "instructions": counts}
        RESULT.write_text(result_files.dumps(document))


if __name__ == "__main__":
    main()
