"""Offsets that a compiled kernel computes in 32 bits although strides need 64."""

from __future__ import annotations

import re


def findings(ttir: str) -> list[str]:
    """Products of a kernel's argument, a stride or a size, in 32 bits, where they can overflow.

    Other 32-bit products number rows and keys: of a program's block and the size of a block, for example.

    ttir: a compiled kernel's `asm["ttir"]`, for tensors whose strides pass 2^31.
    """
    signature = next(line for line in ttir.splitlines() if "tt.func public" in line)
    arguments = set(re.findall(r"(%[\w.]+): i32", signature))
    arguments |= {copy for copy, of in re.findall(r"(%[\w.]+) = tt\.splat (%[\w.]+) ", ttir) if of in arguments}
    products = re.findall(r"(\S+) = arith\.muli (%\S+), (%\S+) : (?:i32|tensor<[\dx]+xi32>) ", ttir)
    return [f"{name} = {x} * {y} in 32 bits" for name, x, y in products if x in arguments or y in arguments]
