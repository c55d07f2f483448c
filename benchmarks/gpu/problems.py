"""The problems that the GPU suite solves: which they are, and why each is there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from amflow_kernels import testing as tt
from amflow_kernels.impl import cuda
from amflow_kernels.impl.triton import configs
from amflow_kernels.problem import MatmulProblem, Problem
from benchmarks.gpu.stub_driver import PROCESSORS, SHARED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = configs.Device(90, SHARED[90], PROCESSORS)
D = 64
USUAL = (257, 197, 577, 65, 129, 730)  # tokens tried first by `sizes`
FAR = 2**30 + 8  # elements between frames: three frames need offsets of more than 32 bits
EXACT = ((65, FP16), (129, BF16), (197, BF16), (257, FP16), (600, BF16), (257, FP32))  # tokens and dtypes


@dataclass(frozen=True)
class Case:
    """One call of the library: how to make its problem, and which implementation has to solve it."""

    tokens: tuple[int, int] = (257, 257)  # queries, keys
    D: int = D
    B: int = 1
    T: int = 3
    groups: tuple[int, ...] = (2,)
    dtype: torch.dtype = BF16
    layout: str = "contiguous"  # of `testing.make_qk`; "far": frames lie `FAR` elements apart
    frame_step: float = 0.2
    logit_std: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    pair: bool = False
    lse: bool = False  # the rows' log-sum-exps are given
    features: int = 0  # columns of x: the motion operator instead of the flow
    only_q: bool = False  # a gradient is asked for q and not for k, too
    processors: int | None = None  # the launches see this number, by which they choose the size of chunks
    impl: str = "triton"

    def __str__(self) -> str:
        standard = Case()
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(standard, f.name)}
        options = changed.pop("options", {})
        shown = {"tokens": self.tokens, "dtype": self.dtype, **changed, **options}
        return ", ".join(f"{name} {value}" for name, value in shown.items()).replace("torch.", "")

    def problem(self, device: str) -> Problem | MatmulProblem:
        """The call; on the device "meta" without storage, else with synthetic frames."""
        q, k = self._frames(device)
        if self.features:
            transpose, lag = self.options.get("transpose", False), self.options.get("lag", 1)
            x = tt.make_features(q, k, self.features, lag=lag, transpose=transpose)
            return MatmulProblem(q, k, x=x, **self.options)
        if self.pair:
            return Problem(q[:, :-1], k[:, :-1], q_b=q[:, 1:], k_b=k[:, 1:], **self.options)
        lse = torch.logsumexp(self.D**-0.5 * (q.double() @ k.double().mT), -1).float() if self.lse else None
        return Problem(q, k, lse=lse, **self.options)

    def _frames(self, device: str) -> tuple[Tensor, Tensor]:
        shapes = [(self.B, self.T, *self.groups, n, self.D) for n in self.tokens]
        if self.layout == "far":
            return _far(shapes[0], self.dtype, device), _far(shapes[1], self.dtype, device)
        if device == "meta" and self.layout == "contiguous":  # the timed clips are large
            q, k = (torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes)
            return q, k
        return tt.make_qk(
            self.B,
            self.T,
            self.groups,
            *self.tokens,
            self.D,
            dtype=self.dtype,
            frame_step=self.frame_step,
            logit_std=self.logit_std,
            layout=self.layout,
            device=device,
        )


def _far(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Frames that lie `FAR` elements apart; the memory between them is not touched."""
    near = torch.empty(shape, device="meta")
    memory = torch.empty((shape[1] - 1) * FAR + near.numel(), dtype=dtype, device=device)
    far = memory.as_strided(shape, (0, FAR, *near.stride()[2:]))
    B, T, *groups, N, head = shape
    q, _ = tt.make_qk(B, T, groups, N, N, head, dtype=dtype, device=device)
    return far.copy_(q)


def correctness() -> list[Case]:
    """Every branch of the choice between kernels, every dtype and every option, each in as few problems as possible."""
    cases = [Case((N, N), dtype=dtype) for dtype in (BF16, FP16) for N in sizes(dtype)]
    cases += [Case((N, N), dtype=FP32, groups=(1,)) for N in (1, 64, 257, 577)]
    cases += [
        # Head dimensions: two and four blocks of columns, and odd ones.
        Case((70, 70), 17, dtype=FP16, layout="offset"),
        Case((70, 70), 40),
        Case((70, 70), 128, dtype=FP16),
        Case((70, 70), 256),
        Case((70, 70), 256, dtype=FP32),
        # Layouts in memory.
        Case((90, 90), 17, dtype=FP32, layout="offset"),
        Case((257, 257), layout="fused_qkv"),
        Case((730, 730), layout="shared_keys"),
        Case((100, 100), layout="tokens_first"),
        Case((65, 65), layout="far", dtype=FP16, groups=(1,)),
        # Other shapes: windows, more queries than keys and the other way round, a long clip.
        Case((16, 64), groups=(2, 3), dtype=FP16),
        Case((300, 70)),
        Case((70, 577), dtype=FP16),
        Case((257, 257), T=18, groups=(1,), processors=1),
        # Hardly any motion, and peaked maps.
        Case((257, 257), frame_step=1e-3),
        Case((730, 730), frame_step=1e-3),
        Case((257, 257), frame_step=1e-3, dtype=FP32),
        Case((257, 257), logit_std=6.0, dtype=FP16),
        Case((730, 730), logit_std=6.0),
        # Forms and options, by strips and by tiles.
        Case((257, 257), pair=True, only_q=True),
        Case((730, 730), pair=True, dtype=FP16),
        Case((730, 730), lse=True, logit_std=3.0, only_q=True),
        Case((257, 257), T=5, options={"lag": 2}),
        Case((730, 730), T=5, options={"lag": 2}, groups=(1,)),
        Case((257, 257), options={"temperature": 0.25}),
        Case((730, 730), options={"temperature": 0.25}, dtype=FP16),
        Case((257, 257), options={"temperature": 3.0}),
        Case((257, 257), options={"scale": -0.2}, dtype=FP16),
        Case((257, 257), options={"head_reduction": "mean"}),
        Case((257, 257), options={"head_reduction": "mean_map"}),
        Case((730, 730), options={"head_reduction": "mean_map"}, lse=True),
        Case((257, 257), options={"head_reduction": "mean_map"}, dtype=FP32),
    ]
    return cases


def for_cuda(cases: list[Case]) -> list[Case]:
    """Those of the cases that the CUDA kernels can solve, without sizes between which they make no difference."""
    tokens = (1, 64, 197, 257, 577, 70, 90, 300)
    return [
        replace(case, impl="cuda")
        for case in cases
        if case.tokens[0] in tokens and fits_cuda(*case.tokens, case.D) and not (case.lse or case.features)
    ]


def motion() -> list[Case]:
    """Products with the motion operator: one column, one block of columns, several."""
    return [
        Case((257, 257), features=1),
        Case((257, 257), features=64, options={"transpose": True, "softmax": True}),
        Case((100, 100), features=256, options={"softmax": True, "temperature": 0.25}, dtype=FP16),
        Case((197, 197), features=64, options={"transpose": True}, dtype=FP32, groups=(1,)),
        Case((70, 90), features=256, options={"softmax": True}, dtype=FP32, groups=(1,)),
    ]


def exactness() -> list[Case]:
    """Clips whose results must be the same to the bit: as they are, then in chunks of every length."""
    clips = [Case((N, N), T=9, dtype=dtype) for N, dtype in EXACT]
    return [replace(clip, processors=processors) for clip in clips for processors in (None, 1, 10**6)]


def sizes(dtype: torch.dtype) -> list[int]:
    """The fewest tokens of a square map that reach every branch, the usual sizes first."""
    reached: set[object] = set()
    chosen = []
    for N in (*USUAL, *range(1, 700)):
        found = branches(N, N, D, dtype)
        if dtype != BF16:  # float16 takes other configurations in the backward only
            found = {branch for branch in found if branch[0] != "strip"}
        if found - reached:
            chosen.append(N)
            reached |= found
    return chosen


def branches(Nq: int, Nk: int, D: int, dtype: torch.dtype) -> set[tuple[str, object]]:
    """The configurations by which a problem is launched; two that differ in the number of tiles are one branch.

    None stands for the tiled kernels.
    """
    strip = configs.strip(Nk, D, dtype, H100)
    found: set[tuple[str, object]] = set()
    found.add(("strip", strip and replace(strip, KEY_TILES=min(2, strip.KEY_TILES), REST=min(2, strip.REST))))
    for kernel, n in (("bwd_strip_q", Nk), ("bwd_strip_k", Nq)):
        gradient = configs.gradient_strip(kernel, n, D, dtype)
        found.add((kernel, gradient and replace(gradient, TILES=min(2, gradient.TILES))))
    return found


def fits_cuda(Nq: int, Nk: int, D: int) -> bool:
    """Whether the CUDA kernels take these sizes."""
    return max(Nq, Nk) <= cuda.MAX_TOKENS and D <= cuda.MAX_HEAD_DIM
