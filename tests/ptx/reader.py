"""Reads PTX: the text of a module into kernels, with their parameters, shared memory, registers and instructions.

It knows the syntax and no instruction: `machine` finds the meaning of each by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTHS = {"pred": "p", "b16": "h", "u16": "h", "s16": "h", "f16": "h", "b32": "w", "u32": "w", "s32": "w", "f32": "w"}
WIDTHS |= {"b64": "d", "u64": "d", "s64": "d", "f64": "d"}
BITS = {"h": 16, "w": 32, "d": 64}
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(ValueError):
    """The text is not PTX that this reader knows; the message has the line."""


class Operand(NamedTuple):
    """A register, an immediate (its bits), a special register, a symbol, or a result that is dropped; in brackets, an
    address."""

    kind: str  # "register", "immediate", "special", "symbol", "sink"
    value: int | str  # a register's number, from 1; the bits; the name
    address: bool = False
    displacement: int = 0


class Instruction(NamedTuple):
    """One instruction. Vectors' braces are left out: their parts are operands."""

    name: str
    operands: tuple[Operand, ...]
    guard: int | None  # the number of a predicate register
    negated: bool
    line: int  # in the text
    location: str  # in the source, by .loc


class Parameter(NamedTuple):
    """Its place in bytes, as the driver packs it."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """A kernel as it stands in the text."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # offsets; dynamic shared memory begins after the static one
    static_shared: int = 0  # bytes
    registers: list[str] = field(default_factory=list)  # letters of WIDTHS; register 1 comes first
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # positions in `instructions`


def read(text: str) -> dict[str, Kernel]:
    """The kernels of a module, by name. Raises PtxError."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    header = r"^\s*(?:\.visible\s+)?\.(entry|func)\s+([\w$]+)\s*(?:\(([^)]*)\))?[^{;(]*\{"
    variables = r"^\s*(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?;"
    shared = [match.groups() for match in re.finditer(variables, text, re.M)]
    found = {match[2]: match for match in re.finditer(header, text, re.M)}
    kernels = {}
    for name, entry in found.items():
        if entry[1] == "func":
            continue
        kernel = kernels[name] = Kernel(name, parameters=_parameters(entry[3] or ""))
        _lay_out(kernel, shared)
        functions: dict[str, list[int]] = {}
        _Body(kernel, text, entry.end(), functions).read()
        for function, arguments in functions.items():
            if function not in found:
                raise PtxError(f"{name} calls {function}, which is not in this text")
            body = _Body(kernel, text, found[function].end(), None)
            body.define(function, found[function][3], arguments)
            body.read()
    if not kernels:
        raise PtxError("there is no .entry in this text")
    return kernels


def _parameters(text: str) -> list[Parameter]:
    """Each is aligned to its size, or as it says."""
    parameters, end = [], 0
    pointer = r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w*?(\d+)\s+" + pointer + r"([\w$]+)(?:\[(\d+)\])?"
    for align, bits, name, count in re.findall(pattern, text):
        alignment = int(align or BYTES[bits])
        begin, size = -(-end // alignment) * alignment, BYTES[bits] * int(count or 1)
        parameters.append(Parameter(name, begin, size))
        end = begin + size
    return parameters


def _lay_out(kernel: Kernel, variables: list[tuple[str, ...]]) -> None:
    """Static shared memory in order, then the dynamic one."""
    for dynamic in (False, True):
        for align, kind, name, count in variables:
            if (count == "") != dynamic:
                continue
            begin = -(-kernel.static_shared // int(align)) * int(align)
            kernel.shared[name] = begin
            if not dynamic:
                kernel.static_shared = begin + BYTES[re.sub(r"\D", "", kind)] * int(count or 1)


class _Body:
    """Reads the statements between the braces of a kernel or of a function that it calls.

    Functions come once, after the kernel. Their parameters are registers: a call becomes moves and a branch.
    `functions`: those that are called, with the registers of their parameters; None within one.
    """

    def __init__(self, kernel: Kernel, text: str, begin: int, functions: dict[str, list[int]] | None) -> None:
        self.kernel, self.text, self.begin, self.functions = kernel, text, begin, functions
        self.parameters: set[int] = set()  # registers that are parameters of functions
        self.line = text.count("\n", 0, begin) + 1
        self.scopes: list[dict[str, tuple[int, int | None]]] = [{}]  # names, or prefixes and how many they are
        self.location = ""

    def error(self, message: str) -> PtxError:
        return PtxError(f"line {self.line}: {message}")

    def define(self, name: str, parameters: str, registers: list[int]) -> None:
        """Makes the body that of a function with these registers for its parameters."""
        self.kernel.labels[name] = len(self.kernel.instructions)
        names = [each.name for each in _parameters(parameters)]
        if len(names) != len(registers):
            raise self.error(f"{name} has {len(names)} parameters, and a call passes {len(registers)}")
        self.scopes[0] = {each: (register, None) for each, register in zip(names, registers, strict=True)}
        self.parameters = set(registers)

    def read(self) -> None:
        for statement in self._statements():
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
                if not self.scopes:
                    break
            elif statement.endswith(":"):
                self.kernel.labels[statement[:-1]] = len(self.kernel.instructions)
            elif statement.startswith((".reg", ".param")):
                self._declare(statement)
            elif statement.startswith("call"):
                self._call(statement)
            elif not statement.startswith("."):
                self._instruction(statement)
        else:
            raise self.error(f"the body of {self.kernel.name} has no end")

    def _statements(self) -> Iterator[str]:
        """Labels with their colon, braces of scopes, and the rest without semicolons. Keeps `line` and `location`."""
        parts: list[str] = []
        first = self.line
        lines = (match[0] for match in re.compile(r"[^\n]*\n?").finditer(self.text, self.begin))
        for number, full in enumerate(lines, self.line):
            code, _, comment = full.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                self.location = comment.split()[0] if comment.strip() else " ".join(code.split()[1:3])
                continue
            while code:
                if not parts:
                    first = number
                    if code[0] in "{}":
                        self.line = number
                        yield code[0]
                        code = code[1:].strip()
                        continue
                    label = re.match(r"[\w$]+:(?!:)", code)
                    if label:
                        yield label[0]
                        code = code[label.end() :].strip()
                        continue
                statement, semicolon, code = code.partition(";")
                parts.append(statement)
                code = code.strip()
                if semicolon:
                    self.line = first
                    yield " ".join(parts).strip()
                    parts = []

    def _declare(self, statement: str) -> None:
        space, kind, names = statement.split(None, 2)
        for name in names.split(","):
            several = re.fullmatch(r"([\w$%]+)<(\d+)>", name.strip())
            count = int(several[2]) if several else 1
            first = len(self.kernel.registers) + 1
            self.scopes[-1][several[1] if several else name.strip()] = (first, count if several else None)
            letter = WIDTHS.get(kind.strip("."))
            if letter is None:
                raise self.error(f"unknown type of registers: {kind}")
            self.kernel.registers += [letter] * count
            if space == ".param":
                self.parameters.add(first)

    def _call(self, statement: str) -> None:
        match = re.fullmatch(r"call\.uni\s+([\w$]+)\s*,\s*\(([^)]*)\)", statement)
        if not match or self.functions is None:
            raise self.error(f"a call that returns something, is not uniform or stands in a function: {statement}")
        passed = [self._register(name.strip()) for name in match[2].split(",")]
        widths = [self.kernel.registers[number - 1] for number in passed]
        if match[1] not in self.functions:
            first = len(self.kernel.registers) + 1
            self.functions[match[1]] = list(range(first, first + len(passed)))
            self.kernel.registers += widths
        for register, value, width in zip(self.functions[match[1]], passed, widths, strict=True):
            self._add(f"mov.b{BITS[width]}", Operand("register", register), Operand("register", value))
        self._add("call.uni", Operand("symbol", match[1]))

    def _add(self, name: str, *operands: Operand, guard: int | None = None, negated: bool = False) -> None:
        self.kernel.instructions.append(Instruction(name, operands, guard, negated, self.line, self.location))

    def _register(self, name: str) -> int | None:
        prefix = re.fullmatch(r"(.*?)(\d+)", name)
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name][0]
            if prefix and prefix[1] in scope:
                first, count = scope[prefix[1]]
                if count is not None and int(prefix[2]) < count:
                    return first + int(prefix[2])
        return None

    def _instruction(self, statement: str) -> None:
        match = re.fullmatch(r"(?:@(!?)([\w$%]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
        if not match:
            raise self.error(f"not an instruction: {statement}")
        negated, guard, name, rest = match.groups()
        number = None
        if guard:
            number = self._register(guard)
            if number is None:
                raise self.error(f"undeclared register {guard}")
        # The braces of vectors, and the bar between a register and a predicate, only group operands.
        operands = [
            self._operand(text.strip()) for text in re.split(r"[,|]", re.sub(r"[{}]", "", rest)) if text.strip()
        ]
        if name.startswith(("ld.param", "st.param")) and any(
            o.address and o.value in self.parameters for o in operands
        ):
            name, operands = "mov." + name.rsplit(".", 1)[1], [o._replace(address=False) for o in operands]
        self._add(name, *operands, guard=number, negated=bool(negated))

    def _operand(self, text: str) -> Operand:
        if text.startswith("["):
            inner = text.strip("[] \t").replace(" ", "")
            base, sign, displacement = re.fullmatch(r"([\w$%.]+)(?:(\+-?|-)(\w+))?", inner).groups()  # type: ignore[union-attr]
            distance = int(displacement, 0) if displacement else 0
            kind, value, *_ = self._operand(base)
            return Operand(kind, value, True, -distance if sign in ("-", "+-") else distance)
        number = self._register(text)
        if number is not None:
            return Operand("register", number)
        if text == "_":
            return Operand("sink", text)
        if text.startswith("%"):
            return Operand("special", text)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Operand("immediate", int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Operand("immediate", int(text.rstrip("U"), 0))
        return Operand("symbol", text)
