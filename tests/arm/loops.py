"""The innermost loops of the products, as compiled for ARM: what they execute, and whether sums are spilled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.arm.executed import program

DISASSEMBLER, SYMBOLS = "aarch64-linux-gnu-objdump", "aarch64-linux-gnu-nm"  # of the cross compiler's binutils
MULTIPLY_ADD = ("fmla", "bfdot")

_FUNCTION = re.compile(
    r"amflow::(\w+)::product_tile<(\d+), (\d+), amflow::\w+::(\w+), \(amflow::\w+::Epilogue\)(\d), (\w+)>"
)


@dataclass(frozen=True)
class Loop:
    """The loop over k of one register tile of `rows` by `vectors`."""

    isa: str
    rows: int
    vectors: int
    element: str
    epilogue: int
    rows_adjacent: bool
    instructions: int
    multiply_adds: int
    spills: int  # accesses to the stack


def product_loops() -> Iterator[Loop]:
    """Those of every instance of `product_tile`."""
    command = [DISASSEMBLER, "-dC", "--no-show-raw-insn", str(program())]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for block in text.split("\n\n"):
        head, _, body = block.partition("\n")
        found = _FUNCTION.search(head)
        if found is None:
            continue
        loop = _innermost(body)
        opcodes = [line.split()[0] for line in loop]
        yield Loop(
            found[1], int(found[2]), int(found[3]), found[4], int(found[5]), found[6] == "true",
            len(loop), sum(opcode in MULTIPLY_ADD for opcode in opcodes), sum("[sp" in line for line in loop),
        )  # fmt: skip


def functions() -> list[tuple[int, str]]:
    """The program's functions by ascending address."""
    text = subprocess.run([SYMBOLS, "-nC", str(program())], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    return [(int(address, 16), name) for address, kind, name in lines if kind in "tTwW"]


def _innermost(body: str) -> list[str]:
    """The instructions of the shortest loop that multiplies and adds."""
    lines = [re.fullmatch(r"\s*([0-9a-f]+):\s+(.*)", line) for line in body.splitlines()]
    code = [(int(line[1], 16), line[2]) for line in lines if line is not None]
    loops = []
    for address, instruction in code:
        jump = re.match(r"(?:b\.\w+|cbn?z|tbn?z|b)\s.*?\b([0-9a-f]+) <", instruction)
        if jump is not None and int(jump[1], 16) < address:
            loop = [text for at, text in code if int(jump[1], 16) <= at <= address]
            if any(text.split()[0] in MULTIPLY_ADD for text in loop):
                loops.append(loop)
    return min(loops, key=len)
