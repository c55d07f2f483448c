"""AM flow in plain PyTorch by blocks of query rows: any device, any dtype, bounded memory.

It runs where no kernel does. Only the maps of one block exist at a time, and gradients compute them again. The formulas
are derived in docs/maths.md. Nothing depends on the values of tensors, so it runs on meta tensors, too.

All tensors have six dimensions here, (batch, frames or pairs, heads, windows, tokens, D), with one window if
G = (heads,). The maps of a block are (batch, pairs, heads, windows, rows, Nk), of slices of all but the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from amflow_kernels.impl.base import Implementation, clear_unpaired, empty_gradients
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

MEMORY = 64 << 20  # bytes
FEW_ROWS = 32  # a block takes so many rows, of all its heads, before a second pair: fewer make slow matrix products
GROWTH = ("steps", "rows", "heads", "windows", "batch")  # what a block takes more of first, while it fits
HEADS = 2  # the heads' dimension

Maps = tuple[Tensor, Tensor]  # of the first and of the second frames of pairs


class Chunked(Implementation):
    """Plain PyTorch by blocks of query rows.

    Args:
        memory: bytes that a call may take besides its inputs and results, unless a few rows of one pair take more.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        flow = problem.q.new_zeros(problem.flow_shape, dtype=problem.result_dtype)
        result = _flow_rows(problem, flow)
        per_row, per_frame = 2 * problem.Nk + problem.D, (problem.D + 3) * problem.Nk
        with _no_autocast(problem):
            for chain in _chains(problem):
                for block in self._blocks(chain, per_row, per_frame):
                    frames = _Frames(chain, block)
                    centre = torch.zeros((), device=flow.device, dtype=flow.dtype)
                    for rows in block.rows:
                        centre = centre + _centre_of_rows(problem, frames.maps(rows))
                    if problem.head_reduction == "mean":
                        centre = centre.sum(HEADS, keepdim=True) / problem.heads
                    block.of(chain.of(result)).add_(centre)
        return flow if problem.center else flow.add_(problem.Nq / problem.Nk), None

    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        heads = 1 if problem.head_reduction == "none" else problem.heads
        g = _flow_rows(problem, _without_mean(dflow.to(problem.result_dtype) / heads, -1))

        def rows_of(chain: _Chain, block: _Block) -> Callable[[slice], Tensor]:
            g_block = block.of(chain.of(g))
            return lambda rows: g_block

        grads = empty_gradients(problem.frames, needs)
        self._map_gradients(problem, rows_of, grads, softmax=True)
        return grads

    def matmul(self, problem: MatmulProblem) -> Tensor:
        y = problem.q.new_empty(problem.product_shape, dtype=problem.result_dtype)
        self._multiply(problem, problem.x, problem.transpose, y)
        return y

    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        *grads, dx = empty_gradients((*problem.frames, problem.x), needs)
        if needs[4]:
            self._multiply(problem, dy, not problem.transpose, dx)
        u, v = (problem.x, dy) if problem.transpose else (dy, problem.x)  # of the queries, of the keys
        u, v = _with_windows(u, problem), _with_windows(v, problem)

        def rows_of(chain: _Chain, block: _Block) -> Callable[[slice], Tensor]:
            u_block, v_block = (block.of(chain.of(x)).to(problem.result_dtype) for x in (u, v))
            if problem.softmax:  # a constant in a column of v has no effect: without it equal v give exactly 0
                v_block = _without_mean(v_block, -2)
            return lambda rows: u_block[..., rows, :] @ v_block.mT

        self._map_gradients(problem, rows_of, grads, softmax=problem.softmax)
        return (*grads, dx)

    def describe(self, problem: MapPairs | None = None) -> list[str]:
        return [] if problem is None else [f"by blocks of query rows, in {self.memory >> 20} MB"]

    def _multiply(self, problem: MatmulProblem, x: Tensor, transpose: bool, result: Tensor) -> None:
        """Writes the operator, or its transpose, times x to `result`."""
        x, result = _with_windows(x, problem), _with_windows(result, problem)
        per_row, per_frame = 3 * problem.Nk + problem.D + 2 * problem.C, (problem.D + 4 * problem.C) * problem.Nk
        multiply = _multiply_transposed if transpose else _multiply
        with _no_autocast(problem):
            for chain in _chains(problem):
                for block in self._blocks(chain, per_row, per_frame):
                    x_block, y_block = block.of(chain.of(x)).to(problem.result_dtype), block.of(chain.of(result))
                    multiply(problem, _Frames(chain, block), block, x_block, y_block)

    def _map_gradients(
        self,
        problem: MapPairs,
        upstream: Callable[[_Chain, _Block], Callable[[slice], Tensor]],
        grads: Sequence[Tensor],
        *,
        softmax: bool,
    ) -> None:
        """Writes dq, dk, dq_b, dk_b, those with elements, for the gradient of M, or with `softmax` of P.

        `upstream` gives that of rows of a block, (..., rows, Nk), or (..., 1, Nk) if it is the same for all rows.
        """
        C = problem.C if isinstance(problem, MatmulProblem) else 0
        per_row, per_frame = 5 * problem.Nk + 3 * problem.D + 2 * C, 3 * (problem.D + C) * problem.Nk
        results = [_with_windows(grad, problem) if grad.numel() else None for grad in grads]
        clear_unpaired(problem, grads)
        with _no_autocast(problem):
            for chain in _chains(problem):
                own = [None if grad is None else chain.of(grad) for grad in results]
                for block in self._blocks(chain, per_row, per_frame, of_frames=True):
                    _block_gradients(problem, _Frames(chain, block), block, upstream(chain, block), own, softmax)

    def _blocks(self, chain: _Chain, per_row: int, per_frame: int, *, of_frames: bool = False) -> Iterator[_Block]:
        """Blocks that cover all pairs of a chain once, or all its frames, of a size that fits the memory.

        per_row: elements that a block allocates for each row of a frame's map. per_frame: elements besides those.
        """
        problem = chain.problem
        windows = problem.q.shape[3] if problem.q.dim() == 6 else 1
        all_heads = isinstance(problem, Problem) and problem.head_reduction == "mean_map"
        steps = chain.num_pairs + (1 if of_frames and not problem.pair else 0)
        most = {"rows": problem.Nq, "steps": steps, "heads": problem.heads, "windows": windows, "batch": problem.B}
        size = dict.fromkeys(most, 1) | ({"heads": problem.heads} if all_heads else {})

        def elements(**changed: int) -> int:
            s = size | changed
            frames = 2 * s["steps"] if problem.pair else s["steps"] + (2 if of_frames else 1)
            return s["batch"] * s["windows"] * s["heads"] * frames * (s["rows"] * per_row + per_frame)

        limit = self.memory * 8 // torch.finfo(problem.result_dtype).bits
        few_rows = min(max(1, FEW_ROWS // size["heads"]), problem.Nq)
        for name, n in (("rows", few_rows), *((name, most[name]) for name in GROWTH)):
            fixed = elements(**{name: 0})
            size[name] = max(size[name], min(n, (limit - fixed) // (elements(**{name: 1}) - fixed)))
        cuts = {name: _even_slices(most[name], size[name]) for name in most}
        for b, w, h, own in product(cuts["batch"], cuts["windows"], cuts["heads"], cuts["steps"]):
            pairs = own
            if steps > chain.num_pairs:
                pairs = slice(max(own.start - 1, 0), min(own.stop, chain.num_pairs))
            yield _Block(b, pairs, h, w, cuts["rows"], own)


@dataclass(frozen=True)
class _Block:
    """Slices of the batch, of a chain's pairs, of heads and windows; all rows, in slices."""

    b: slice
    pairs: slice
    h: slice
    w: slice
    rows: list[slice]
    own: slice  # the frames whose gradients it computes

    def of(self, x: Tensor, steps: slice | None = None) -> Tensor:
        """The block's part of a chain's tensor. Its pairs unless `steps` says other pairs or frames."""
        h = self.h if x.shape[HEADS] > 1 else slice(None)  # reduced heads
        return x[self.b, self.pairs if steps is None else steps, h, self.w]


@dataclass(frozen=True)
class _Chain:
    """Frames of which each is in a pair with the next: every lag-th of a clip. Or in pair form, two sets of frames."""

    problem: MapPairs
    first: int  # its first frame

    def of(self, x: Tensor) -> Tensor:
        """The chain's part of a tensor with a dimension 1 of frames, or of pairs."""
        return x[:, self.first :: max(self.problem.shift, 1)]

    @property
    def num_pairs(self) -> int:
        return len(range(self.first, self.problem.P, max(self.problem.shift, 1)))

    @property
    def sets(self) -> list[tuple[Tensor, Tensor]]:
        """q and k of a clip, or of the first and of the second frames of pairs."""
        q, k, q_b, k_b = (None if x is None else self.of(_with_windows(x, self.problem)) for x in self.problem.frames)
        assert q is not None
        assert k is not None
        return [(q, k)] if q_b is None or k_b is None else [(q, k), (q_b, k_b)]


def _chains(problem: MapPairs) -> list[_Chain]:
    return [_Chain(problem, first) for first in range(min(max(problem.shift, 1), problem.P))]


class _Frames:
    """Queries, keys and maps of the frames of a block's pairs."""

    def __init__(self, chain: _Chain, block: _Block) -> None:
        problem, pairs = chain.problem, block.pairs
        frames = pairs if problem.pair else slice(pairs.start, pairs.stop + 1)
        dtype = problem.result_dtype
        self.scale = problem.logit_scale
        self.sets = [(block.of(q, frames), block.of(k, frames).to(dtype).contiguous()) for q, k in chain.sets]

    def queries(self, rows: slice) -> list[Tensor]:
        """Those of each set of frames."""
        return [q[..., rows, :].to(k.dtype) for q, k in self.sets]

    def maps(self, rows: slice) -> list[Tensor]:
        """A = softmax_keys(scale * q k^T) of each set of frames."""
        maps = []
        for q, (_, k) in zip(self.queries(rows), self.sets, strict=True):
            q3, k3 = q.flatten(0, -3), k.flatten(0, -3)
            logits = torch.baddbmm(q3.new_zeros(()), q3, k3.mT, beta=0, alpha=self.scale or 1.0)
            if self.scale == 0:  # with alpha = 0 the product is left out, and NaN of q and k are lost
                logits.mul_(0.0)
            A = torch.softmax(logits, -1).unflatten(0, q.shape[:-2])
            del logits
            # `softmax` sums long rows less exactly than `sum`. That error is the same for equal rows, and adds up.
            maps.append(A.div_(A.sum(-1, keepdim=True)))
        return maps


def _pairs(problem: MapPairs, maps: list[Tensor]) -> Maps:
    """The two maps of each pair: of the heads' mean with "mean_map"."""
    if isinstance(problem, Problem) and problem.head_reduction == "mean_map":
        maps = [A.mean(HEADS, keepdim=True) for A in maps]
    return (maps[0], maps[1]) if problem.pair else (maps[0][:, :-1], maps[0][:, 1:])


def _row_weights(A_a: Tensor, A_b: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """e = expm1(M / temperature), its row mean ebar, and w = 1 / (Nk (1 + ebar)), so that P = w (1 + e)."""
    e = (A_a - A_b).abs_().div_(temperature).expm1_()
    ebar = e.mean(-1, keepdim=True)
    return e, ebar, 1 / (e.shape[-1] * (1 + ebar))


# Each function of rows frees all maps when it returns, before the next rows need memory.


def _centre_of_rows(problem: Problem, maps: list[Tensor]) -> Tensor:
    """Some rows' part of flow - Nq / Nk."""
    e, ebar, w = _row_weights(*_pairs(problem, maps), problem.temperature)
    return e.sub_(ebar).mul_(w).sum(-2, keepdim=True)


def _multiply(problem: MatmulProblem, frames: _Frames, block: _Block, x: Tensor, y: Tensor) -> None:
    """Writes M x, or P x = w sum of x + w e x, of a block to y. w multiplies e first: w x could underflow."""
    total = _precise_sum(x) if problem.softmax else None

    def product_of_rows(maps: list[Tensor]) -> Tensor:
        A_a, A_b = _pairs(problem, maps)
        if total is None:
            return (A_a - A_b).abs_() @ x
        e, _, w = _row_weights(A_a, A_b, problem.temperature)
        return w * total + e.mul_(w) @ x

    for rows in block.rows:
        y[..., rows, :] = product_of_rows(frames.maps(rows))


def _multiply_transposed(problem: MatmulProblem, frames: _Frames, block: _Block, x: Tensor, y: Tensor) -> None:
    """Writes M^T x, or P^T x = sum of w x + (w e)^T x, of a block to y."""
    sums, total = x.new_zeros(*x.shape[:-2], problem.Nk, problem.C), x.new_zeros(*x.shape[:-2], 1, problem.C)

    def add_rows(maps: list[Tensor], terms: Tensor) -> None:
        A_a, A_b = _pairs(problem, maps)
        if problem.softmax:
            e, _, w = _row_weights(A_a, A_b, problem.temperature)
            total.add_(_precise_sum(w * terms))
            change = e.mul_(w)
        else:
            change = (A_a - A_b).abs_()
        sums.add_(change.mT @ terms)

    for rows in block.rows:
        add_rows(frames.maps(rows), x[..., rows, :])
    y.copy_(sums + total)


def _block_gradients(
    problem: MapPairs,
    frames: _Frames,
    block: _Block,
    upstream: Callable[[slice], Tensor],
    grads: Sequence[Tensor | None],
    softmax: bool,
) -> None:
    """Writes a block's part of a chain's dq, dk, dq_b, dk_b."""
    skipped = block.own.start - block.pairs.start  # frames that only the pairs need
    own = slice(skipped, skipped + block.own.stop - block.own.start)
    dk_sums = [torch.zeros_like(k[:, own]) for _, k in frames.sets]

    def add_rows(rows: slice, maps: list[Tensor]) -> None:
        S_dM = _signed_gradient(*_pairs(problem, maps), upstream(rows), problem.temperature, softmax)
        dA_of_sets = [S_dM, -S_dM] if problem.pair else [_gradient_of_frames(S_dM, block)]
        del S_dM
        queries = frames.queries(rows)
        for i, (A, dA) in enumerate(zip(maps, dA_of_sets, strict=True)):
            dq, dk = grads[2 * i : 2 * i + 2]
            dlogits = _softmax_gradient(A[:, own], dA)
            if dq is not None:
                block.of(dq, block.own)[..., rows, :] = (dlogits @ frames.sets[i][1][:, own]).mul_(frames.scale)
            if dk is not None:
                dk_sums[i] += dlogits.mT @ (frames.scale * queries[i][:, own])

    for rows in block.rows:
        add_rows(rows, frames.maps(rows))
    for dk, total in zip(grads[1::2], dk_sums, strict=False):
        if dk is not None:
            block.of(dk, block.own).copy_(total)


def _signed_gradient(A_a: Tensor, A_b: Tensor, G: Tensor, temperature: float, softmax: bool) -> Tensor:
    """S * dM for the gradient G of M, or with `softmax` of P."""
    difference = A_a - A_b
    if not softmax:  # sign(NaN) is 0, but what a NaN row moves has a gradient of NaN
        return difference.sign().masked_fill_(difference.isnan(), math.nan).mul_(G)
    e = (difference.abs() / temperature).expm1_()
    w = 1 / (e.shape[-1] * (1 + e.mean(-1, keepdim=True)))
    P = e.add_(1).mul_(w)
    dM = P * G
    delta = dM.sum(-1, keepdim=True)
    return torch.sub(G, delta, out=dM).mul_(P).mul_(difference.sign_()).div_(temperature)


def _gradient_of_frames(S_dM: Tensor, block: _Block) -> Tensor:
    """dA of the block's own frames: S * dM of the pair that each begins, minus that of the pair that it ends."""
    first, last = block.own.start, block.own.stop
    dA = S_dM.new_zeros(S_dM.shape[0], last - first, *S_dM.shape[2:])
    begun = S_dM[:, first - block.pairs.start :]
    dA[:, : begun.shape[1]] = begun
    ended = S_dM[:, : last - block.pairs.start - 1]
    dA[:, dA.shape[1] - ended.shape[1] :] -= ended
    return dA


def _softmax_gradient(A: Tensor, dA: Tensor) -> Tensor:
    """dlogits = A (dA - rowsum(A dA))."""
    dlogits = A * dA
    rho = dlogits.sum(-1, keepdim=True)
    return torch.sub(dA, rho, out=dlogits).mul_(A)


def _without_mean(x: Tensor, dim: int) -> Tensor:
    """x less its mean, which is taken twice: the second one removes what rounding left of the first."""
    x = x - x.mean(dim, keepdim=True)
    return x - x.mean(dim, keepdim=True)


def _precise_sum(x: Tensor) -> Tensor:
    """Sum over dimension -2, kept, with the rounding errors of every addition added (Knuth's two-sum).

    float64 would do as well, but not every device has it.
    """
    error = torch.zeros_like(x[..., :1, :])
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        a, b, rest = x[..., :half, :], x[..., half : 2 * half, :], x[..., 2 * half :, :]
        s = a + b
        t = s - a
        error += ((a - (s - t)) + (b - t)).sum(-2, keepdim=True)
        x = torch.cat([s, rest], -2)
    return x + error.nan_to_num(0.0, 0.0, 0.0)  # of infinite terms it is NaN


def _with_windows(x: Tensor, problem: MapPairs) -> Tensor:
    return x if problem.q.dim() == 6 else x.unsqueeze(3)


def _flow_rows(problem: Problem, flow: Tensor) -> Tensor:
    """A view (B, P, heads, windows, 1, Nk) of a flow or its gradient; reduced heads have size 1."""
    rows = (flow if problem.head_reduction == "none" else flow.unsqueeze(HEADS)).unsqueeze(-2)
    return _with_windows(rows, problem)


def _even_slices(n: int, most: int) -> list[slice]:
    """range(n) cut into the fewest slices of at most `most`, of almost one size."""
    size = math.ceil(n / math.ceil(n / most))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _no_autocast(problem: MapPairs) -> AbstractContextManager[None]:
    device = problem.q.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
