"""Launch configurations: which kernels run, with what blocks, warps and pipeline stages. One frozen table.

Chosen from what the compiler makes of them (docs/compile_report.md), not measured: no spills, few instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """What a choice depends on."""

    sm: int  # the column of the table: 80, 90 or 100
    shared: int  # bytes of shared memory that a program can have
    processors: int

    @staticmethod
    def of(device: torch.device) -> Device:
        """A GPU as its driver describes it; for the interpreter on a CPU an H100, but with one multiprocessor."""
        if device.type != "cuda":
            return Device(90, 232448, 1)
        found: Any = torch.cuda.get_device_properties(device)
        return Device(
            architecture(found.major, found.minor), found.shared_memory_per_block_optin, found.multi_processor_count
        )


def architecture(major: int, minor: int) -> int:
    """The nearest in the table. GPUs from 12.0 on multiply matrices as those of 8.x do, and not as those of 10.x."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


@dataclass(frozen=True)
class Config:
    """How a tiled kernel is launched."""

    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class Strip:
    """How the strip kernel is launched, and how it cuts up the maps (kernels/strip.py)."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int = 2
    ROW_TILES: int = 1
    KEY_TILES: int = 1
    REST: int = 0
    PARTIAL: bool = False

    @property
    def rows(self) -> int:
        """Of the maps, in one program."""
        return self.ROW_TILES * self.BLOCK_M


@dataclass(frozen=True)
class GradientStrip:
    """How a strip kernel of the backward is launched: a program owns BLOCK_M rows (or BLOCK_N keys), and all keys (or
    rows) are TILES tiles of the other and REST more."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    TILES: int
    REST: int
    PARTIAL: bool


# By kernel and bytes of an element. Exact float32 products take many registers, hence their smaller tiles.
_CONFIGS = {
    ("rows", 2): Config(128, 64, 8),
    ("rows", 4): Config(64, 32, 8),
    ("weights", 2): Config(128, 64, 8),
    ("weights", 4): Config(64, 16, 4),
    ("fwd", 2): Config(64, 128, 8),
    ("fwd", 4): Config(16, 64, 4),
    ("bwd_rows", 2): Config(128, 64, 8),
    ("bwd_rows", 4): Config(32, 32, 4),
    ("bwd_rho", 2): Config(64, 32, 8),
    ("bwd_rho", 4): Config(32, 32, 8),
    ("bwd_dq", 2): Config(64, 32, 4),
    ("bwd_dq", 4): Config(32, 32, 8),
    ("bwd_dk", 2): Config(32, 64, 4),
    ("bwd_dk", 4): Config(32, 32, 8),
    ("matmul_q", 2): Config(64, 32, 4),
    ("matmul_q", 4): Config(32, 32, 4),
    ("matmul_k", 2): Config(32, 64, 4),
    ("matmul_k", 4): Config(32, 32, 4),
}
_OTHERWISE = {  # where an architecture needs another
    (100, "fwd", 2): Config(64, 128, 8, 1),
    (100, "bwd_rows", 2): Config(64, 64, 8),
}
LARGEST_BLOCK = 128
SCRATCH = 16384  # bytes of shared memory that sums across warps may take
MAX_CHUNK = 16  # pairs of one program, whose row or column sums stay in registers


def config(kernel: str, D: int, dtype: torch.dtype, device: Device) -> Config:
    """For a kernel, am_flow_{kernel}_kernel, and the head dimension and dtype of q and k."""
    key = (kernel, dtype.itemsize)
    chosen = _OTHERWISE.get((device.sm, *key), _CONFIGS[key])
    staged = 2 * (chosen.BLOCK_M + chosen.BLOCK_N) * D * dtype.itemsize
    return chosen if staged <= device.shared else replace(chosen, num_stages=1)


def strip(Nk: int, D: int, dtype: torch.dtype, device: Device) -> Strip | None:
    """For the strip kernel, or None where the tiled kernels are to run.

    The strip kernel makes every element of a map once, where the others take three passes. But rows of two frames' maps
    have to fit in registers, and so has q, for one product of all of D with operands of 16 bits.
    """
    if dtype.itemsize != 2 or block_d(D) < D:
        return None
    wide = 1 << (Nk.bit_length() - 1)
    rest = Nk - wide
    # A column costs about as much as eight keys of a tile; more than one fits in registers on Hopper alone.
    if 16 <= wide <= 256 and rest <= (6 if wide == 256 and device.sm == 90 else 1):
        if wide == 256 and device.sm != 90:
            return Strip(32, wide, 4, _stages(3, 288, device), REST=rest)
        return Strip(64, wide, 8 if wide > 64 else 4, REST=rest)
    if Nk < 64:
        return Strip(64, max(16, 2 * wide), 4, PARTIAL=True)
    if Nk <= 192 or (
        Nk <= 224 and (device.sm < 100 or Nk == 224)
    ):  # three stages, which load ahead, where registers suffice
        few = Strip(16, 32, 4, 3 if device.sm == 90 and not 160 < Nk <= 192 else 1, ROW_TILES=2)
    elif Nk < 256:
        few = Strip(32, 64, 4, 1)
    elif Nk <= 512:
        few = Strip(32, 64, 8, _stages(3, Nk + 96, device) if device.sm < 100 else 1)
    else:
        return None
    return replace(few, KEY_TILES=-(-Nk // few.BLOCK_N), PARTIAL=Nk % few.BLOCK_N != 0)


def gradient_strip(kernel: str, n: int, D: int, dtype: torch.dtype) -> GradientStrip | None:
    """For the backward's strip kernels, of n keys ("bwd_strip_q") or rows ("bwd_strip_k"), or None: take the tiled.

    Up to four maps of a strip have to fit in registers. Eight warps side by side need tiles of 64, or they repeat each
    other's work.
    """
    if dtype.itemsize != 2 or block_d(D) < D or n > 320:
        return None
    wide = 32 if n <= 32 else 64
    rest = 1 if n > wide and n % wide == 1 else 0
    half, keys = dtype == torch.float16, kernel == "bwd_strip_k"  # float16 is multiplied as tf32, which takes registers
    owned = 32 if 32 < n <= (128 if half and keys else 192) else 16
    warps, stages = 4 if n <= 64 else 8, 2 if keys and n > 192 else 1
    if keys and n - rest == 256 and not half:
        owned, wide = 32, 256
    blocks = (owned, wide) if kernel == "bwd_strip_q" else (wide, owned)
    return GradientStrip(*blocks, warps, stages, -(-(n - rest) // wide), rest, (n - rest) % wide != 0)


def _stages(wanted: int, rows: int, device: Device) -> int:
    """Pipeline stages of a strip for which so many rows of q and k at once in shared memory have room, or one."""
    return wanted if (wanted - 1) * rows * 2 * 64 + SCRATCH <= device.shared else 1


def tail(n: int, block: int) -> int:
    """Size of the tile for what is left of n rows or keys after whole blocks: a power of two from 16 on; 0 for none."""
    left = n % block
    return max(16, 1 << (left - 1).bit_length()) if left else 0


def block_d(D: int) -> int:
    """Columns of q and k in one step of a product: the widest, at most 64, that pads D no more than 16 would."""
    padded = max(16, (D + 15) // 16 * 16)
    return next(width for width in (64, 32, 16) if padded % width == 0)


def chunk(pairs: int, programs: int, processors: int) -> int:
    """Pairs of a chain in one program, a power of two.

    As many as fit, since every chunk starts with a map that the one before it ended with, but fewer where there would
    not be two programs for every multiprocessor.
    """
    size = 1
    while size < min(pairs, MAX_CHUNK):
        size *= 2
    while size > 1 and programs * -(-pairs // size) < 2 * processors:
        size //= 2
    return size
