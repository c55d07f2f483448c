"""Sums and products that a compiled kernel computes in several layouts, hence in several orders.

A sum in another order has other bits. A kernel that computes maps at two places of its code, in two layouts, would give
equal frames different maps, and its results would depend on how frames are divided among programs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

LIBRARY = "triton/language/"  # Triton's own functions, such as tl.sum, which many lines of the kernels call
PRODUCT = r"= (tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\s"
NESTED = r"(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*"
OPERAND = rf"(?:tensor|!ttg\.memdesc)<([\dx]+)x\w+({NESTED})>"  # its shape, and the rest of the type: the layout


def findings(ttgir: str) -> list[str]:
    """Float sums of one source line, shape and axis in several layouts, and products of one source line and one pair of
    shapes by several kinds of instruction. Layouts don't matter to products: each element of one is summed by one
    thread or instruction.

    ttgir: a compiled kernel's `asm["ttgir"]`, where layouts are chosen.
    """
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))
    layouts = dict(re.findall(r"^(#\w+) = (#ttn?g\..*)$", ttgir, re.M))
    found: dict[str, set[str]] = defaultdict(set)
    reduce = body = ""
    for line in ttgir.splitlines():
        if '"tt.reduce"' in line:
            reduce, body = line, ""
        elif reduce:
            body += line
            if "}) : (" in line:
                shape, layout = re.findall(OPERAND, line)[0]
                if "arith.addf" in body:
                    axis = re.findall(r"axis = (\d+)", reduce)[0]
                    found[f"{_place(line, places)}: sum of {shape} along axis {axis}"].add(
                        _written_out(layout, layouts)
                    )
                reduce = ""
        elif product := re.search(PRODUCT, line):
            (x, _), (y, _), (_, layout) = re.findall(OPERAND, line)[:3]
            kind = re.findall(r"#\w+\.\w+|versionMajor = \d+|version = \d+", _written_out(layout, layouts))
            found[f"{_place(line, places)}: product of {x} and {y}"].add(" ".join([product[1], *kind]))
    return [f"{what} in {len(ways)} ways: {'; '.join(sorted(ways))}" for what, ways in found.items() if len(ways) > 1]


def _written_out(layout: str, layouts: dict[str, str]) -> str:
    """A layout with the aliases of the module's head replaced."""
    return re.sub(r"#\w+\b(?!\.)", lambda alias: layouts.get(alias[0], alias[0]), layout.strip(", "))


def _place(line: str, places: dict[str, str]) -> str:
    """File and line of the innermost call that is not in Triton's library."""
    stack = re.findall(r"loc\((.*)\)$", line)
    while stack:
        place = stack.pop(0)
        place = places.get(place, place)
        if (source := re.match(r'"([^"]+)":(\d+)', place)) and LIBRARY not in source[1]:
            return f"{Path(source[1]).name}:{source[2]}"
        call = re.match(r'(?:callsite|"[^"]*")\((.*?)(?: at (.*))?\)$', place)
        if call:
            stack = [inner for inner in call.groups() if inner] + stack
    return "unknown place"
