"""The machine: executes the PTX of a kernel on the CPU, instruction by instruction, and finds faults.

    kernel = load(ptx)
    report = kernel.run(grid=(2, 1, 1), block=(128, 1, 1), parameters=packed, shared=0, memory=[Region(...)], seed=1)

csrc/ executes; its table of instructions is the only list of them. Blocks run one after the other, the warps of a block
up to their next barrier, the lanes of a warp together. Not seen: what blocks do at the same time (they may not exchange
anything: that is a race), and time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from tests.ptx import reader

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-fPIC", "-Wall", "-Werror"]
FLAGS += ["-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Numbered as in csrc/machine.h.
FAULTS = ("race", "uninitialised", "bounds", "misaligned", "barrier", "async copy")
COUNTERS = ("shared wavefronts", "shared conflicts", "global sectors read", "global sectors written")
KINDS = {
    "MMA": r"w?g?mma\.(sync|mma_async)",
    "ex2": r"ex2\.",
    "fp32": r"(add|sub|mul|fma|min|max|abs|neg)\.(rn\.)?f32",
    "shuffle": r"shfl\.",
    "shared": r"(ld|st)\.shared|(ld|st)matrix",
    "global": r"(ld|st)\.global|cp\.async\.c[ag]",
    "barrier": r"bar\.sync",
}
SHARED_BASE = 1024  # address of a block's shared memory, as in csrc/machine.h
WIDTH_BYTES = {"p": 4, "h": 64, "w": 128, "d": 256}  # of a register in the register file
ADDRESS_WIDTHS = {"s": "w", "g": "d", "P": "d"}  # of the registers that hold addresses, by the signature's letter
SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]


class UnknownInstruction(reader.PtxError):
    """The machine lacks an instruction, which the message names."""


class Fault(Exception):  # noqa: N818, it is the kernel's, not the machine's
    """What a kernel did wrong.

    `kind` is "race" (in shared memory between barriers, in global memory between blocks), "uninitialised" (a read of a
    register, of shared or of global memory that was never written), "bounds", "misaligned", "barrier" (not all threads
    that must come together do), or "async copy" (its memory or registers are used before it was waited for).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Region(NamedTuple):
    """Global memory that a kernel may use: bytes from `address` on, in this process."""

    address: int
    size: int
    name: str
    shadow: torch.Tensor | None = None  # uint8, one for each byte: 0 if it has never been written. None: all have been


@dataclass
class Report:
    """What a run executed, in instructions of warps."""

    opcodes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # by KINDS, "all", and COUNTERS


class _Operand(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("number", ctypes.c_uint32), ("value", ctypes.c_int64)]


class _Instruction(ctypes.Structure):
    _fields_ = [("opcode", ctypes.c_uint32), ("first", ctypes.c_uint32), ("targets", ctypes.c_uint16)]
    _fields_ += [("operands", ctypes.c_uint16), ("guard", ctypes.c_uint32), ("guard_offset", ctypes.c_uint32)]
    _fields_ += [("negated", ctypes.c_uint32)]


class _Special(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


class _Constant(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("letter", ctypes.c_uint32), ("value", ctypes.c_uint64)]


class _Program(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("code", "operands", "specials", "constants")]
    _fields_ += [(name, ctypes.c_uint32) for name in ("instructions", "special_count", "constant_count", "registers")]
    _fields_ += [("file_bytes", ctypes.c_uint32)]


class _Tensor(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("size", ctypes.c_uint64), ("shadow", ctypes.c_void_p)]
    _fields_ += [("name", ctypes.c_char_p)]


class _Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32 * 3)]
    _fields_ += [(name, ctypes.c_uint32) for name in ("shared_bytes", "parameter_bytes", "region_count", "padding")]
    _fields_ += [("parameters", ctypes.c_char_p), ("regions", ctypes.c_void_p), ("seed", ctypes.c_uint64)]


class _Result(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("pc", ctypes.c_uint32), ("block", ctypes.c_uint32 * 3)]
    _fields_ += [("warp", ctypes.c_uint32), ("lane", ctypes.c_int32), ("padding", ctypes.c_uint32)]
    _fields_ += [("message", ctypes.c_char * 512), ("counters", ctypes.c_uint64 * len(COUNTERS))]


@cache
def _library() -> ctypes.CDLL:
    """csrc/, built once for its text, flags and CPU."""
    sources = sorted(SOURCES.iterdir())
    native = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, check=True).stdout
    key = hashlib.sha256(repr(FLAGS).encode() + native + b"".join(source.read_bytes() for source in sources))
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "amflow_kernels" / "ptx"
    path = folder / f"machine_{key.hexdigest()[:20]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "machine.so"
            files = [(source, Path(scratch) / f"{source.stem}.o") for source in sources if source.suffix == ".cpp"]
            compilers = [subprocess.Popen(["g++", *FLAGS, "-c", "-o", to, source]) for source, to in files]
            statuses = [compiler.wait() for compiler in compilers]
            assert not any(statuses), "compiling csrc failed"
            subprocess.run(["g++", "-shared", "-o", built, *(to for _, to in files)], check=True)
            shutil.move(built, path)
    library = ctypes.CDLL(str(path))
    library.ptx_opcodes.restype = ctypes.c_char_p
    return library


@cache
def _opcodes() -> dict[str, list[tuple[int, str]]]:
    """Numbers and signatures of the instructions of each name."""
    table: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(_library().ptx_opcodes().decode().splitlines()):
        name, signature = line.rsplit(" ", 1)
        table.setdefault(name, []).append((number, signature))
    return table


def load(ptx: str, name: str | None = None, *, fp_fusion: bool = True) -> Kernel:
    """The kernel of that name, or the only one of the text.

    fp_fusion: whether the assembler may fuse products into sums, as ptxas does unless it is told not to.
    Raises UnknownInstruction, and PtxError for what isn't PTX.
    """
    kernels = reader.read(ptx)
    if name is None and len(kernels) != 1:
        raise ValueError(f"name is None, but the text has {len(kernels)} kernels: {', '.join(kernels)}")
    if name is not None and name not in kernels:
        raise ValueError(f"name is {name!r}, but the text has {', '.join(kernels)}")
    return Kernel(kernels[name] if name is not None else next(iter(kernels.values())), fp_fusion)


class Kernel:
    """A kernel that the machine can run."""

    def __init__(self, text: reader.Kernel, fp_fusion: bool) -> None:
        self.text = text
        self._parameter_offsets = {each.name: each.offset for each in text.parameters}
        self._offsets, self._end = [0], 0
        for letter in text.registers:
            self._offsets.append(self._place(letter))
        self._constants: dict[tuple[str, int], int] = {}  # offset of each
        self._specials: dict[str, int] = {}
        operands: list[_Operand] = []
        self._code = (_Instruction * len(text.instructions))()
        for n, each in enumerate(text.instructions):
            opcode, signature = self._opcode(each)
            targets = signature.index("=")
            guard, guard_offset = (0xFFFFFFFF, 0) if each.guard is None else (each.guard, self._offsets[each.guard])
            first, count = len(operands), len(each.operands)
            operands += map(self._operand, signature.replace("=", ""), each.operands)
            self._code[n] = (opcode, first, targets, count, guard, guard_offset, each.negated)
        self._fusions = self._find_fusions() if fp_fusion else []
        for fusion in self._fusions:
            fusion.first = len(operands)
            operands += [operands[self._code[at].first + n] for at, n in fusion.operands]
        self._operands = (_Operand * len(operands))(*operands)

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def parameters(self) -> list[reader.Parameter]:
        """In their order, with their places in the packed bytes."""
        return self.text.parameters

    @property
    def parameter_bytes(self) -> int:
        """The size of the packed parameters."""
        return max((each.offset + each.size for each in self.parameters), default=0)

    def run(
        self,
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        shared: int = 0,
        memory: list[Region],
        seed: int = 0,
    ) -> Report:
        """Runs all blocks, and returns what was executed.

        parameters: the packed .param bytes. shared: bytes of dynamic shared memory. memory: all of global memory.
        The seed picks what hardware leaves open: the order of blocks and warps, which products and sums are fused,
        the errors of approximations, how products of matrices are summed. Raises Fault.
        """
        if len(parameters) != self.parameter_bytes:
            raise ValueError(f"parameters has {len(parameters)} bytes, expected {self.parameter_bytes}")
        _check(memory)
        code, names = self._fused(seed)
        specials = [_Special(SPECIALS.index(name), offset) for name, offset in self._specials.items()]
        constants = [_Constant(offset, ord(c), value) for (c, value), offset in self._constants.items()]
        tables = [(_Special * len(specials))(*specials), (_Constant * len(constants))(*constants)]
        pointers = [ctypes.cast(array, ctypes.c_void_p) for array in (code, self._operands, *tables)]
        sizes = (len(code), len(specials), len(constants), len(self.text.registers), self._end)
        program = _Program(*pointers, *sizes)
        regions = (_Tensor * len(memory))()
        for n, (address, size, name, shadow) in enumerate(memory):
            regions[n] = (address, size, None if shadow is None else shadow.data_ptr(), name.encode())
        launch = _Launch((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block))
        launch.shared_bytes = max(self.text.shared.values(), default=0) + shared
        launch.shared_bytes = max(launch.shared_bytes, self.text.static_shared)
        launch.parameter_bytes, launch.parameters = len(parameters), parameters
        launch.region_count, launch.regions = len(memory), ctypes.cast(regions, ctypes.c_void_p)
        launch.seed = seed
        counts, result = (ctypes.c_uint64 * len(code))(), _Result()
        _library().ptx_run(ctypes.byref(program), ctypes.byref(launch), counts, ctypes.byref(result))
        if result.kind >= 0:
            raise self._fault(result)
        return _report(names, counts, result)

    def _place(self, letter: str) -> int:
        """Room in the register file."""
        size = WIDTH_BYTES[letter]
        begin = -(-self._end // min(size, 64)) * min(size, 64)
        self._end = begin + size
        return begin

    def _opcode(self, instruction: reader.Instruction) -> tuple[int, str]:
        """Number and signature of the instruction with this name and such operands."""
        found = _opcodes().get(instruction.name, [])
        for number, signature in found:
            letters = signature.replace("=", "")
            if len(letters) == len(instruction.operands) and all(map(self._fits, letters, instruction.operands)):
                return number, signature
        reason = f" with these operands (it has {', '.join(s for _, s in found)})" if found else ""
        line = f"line {instruction.line} ({instruction.location}) of {self.text.name}"
        raise UnknownInstruction(f"{line}: the machine has no instruction {instruction.name}{reason}")

    def _fits(self, letter: str, operand: reader.Operand) -> bool:
        width = self.text.registers[int(operand.value) - 1] if operand.kind == "register" else None
        if letter in "phwda":
            wanted = "w" if letter == "a" else letter
            known = operand.kind == "sink" or self._constant(operand) is not None
            return not operand.address and (width == wanted if width else known)
        if letter == "i":
            return operand.kind == "immediate" and not operand.address
        if letter == "L":
            return operand.value in self.text.labels
        symbols = self._parameter_offsets if letter == "P" else self.text.shared
        return operand.address and (width == ADDRESS_WIDTHS[letter] or operand.value in symbols)

    def _constant(self, operand: reader.Operand) -> int | None:
        """The value of an operand that is known now, or 0 for a special register."""
        if operand.kind == "immediate":
            return int(operand.value)
        if operand.kind == "special":
            return 0 if operand.value in SPECIALS else None
        if operand.value in self.text.shared:
            return SHARED_BASE + self.text.shared[str(operand.value)]
        return self._parameter_offsets.get(str(operand.value))

    def _operand(self, letter: str, operand: reader.Operand) -> _Operand:
        if letter == "L":
            return _Operand(0, 0, self.text.labels[str(operand.value)])
        if letter == "i":
            return _Operand(0, 0, int(operand.value))
        if operand.kind == "register":
            number = int(operand.value)
            if letter == "a":
                return _Operand(self._offsets[number], 0, number)
            return _Operand(self._offsets[number], number, operand.displacement)
        if operand.kind == "special":
            name = str(operand.value)
            if name not in self._specials:
                self._specials[name] = self._place("w")
            return _Operand(self._specials[name], 0, 0)
        if operand.kind == "sink":
            return _Operand(self._place(letter), len(self.text.registers) + 1, 0)
        width = ADDRESS_WIDTHS.get(letter, letter)
        value = (self._constant(operand) or 0) & ((1 << reader.BITS.get(width, 32)) - 1)
        if (width, value) not in self._constants:
            self._constants[width, value] = self._place(width)
        return _Operand(self._constants[width, value], 0, operand.displacement)

    def _find_fusions(self) -> list[_Fusion]:
        """The sums that the assembler may fuse with a product, in the same stretch of code without branches."""
        writes: Counter[int] = Counter()
        targets = []
        for n, each in enumerate(self.text.instructions):
            operands = each.operands[: self._code[n].targets]
            targets.append([int(o.value) for o in operands if o.kind == "register"])
            writes.update(targets[-1])
        begins = set(self.text.labels.values())
        fusions, products = [], {}
        for n, each in enumerate(self.text.instructions):
            if n in begins:
                products = {}
            if each.name in ("add.f32", "sub.f32"):
                for place in (1, 2):
                    operand = each.operands[place]
                    if operand.kind == "register" and int(operand.value) in products:
                        at = products[int(operand.value)]
                        kind = "" if each.name == "add.f32" else " a*b-c" if place == 1 else " c-a*b"
                        fusions.append(_Fusion(n, at, "fma.rn.f32" + kind, ((n, 0), (at, 1), (at, 2), (n, 3 - place))))
                        break
            for register in targets[n]:
                products = {
                    product: at
                    for product, at in products.items()
                    if register != product
                    and ("register", register) not in [o[:2] for o in self.text.instructions[at].operands]
                }
            if each.name == "mul.f32" and each.guard is None and writes[targets[n][0]] == 1:
                products[targets[n][0]] = n
        return fusions

    def _fused(self, seed: int) -> tuple[ctypes.Array[_Instruction], list[str]]:
        """The instructions with the sums fused that the seed picks, and their names."""
        code = (_Instruction * len(self._code)).from_buffer_copy(self._code)
        names = [each.name for each in self.text.instructions]
        for fusion in self._fusions:
            if hashlib.blake2b(f"{seed} {fusion.at}".encode(), digest_size=1).digest()[0] % 2:
                names[fusion.at] = "fma.rn.f32"
                (number, _), *_ = _opcodes()[fusion.name]
                code[fusion.at].opcode, code[fusion.at].first, code[fusion.at].operands = number, fusion.first, 4
        return code, names

    def _fault(self, result: _Result) -> Fault:
        instruction = self.text.instructions[result.pc]
        lane = "" if not 0 <= result.lane < 32 else f", lane {result.lane}"
        where = f"{self.text.name}, line {instruction.line} ({instruction.location}) {instruction.name}"
        block = ", ".join(map(str, result.block))
        return Fault(
            FAULTS[result.kind], f"{result.message.decode()}; in {where}, block ({block}), warp {result.warp}{lane}"
        )


def _check(memory: list[Region]) -> None:
    for a, b in pairwise(sorted(memory, key=lambda region: region.address)):
        if a.address + a.size > b.address:
            raise ValueError(f"memory: {a.name} and {b.name} overlap")
    for _, size, name, shadow in memory:
        if shadow is not None and (shadow.numel() != size or shadow.element_size() != 1):
            raise ValueError(f"memory: the shadow of {name} is not {size} bytes")


@dataclass
class _Fusion:
    """A sum that may be fused with a product: where they are, and the operands, as positions in instructions."""

    at: int
    product: int
    name: str
    operands: tuple[tuple[int, int], ...]
    first: int = 0


def _report(names: list[str], executed: ctypes.Array[ctypes.c_uint64], result: _Result) -> Report:
    report = Report()
    for name, count in zip(names, executed, strict=True):
        if count:
            report.opcodes[name] += count
    report.counts["all"] = report.opcodes.total()
    for kind, pattern in KINDS.items():
        report.counts[kind] = sum(count for name, count in report.opcodes.items() if re.match(pattern, name))
    report.counts.update(dict(zip(COUNTERS, result.counters, strict=True)))
    return report
