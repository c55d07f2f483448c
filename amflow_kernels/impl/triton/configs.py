"""Launch configurations: which kernels run, with what blocks, warps and pipeline stages. One frozen table.

They were chosen for no spills and few instructions in the compiled code (docs/triton_report.md), not by timing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

AMD_SHARED = 65536  # bytes of local data share for a program on CDNA 2 and 3; PyTorch does not report it


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that configurations depend on."""

    sm: int  # the column of the table: 80, 90 or 100
    shared: int  # bytes of shared memory available to a program
    processors: int

    @staticmethod
    @cache
    def of(device: torch.device) -> Device:
        """The properties that the driver reports; for a CPU (the interpreter), an H100 with one multiprocessor."""
        if device.type != "cuda":
            return Device(90, 232448, 1)
        properties: Any = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Device(80, AMD_SHARED, properties.multi_processor_count)
        return Device(
            architecture(properties.major, properties.minor),
            properties.shared_memory_per_block_optin,
            properties.multi_processor_count,
        )


def architecture(major: int, minor: int) -> int:
    """The column of the table for a compute capability. From 12.0 on, GPUs have the matrix instructions of 8.x."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


@dataclass(frozen=True)
class Config:
    """How a tiled kernel is launched."""

    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    num_warps: int
    num_stages: int = 2
    PARTIAL: bool = False  # whether there are fewer rows or keys than one tile of the inner loop has (backward only)


@dataclass(frozen=True)
class Strip:
    """How the strip kernel is launched, and how it divides the maps (kernels/strip.py)."""

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
        """Rows of a map in one program."""
        return self.ROW_TILES * self.BLOCK_M


@dataclass(frozen=True)
class GradientStrip:
    """How a strip kernel of the backward is launched.

    A program owns BLOCK_M rows and loops over all keys, in TILES tiles of BLOCK_N and REST single keys; or it owns
    BLOCK_N keys and loops over all rows, in TILES tiles of BLOCK_M; at most one row, REST, follows them.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    TILES: int
    REST: int
    PARTIAL: bool


# By kernel and bytes per element. The parts of float32 operands take many registers, hence their smaller tiles.
_CONFIGS = {
    ("rows", 2): Config(128, 64, 8),
    ("rows", 4): Config(128, 64, 8, 1),
    ("weights", 2): Config(128, 64, 8),
    ("weights", 4): Config(64, 32, 4, 1),
    ("fwd", 2): Config(64, 128, 8),
    ("fwd", 4): Config(32, 64, 4, 1),
    ("bwd_rows", 2): Config(64, 64, 4, 1),
    ("bwd_rows", 4): Config(64, 32, 4, 1),
    ("bwd_rho", 2): Config(64, 32, 4, 1),
    ("bwd_rho", 4): Config(64, 32, 4, 1),
    ("bwd_dq", 2): Config(128, 64, 8, 1),
    ("bwd_dq", 4): Config(128, 32, 8, 1),
    ("bwd_dk", 2): Config(64, 64, 4, 1),
    ("bwd_dk", 4): Config(32, 64, 4, 1),
    ("matmul_q", 2): Config(64, 32, 4),
    ("matmul_q", 4): Config(32, 32, 4),
    ("matmul_k", 2): Config(32, 64, 4),
    ("matmul_k", 4): Config(32, 32, 4),
}
_OVERRIDES = {  # by architecture, kernel and bytes per element
    (100, "fwd", 2): Config(64, 128, 8, 1),
    (90, "weights", 4): Config(128, 64, 8, 1),
    (90, "fwd", 4): Config(64, 128, 8, 1),
    (90, "bwd_rows", 4): Config(128, 32, 8, 1),
    (90, "bwd_dk", 2): Config(128, 64, 8, 1),
    (100, "weights", 4): Config(128, 64, 8, 1),
    (100, "bwd_rows", 2): Config(64, 32, 4, 1),
    (100, "bwd_dq", 2): Config(64, 64, 8, 1),
    (100, "bwd_dk", 2): Config(64, 64, 8, 1),
}
LARGEST_BLOCK = 128
SCRATCH = 16384  # bytes of shared memory reserved for sums across warps
MAX_CHUNK = 16  # pairs per program; their row or column sums stay in registers


def config(kernel: str, dtype: torch.dtype, device: Device) -> Config:
    """The configuration of the tiled kernel am_flow_{kernel}_kernel for the dtype of q and k.

    No kernel has more than BLOCK_D columns of q and k in shared memory at a time, which is at most 64 KB for any D.
    """
    key = (kernel, dtype.itemsize)
    return _OVERRIDES.get((device.sm, *key), _CONFIGS[key])


@cache
def strip(Nk: int, D: int, dtype: torch.dtype, device: Device) -> Strip | None:
    """The configuration of the strip kernel, or None if the tiled kernels have to run.

    The strip kernel computes every element of a map once, the tiled kernels in each of three passes. Whole rows of two
    frames' maps and the rows of q must fit in registers, so it takes 16-bit inputs and heads that are one BLOCK_D wide.
    """
    if dtype.itemsize != 2 or block_d(D, dtype) < D:
        return None
    width = 1 << (Nk.bit_length() - 1)
    rest = Nk - width
    # A single key costs about as much as eight keys of a tile. Only Hopper has registers for more than one.
    if 16 <= width <= 256 and rest <= (6 if width == 256 and device.sm == 90 else 1):
        if width == 256 and device.sm != 90:
            return Strip(32, width, 4, _stages(3, 288, device), REST=rest)
        return Strip(64, width, 8 if width > 64 else 4, REST=rest)
    if Nk < 64:
        return Strip(64, max(16, 2 * width), 4, PARTIAL=True)
    if Nk <= 192 or (Nk <= 224 and (device.sm < 100 or Nk == 224)):
        # With enough registers, three stages, so that loads run ahead.
        tiles = Strip(16, 32, 4, 3 if device.sm == 90 and not 160 < Nk <= 192 else 1, ROW_TILES=2)
    elif Nk < 256:
        tiles = Strip(32, 64, 4, 1)
    elif Nk <= 512:
        tiles = Strip(32, 64, 8, _stages(3, Nk + 96, device) if device.sm < 100 else 1)
    elif Nk <= 640 and device.sm < 100:
        tiles = Strip(32, 64, 8, 1, REST=int(Nk % 64 == 1))
    else:
        return None
    in_tiles = Nk - tiles.REST
    return replace(tiles, KEY_TILES=-(-in_tiles // tiles.BLOCK_N), PARTIAL=in_tiles % tiles.BLOCK_N != 0)


@cache
def gradient_strip(kernel: str, n: int, D: int, dtype: torch.dtype) -> GradientStrip | None:
    """The configuration of a strip kernel of the backward, or None if the tiled kernels have to run.

    n is the number of keys for "bwd_strip_q", of rows for "bwd_strip_k". Up to four maps of a strip must fit in
    registers. Eight warps side by side need tiles 64 wide, or they repeat each other's work.
    """
    if dtype.itemsize != 2 or block_d(D, dtype) < D or n > 320:
        return None
    width = 32 if n <= 32 else 64
    rest = 1 if n > width and n % width == 1 else 0
    owns_keys = kernel == "bwd_strip_k"
    float16 = dtype == torch.float16  # multiplied as TF32, which takes more registers
    owned = 32 if 32 < n <= (128 if float16 and owns_keys else 192) else 16
    warps, stages = 4 if n <= 64 else 8, 2 if owns_keys and n > 192 else 1
    if owns_keys and n - rest == 256 and not float16:
        owned, width = 32, 128
    blocks = (width, owned) if owns_keys else (owned, width)
    return GradientStrip(*blocks, warps, stages, -(-(n - rest) // width), rest, (n - rest) % width != 0)


def _stages(wanted: int, rows: int, device: Device) -> int:
    """The wanted pipeline stages if shared memory holds them, at this many rows of q and k per stage; otherwise 1."""
    return wanted if (wanted - 1) * rows * 2 * 64 + SCRATCH <= device.shared else 1


def tail(n: int, block: int) -> int:
    """Size of the tile for the rows or keys of n that whole blocks leave: a power of two, at least 16; 0 if none."""
    remaining = n % block
    return max(16, 1 << (remaining - 1).bit_length()) if remaining else 0


def block_d(D: int, dtype: torch.dtype) -> int:
    """Columns of q and k in one step of a product: at most 128 bytes, and the widest that pads D no further than 16."""
    padded = max(16, (D + 15) // 16 * 16)
    return next(width for width in (64, 32, 16) if padded % width == 0 and width * dtype.itemsize <= 128)


def chunk(pairs: int, programs: int, processors: int) -> int:
    """Pairs of a chain in one program, a power of two.

    Chunks are as long as MAX_CHUNK allows, since each recomputes the map that the chunk before it ended with. They are
    shorter where there would be fewer than two programs for each multiprocessor.
    """
    size = 1
    while size < min(pairs, MAX_CHUNK):
        size *= 2
    while size > 1 and programs * -(-pairs // size) < 2 * processors:
        size //= 2
    return size
