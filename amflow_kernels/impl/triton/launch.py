"""Host code of the Triton kernels: shapes and strides in, memory and launches out. Meaning as in the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import e, log2, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amflow_kernels.impl.base import empty_gradients
from amflow_kernels.impl.gpu import new_saved, saved_sizes, subtract_mean
from amflow_kernels.impl.triton import configs
from amflow_kernels.impl.triton.kernels import backward, forward, matmul, strip, strip_backward
from amflow_kernels.impl.triton.kernels.maps import Frames, Pairs
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

HEADS = 2  # the heads' dimension in (B, T, heads, ...)
LARGEST_FEATURES = 64  # columns of x that one program multiplies
FLOW = {"C": 0, "SOFTMAX": True}  # a gradient of flows, and not of products with features
TINY = torch.finfo(torch.float32).tiny


class _Problem:
    """One call's arguments in the form that the kernels take."""

    def __init__(self, problem: MapPairs, saved: Tensor) -> None:
        q, k, q_b, k_b = problem.frames
        scale = problem.logit_scale
        self.B, self.T, self.H = q.shape[:3]
        self.G = q.shape[3] if q.dim() == 6 else 1
        self.Nq, self.Nk, self.D = problem.Nq, problem.Nk, problem.D
        self.P = problem.P
        self.scale = scale
        self.mean_map = isinstance(problem, Problem) and problem.head_reduction == "mean_map"
        self.Z = 1 if self.mean_map else self.H
        self.q = q
        self.pair = problem.pair
        self.step = self.P if self.pair else problem.lag
        *statistics, self.e_sum = saved.split(saved_sizes(problem))
        tensors = [q, k]
        self.first = self.second = self._frames(q, k, *statistics[:2])
        if q_b is not None and k_b is not None:
            tensors += [q_b, k_b]
            self.second = self._frames(q_b, k_b, *statistics[2:])
        scale_log2 = max(abs(scale) * log2(e), TINY)  # a scale of 0 would make NaN of -inf
        self.pairs = Pairs(
            self.P,
            problem.shift,
            self.step,
            self.Z,
            self.H,
            self.G,
            self.Nq,
            self.Nk,
            scale_log2,
            1 / problem.temperature,
        )
        self.device = configs.Device.of(q.device)
        self.common = {
            "D": self.D,
            "BLOCK_D": configs.block_d(self.D),
            "NEGATE": scale < 0,
            "INDEX": _index_type(tensors),
            "enable_fp_fusion": True,  # of products into sums: where bits matter, kernels say so (`maps.product`)
        }
        self.product = {**self.common, "PRECISION": _precision(q)}
        self.options = {"MEAN_MAP": self.mean_map, "SHARP": problem.temperature < 1}

    def _frames(self, q: Tensor, k: Tensor, row_max: Tensor, row_norm: Tensor) -> Frames:
        return Frames(q, k, _strides(q), _strides(k), row_max, row_norm, self.T)

    def config(self, name: str) -> configs.Config:
        return configs.config(name, self.D, self.q.dtype, self.device)

    def frame_kernel(self, kernel: Any, name: str, *arguments: Any, owns: str, **constants: Any) -> None:
        """Launch a kernel whose programs own a block of rows (queries) or columns (keys) of one head's map."""
        config = self.config(name)
        blocks = self._blocks(config, owns)
        programs = blocks * self.B * self.T * self.H * self.G
        run(kernel, programs, (*arguments, blocks), {**self.product, **constants, **asdict(config)})

    def pair_kernel(self, kernel: Any, name: str, *arguments: Any, owns: str, **constants: Any) -> None:
        """Launch a kernel whose programs own a block of rows or columns of a run of pairs of a chain."""
        config = self.config(name)
        blocks = self._blocks(config, owns)
        chunk, chunks, programs = self._chunks(blocks)
        arguments = (self.first, self.second, self.pairs, *arguments, blocks, chunks)
        constants = {**self.product, **self.options, **constants, "CHUNK": chunk}
        run(kernel, programs, arguments, {**constants, **asdict(config)})

    def strip_kernel(
        self, kernel: Any, config: configs.GradientStrip, *arguments: Any, owns: str, **constants: Any
    ) -> None:
        """Launch a strip kernel of the backward."""
        blocks = self._blocks(config, owns)
        chunk, chunks, programs = self._chunks(blocks)
        arguments = (self.first, self.second, self.pairs, *arguments, blocks, chunks)
        constants = {**self.common, **constants, "SHARP": self.options["SHARP"], "CHUNK": chunk}
        run(kernel, programs, arguments, {**constants, **asdict(config)})

    def tiled_forward(self, lse: Tensor | None, lse_b: Tensor | None, flow: Tensor, base: float) -> None:
        """Three passes over tiles, the first only where the rows' log-sum-exps are not given."""
        self.row_statistics(lse, lse_b)
        w = self.weights()
        lost = (w * self.e_sum).view(-1, self.Nq).sum(-1)  # sum_i w_i e_ij lies sum_i w_i ebar_i too high
        base_of_pairs = lost.div_(-self.Nk).add_(base)
        tail = configs.tail(self.Nq, self.config("fwd").BLOCK_M)
        self.pair_kernel(forward.am_flow_fwd_kernel, "fwd", w, base_of_pairs, flow, owns="columns", TAIL=tail)

    def row_statistics(self, lse: Tensor | None, lse_b: Tensor | None) -> None:
        """Row maxima and normalisers of all maps, from log-sum-exps where they are known."""
        for f, known in ((self.first, lse), (self.second, lse_b)) if self.pair else ((self.first, lse),):
            if known is not None:
                self._take(known, f)
                continue
            tail = configs.tail(self.Nk, self.config("rows").BLOCK_N)
            self.frame_kernel(
                forward.am_flow_rows_kernel, "rows", f, self.pairs, f.row_max, f.row_norm, owns="rows", TAIL=tail
            )

    def weights(self) -> Tensor:
        """w of all pairs' rows; fills e_sum."""
        w = torch.empty_like(self.e_sum)
        tail = configs.tail(self.Nk, self.config("weights").BLOCK_N)
        self.pair_kernel(forward.am_flow_weights_kernel, "weights", self.e_sum, w, owns="rows", TAIL=tail)
        return w

    def times(self, x: Tensor, transpose: bool, softmax: bool, w: Tensor | None) -> Tensor:
        """The motion operator, or its transpose, times x (B, P, *G, N, C): float32."""
        C = x.shape[-1]
        kernel, name = (
            (matmul.am_flow_matmul_k_kernel, "matmul_k") if transpose else (matmul.am_flow_matmul_q_kernel, "matmul_q")
        )
        config = self.config(name)
        weight = None if w is None else w.view(*x.shape[:-2], self.Nq, 1)
        x = x.float() if weight is None or not transpose else x.float() * weight
        y = x.new_empty((*x.shape[:-2], self.Nk if transpose else self.Nq, C))
        blocks = self._blocks(config, "columns" if transpose else "rows")
        width = min(LARGEST_FEATURES, max(16, triton.next_power_of_2(C)))
        columns = -(-C // width)
        arguments = (self.first, self.second, self.pairs, x.contiguous(), y, C, blocks, columns)
        constants = {**self.product, "SOFTMAX": softmax, "SHARP": self.options["SHARP"], "BLOCK_C": width}
        run(kernel, blocks * columns * self.B * self.P * self.H * self.G, arguments, {**constants, **asdict(config)})
        if weight is not None:
            y += x.sum(-2, keepdim=True, dtype=torch.float64).to(torch.float32)
            if not transpose:
                y *= weight
        return y

    def _take(self, lse: Tensor, f: Frames) -> None:
        """Row statistics from log-sum-exps; one that is not finite makes NaN of its row.

        What row_max can't hold of one goes into row_norm. The factor is the logits' as the kernels round it: with
        log2(e) itself the large elements of a map would be wrong by that rounding.
        """
        rounded = torch.tensor(self.pairs.scale_log2, dtype=torch.float32).item()
        exact = lse.detach().flatten().double() * (rounded / abs(self.scale) if self.scale else log2(e))
        f.row_max.copy_(exact).clamp_(min=torch.finfo(torch.float32).min)
        torch.exp2((f.row_max - exact).float(), out=f.row_norm)

    def strip_forward(self, config: configs.Strip, flow: Tensor, base: float) -> None:
        """One pass; each program leaves the flow of its rows, to be summed up."""
        blocks = -(-self.Nq // config.rows)
        left = self.Nq % config.rows
        chunk, chunks, programs = self._chunks(blocks)
        part = torch.empty((blocks, *flow.shape), dtype=torch.float32, device=flow.device)
        arguments = (self.first, self.second, self.pairs, self.e_sum, part, flow.numel(), blocks, chunks)
        constants = {
            **self.common,
            "SHARP": self.options["SHARP"],
            "CHUNK": chunk,
            "TAIL": 0 < left <= 16 < config.rows,
        }
        run(strip.am_flow_strip_kernel, programs, arguments, {**constants, **asdict(config)})
        torch.sum(part, 0, out=flow).add_(base)

    def _chunks(self, blocks: int) -> tuple[int, int, int]:
        """Pairs of a chain in one program, such chunks in a chain, and programs."""
        longest = -(-self.P // self.step)
        chains = blocks * min(self.step, self.P) * self.B * self.Z * self.G
        chunk = configs.chunk(longest, chains, self.device.processors)
        chunks = -(-longest // chunk)
        return chunk, chunks, chains * chunks

    def _blocks(self, config: configs.Config | configs.GradientStrip, owns: str) -> int:
        return -(-self.Nq // config.BLOCK_M) if owns == "rows" else -(-self.Nk // config.BLOCK_N)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch."""
    kernel[(programs,)](*arguments, **options)


def am_flow(problem: Problem) -> tuple[Tensor, Tensor]:
    """The flow, and the statistics that its backward takes."""
    saved = new_saved(problem)
    pb = _Problem(problem, saved)
    base = 0.0 if problem.center else pb.Nq / pb.Nk
    mean = problem.head_reduction == "mean"
    shape = (pb.B, pb.P, *([] if pb.mean_map else [pb.H]), *pb.q.shape[3:-2], pb.Nk)
    flow = torch.empty(shape, dtype=torch.float32, device=pb.q.device)
    with _on(pb.q):
        config = None if pb.mean_map else configs.strip(pb.Nk, pb.D, pb.q.dtype, pb.device)
        if config is not None:
            pb.strip_forward(config, flow, 0.0 if mean else base)
        else:
            pb.tiled_forward(problem.lse, problem.lse_b, flow, 0.0 if mean else base)
    return flow.mean(HEADS).add_(base) if mean else flow, saved


def am_flow_backward(problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """dq, dk, dq_b, dk_b; without elements where `needs` is False."""
    pb = _Problem(problem, saved)
    q = problem.q
    dq, dk, dq_b, dk_b = empty_gradients(problem.frames, needs)
    g = subtract_mean(dflow)
    if problem.head_reduction == "mean":
        g = (g / pb.H).unsqueeze(HEADS).expand(pb.B, pb.P, pb.H, *g.shape[2:])
    elif pb.mean_map:
        g = g.unsqueeze(HEADS)
    if q.dim() == 5:
        g = g.unsqueeze(-2)
    with _on(q):
        if _strips_backward(pb, g, pb.scale, (dq, dk, dq_b, dk_b)):
            return dq, dk, dq_b, dk_b
        rows = torch.empty((4, pb.e_sum.numel()), dtype=torch.float32, device=q.device)
        d = backward.Gradient(g, g.stride()[:4], g, g, *rows)
        _tiled_backward(pb, d, pb.scale, (dq, dk, dq_b, dk_b), FLOW)
    return dq, dk, dq_b, dk_b


def am_flow_matmul(problem: MatmulProblem) -> Tensor:
    """The motion operator times x."""
    pb = _matmul_problem(problem)
    with _on(pb.q):
        pb.row_statistics(None, None)
        w = pb.weights() if problem.softmax else None
        return pb.times(problem.x, problem.transpose, problem.softmax, w)


def am_flow_matmul_backward(problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """dq, dk, dq_b, dk_b, dx; without elements where `needs` is False."""
    pb = _matmul_problem(problem)
    x, transpose, softmax = problem.x, problem.transpose, problem.softmax
    dq, dk, dq_b, dk_b = empty_gradients(problem.frames, needs[:4])
    dx = x.new_empty(0)
    with _on(pb.q):
        pb.row_statistics(None, None)
        w = pb.weights() if softmax else None
        if needs[4]:
            dx = pb.times(dy, not transpose, softmax, w).to(x.dtype)
        if any(needs[:4]):
            u, v = (x, dy) if transpose else (dy, x)  # of the queries, of the keys
            v = v.float()
            if softmax:  # a constant in a column has no effect: without it v that are equal for all keys give exactly 0
                v = v - v.mean(-2, keepdim=True, dtype=torch.float64).float()
            u, v = u.float().contiguous(), v.contiguous()
            rows = torch.empty((4, pb.e_sum.numel()), dtype=torch.float32, device=pb.q.device)
            d = backward.Gradient(u, (0, 0, 0, 0), u, v, *rows)
            _tiled_backward(pb, d, pb.scale, (dq, dk, dq_b, dk_b), {"C": problem.C, "SOFTMAX": softmax})
    return dq, dk, dq_b, dk_b, dx


def _matmul_problem(problem: MatmulProblem) -> _Problem:
    saved = problem.q.new_empty(sum(saved_sizes(problem)), dtype=torch.float32)
    return _Problem(problem, saved)


def _tiled_backward(
    pb: _Problem,
    d: backward.Gradient,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    kind: dict[str, int | bool],
) -> None:
    """dq, dk, dq_b, dk_b in three passes over tiles."""
    pb.pair_kernel(backward.am_flow_bwd_rows_kernel, "bwd_rows", d, pb.e_sum, scale, owns="rows", **kind)
    dq, dk, dq_b, dk_b = grads
    if pb.pair:
        _frames_backward(pb, backward.Frame(pb.second, pb.first, pb.second, pb.P, pb.P), d, dq, dk, kind)
        _frames_backward(pb, backward.Frame(pb.first, pb.second, pb.first, 0, 0), d, dq_b, dk_b, kind)
    else:
        _frames_backward(pb, backward.Frame(pb.first, pb.first, pb.first, pb.pairs.shift, pb.P), d, dq, dk, kind)
        _clear_unpaired(pb, grads)


def _clear_unpaired(pb: _Problem, grads: tuple[Tensor, ...]) -> None:
    """The gradients of frames that are in no pair, whose maps a forward by strips does not make: 0."""
    for grad in grads:
        if grad.numel():
            grad[:, pb.P : pb.step] = 0


def _strips_backward(pb: _Problem, g: Tensor, scale: float, grads: tuple[Tensor, Tensor, Tensor, Tensor]) -> bool:
    """All gradients in two passes by strips, if those fit."""
    by_rows = configs.gradient_strip("bwd_strip_q", pb.Nk, pb.D, pb.q.dtype)
    by_columns = configs.gradient_strip("bwd_strip_k", pb.Nq, pb.D, pb.q.dtype)
    if by_rows is None or by_columns is None or pb.mean_map:
        return False
    _clear_unpaired(pb, grads)
    dq, dk, dq_b, dk_b = grads if pb.pair else (*grads[:2], *grads[:2])
    slope, offset = torch.empty((2, pb.e_sum.numel()), dtype=torch.float32, device=g.device)
    rho = torch.empty((1 + pb.pair, pb.first.row_max.numel()), dtype=torch.float32, device=g.device)
    d = strip_backward.StripGradient(g, g.stride()[:4], slope, offset, rho[0], rho[-1])
    needed = {"NEEDED": dq.numel() > 0, "NEEDED_B": dq_b.numel() > 0}
    arguments = (d, pb.e_sum, dq, dq_b, scale)
    pb.strip_kernel(strip_backward.am_flow_bwd_strip_q_kernel, by_rows, *arguments, owns="rows", **needed)
    needed = {"NEEDED": dk.numel() > 0, "NEEDED_B": dk_b.numel() > 0}
    if any(needed.values()):
        pb.strip_kernel(strip_backward.am_flow_bwd_strip_k_kernel, by_columns, d, dk, dk_b, owns="columns", **needed)
    return True


def _frames_backward(
    pb: _Problem,
    frame: backward.Frame,
    d: backward.Gradient,
    dq: Tensor,
    dk: Tensor,
    kind: dict[str, int | bool],
) -> None:
    """dq and dk of one set of frames, of those that have room for them."""
    if not dq.numel() and not dk.numel():
        return
    rho = d.rho  # mean maps have one for each head, too
    if pb.mean_map:
        rho = torch.empty(pb.B * pb.T * pb.H * pb.G * pb.Nq, dtype=torch.float32, device=pb.q.device)
        pb.frame_kernel(
            backward.am_flow_bwd_rho_kernel, "bwd_rho", frame, d, pb.pairs, rho, owns="rows", SHARP=pb.options["SHARP"]
        )
    wide = max(16, triton.next_power_of_2(pb.D))
    if dq.numel():
        pb.frame_kernel(
            backward.am_flow_bwd_dq_kernel,
            "bwd_dq",
            frame,
            d,
            pb.pairs,
            rho,
            dq,
            owns="rows",
            WIDE_D=wide,
            **pb.options,
            **kind,
        )
    if dk.numel():
        pb.frame_kernel(
            backward.am_flow_bwd_dk_kernel,
            "bwd_dk",
            frame,
            d,
            pb.pairs,
            rho,
            dk,
            owns="columns",
            WIDE_D=wide,
            **pb.options,
            **kind,
        )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, frame, head, window, token; without windows there is one."""
    return (*x.stride()[:3], x.stride(3) if x.dim() == 6 else 0, x.stride(-2))


def _index_type(tensors: Sequence[Tensor]) -> tl.dtype:
    """Of frames, and of offsets in one map's rows: 64 bits only where they are needed, since they cost registers."""
    rows = max((x.shape[-2] + configs.LARGEST_BLOCK) * max(x.stride(-2), x.shape[-1]) + x.shape[-1] for x in tensors)
    frames = max(x.shape[1] * max(x.stride(1), prod(x.shape[2:-1])) for x in tensors)  # of x, and of flows
    return tl.int64 if max(rows, frames) >= 2**31 else tl.int32


def _on(q: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensors' GPU, whichever is current."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()


def _precision(q: Tensor) -> str:
    """tf32 for float32 only where PyTorch's own products may use it, else exact products."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
