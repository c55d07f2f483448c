"""Launch configurations: block sizes, warps and pipeline stages of every kernel, one frozen table."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """How a kernel is launched."""

    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    num_warps: int
    num_stages: int = 2


# By kernel and bytes of an element. Chosen from what the compiler makes of them (docs/compile_report.md: no spills on
# sm_90 at D = 64), not from measurements. Exact float32 products take many registers, hence their smaller tiles.
_CONFIGS = {
    "rows": {2: Config(64, 64, 4), 4: Config(64, 32, 8)},
    "weights": {2: Config(64, 64, 8), 4: Config(32, 32, 4)},
    "fwd": {2: Config(64, 64, 8), 4: Config(64, 32, 8)},
    "bwd_rows": {2: Config(64, 64, 8), 4: Config(64, 32, 8)},
    "bwd_rho": {2: Config(64, 32, 8), 4: Config(32, 32, 8)},
    "bwd_dq": {2: Config(64, 32, 8), 4: Config(32, 32, 8)},
    "bwd_dk": {2: Config(32, 32, 4), 4: Config(64, 32, 8)},
}

# The strip kernel keeps whole rows of two frames' maps in registers and makes every element once, where the others take
# three passes. It needs 2^n keys and a few more, so that no work is wasted, one product for all of D, 16-bit operands.
_STRIP = {
    16: Config(64, 16, 4),
    32: Config(64, 32, 4),
    64: Config(64, 64, 4),
    128: Config(64, 128, 8),
    256: Config(64, 256, 8),
}
STRIP_REST = 8  # keys beyond the power of two, each a column of its own

LARGEST_BLOCK = 64
MAX_CHUNK = 16  # pairs of one program, whose row or column sums stay in registers


def config(kernel: str, dtype: torch.dtype) -> Config:
    """For a kernel, am_flow_{kernel}_kernel, and the dtype of q and k."""
    return _CONFIGS[kernel][dtype.itemsize]


def strip(Nk: int, D: int, dtype: torch.dtype) -> Config | None:
    """For the strip kernel, whose BLOCK_N is the keys of its tile; None where the tiled kernels are to run."""
    config = _STRIP.get(1 << (Nk.bit_length() - 1))
    fits = config is not None and Nk - config.BLOCK_N <= STRIP_REST and block_d(D) >= D and dtype.itemsize == 2
    return config if fits else None


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
