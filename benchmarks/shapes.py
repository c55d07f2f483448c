"""The shapes that are timed: (B, T, heads, N, D) as in ``q`` and ``k``."""

from __future__ import annotations

from typing import NamedTuple

FEATURES = 64  # C, the features of each token that the motion operator takes


class Shape(NamedTuple):
    """Shape of q, k and v: batch size, frames, heads, tokens, head dimension."""

    B: int
    T: int
    H: int
    N: int
    D: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that `str` writes, such as 1x8x12x257x64.

        Raises:
            ValueError: it is none, or has fewer than two frames.
        """
        numbers = text.split("x")
        if len(numbers) != len(cls._fields) or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
            raise ValueError(f"expected a shape BxTxHEADSxNxD, such as 1x8x12x257x64, got {text!r}")
        shape = cls(*map(int, numbers))
        if shape.T < 2:
            raise ValueError(f"expected at least 2 frames (the second number), got {text!r}")
        return shape

    def __str__(self) -> str:
        return "x".join(map(str, self))

    def flow(self) -> tuple[int, int, int, int]:
        """Shape of the result, (B, T - 1, H, N)."""
        return self.B, self.T - 1, self.H, self.N

    def features(self) -> tuple[int, int, int, int, int]:
        """Shape of what the motion operator takes and gives, (B, T - 1, H, N, C)."""
        return (*self.flow(), FEATURES)

    def map_flops(self) -> int:
        """Floating-point operations of one product q k^T over every frame and head."""
        return 2 * self.B * self.T * self.H * self.N * self.N * self.D

    def operator_flops(self) -> int:
        """Floating-point operations of one product M x over every pair of frames and head."""
        return 2 * self.B * (self.T - 1) * self.H * self.N * self.N * FEATURES


# Typical image transformers: ViT-B at 224 px with patches of 14 and of 16, at 384 px, ViT-S/14 at 518 px.
TYPICAL = (Shape(1, 8, 12, 257, 64), Shape(2, 16, 12, 197, 64), Shape(1, 8, 12, 577, 64), Shape(1, 4, 6, 1370, 64))

# Regimes in which there is less to gain, or a peer wins.
HARD = {
    Shape(1, 8, 12, 49, 256): "short rows and wide heads: the maps are small compared with q and k, so little is saved",
    Shape(2, 16, 6, 197, 16): "narrow heads: softmaxes, which the product lacks, take most of the time",
    Shape(1, 2, 3, 50, 64): "a tiny clip: mostly call overhead",
}

SHAPES = (*TYPICAL, *HARD)
MEMORY_SHAPES = (TYPICAL[-1],)
SMOKE = Shape(1, 2, 3, 50, 64)
NOTES = {str(shape): note for shape, note in HARD.items()}
