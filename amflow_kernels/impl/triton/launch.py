"""Host code of the Triton kernels: allocates memory and launches kernels. The reference defines what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cache, lru_cache
from math import e, log2, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amflow_kernels.impl.base import empty_gradients
from amflow_kernels.impl.triton import configs
from amflow_kernels.impl.triton.kernels import backward, forward, matmul, strip, strip_backward
from amflow_kernels.impl.triton.kernels.maps import (
    Constants,
    FramePair,
    Frames,
    Grid,
    Pairs,
    Tiling,
    coded,
    coded_strides,
    constexprs,
    stride_unit,
)
from amflow_kernels.impl.triton.saved import new_saved, saved_sizes, subtract_mean
from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

HEADS = 2  # the heads' dimension in (B, T, heads, ...)
LARGEST_FEATURES = 64  # columns of x that one program multiplies
FLOW: dict[str, int | bool] = {"C": 0, "SOFTMAX": True}  # constants of the gradient of a flow
HIGHEST_TEMPERATURE = 1e30  # above it the flow is the same, but the kernels' products would underflow
TINY = torch.finfo(torch.float32).tiny

AnyConfig = configs.Config | configs.Strip | configs.GradientStrip


class _Form(NamedTuple):
    """Everything of a problem that its launches depend on, except for the data."""

    shapes: tuple[torch.Size, ...]  # of q and k, and of q_b and k_b in pair form
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: configs.Device
    shift: int
    scale: float
    temperature: float
    mean_map: bool
    precision: str


class _Layout:
    """The sizes, strides and constants that the kernels take for a `_Form`."""

    def __init__(self, form: _Form) -> None:
        q, k = form.shapes[:2]
        self.B, self.T, self.H = q[:3]
        self.G = q[3] if len(q) == 6 else 1
        self.Nq, self.Nk, self.D = q[-2], k[-2], q[-1]
        self.P = self.T - form.shift
        self.pair = len(form.shapes) == 4
        # In pair form no pair follows on another. A multiple of 16 compiles nothing anew.
        self.step = -(-self.P // 16) * 16 if self.pair else form.shift
        self.scale = form.scale
        self.mean_map = form.mean_map
        self.low_temperature = form.temperature < 1
        self.growth = "large" if self.low_temperature else "small"
        self.Z = 1 if self.mean_map else self.H
        self.device = form.device
        sizes = (self.P, form.shift, self.step, self.Z, self.H, self.G, self.Nq, self.Nk)
        self.scale_log2 = max(abs(self.scale) * log2(e), TINY)  # a scale of 0 would turn -inf into NaN
        # Not coded: a lag of 1 and no windows, hence the constant 1, save registers.
        plain = {"shift": form.shift, "step": self.step, "G": self.G}
        self.pairs = coded(Pairs(*sizes, self.scale_log2, 1 / min(form.temperature, HIGHEST_TEMPERATURE)))._replace(
            **plain
        )
        strides = [_strides(*each) for each in zip(form.shapes, form.strides, strict=True)]
        unit = stride_unit(n for each in strides for n in each)
        self.strides = [coded_strides(each, unit) for each in strides]
        index = _index_type(form.shapes, form.strides)
        self.constants = Constants(
            self.D, configs.block_d(self.D, form.dtype), self.scale < 0, index, unit, form.precision
        )
        self.constants_of_pairs = self.constants._replace(
            MEAN_MAP=self.mean_map, GROWTH=self.growth, CHUNK=configs.MAX_CHUNK
        )


# Python takes as long for a layout as for a launch.
_layout = lru_cache(maxsize=1024)(_Layout)


class _Launch(_Layout):
    """A problem in the form that the kernels take, and their launches."""

    def __init__(self, problem: MapPairs, saved: Tensor) -> None:
        mean_map = isinstance(problem, Problem) and problem.head_reduction == "mean_map"
        tensors = [x for x in problem.frames if x is not None]
        q = self.q = problem.q
        form = _Form(
            tuple([x.shape for x in tensors]),
            tuple([x.stride() for x in tensors]),
            q.dtype,
            configs.Device.of(q.device),
            problem.shift,
            problem.logit_scale,
            problem.temperature,
            mean_map,
            _precision(q),
        )
        vars(self).update(vars(_layout(form)))
        *statistics, self.e_sum = torch.split_with_sizes(saved, saved_sizes(problem))
        T = 2 * self.T + 1  # `coded`, too
        q_stride, k_stride, *others = self.strides
        row_max, row_norm, *other_statistics = statistics
        second = None
        if self.pair:
            second = Frames(tensors[2], tensors[3], others[0], others[1], other_statistics[0], other_statistics[1], T)
        self.frames = FramePair(Frames(q, problem.k, q_stride, k_stride, row_max, row_norm, T), second)

    def config(self, name: str) -> configs.Config:
        return configs.config(name, self.q.dtype, self.device)

    def frame_kernel(
        self, kernel: Any, name: str, arguments: tuple[Any, ...], owns: str, constants: Constants, **options: Any
    ) -> None:
        """Launch a kernel whose programs own a block of rows (queries) or columns (keys) of one head's map."""
        config = self.config(name)
        blocks = self._blocks(config, owns)
        programs = blocks * self.B * self.T * self.H * self.G
        run(kernel, programs, (*arguments, coded(Grid(blocks))), _options(constants, config, options))

    def pair_kernel(
        self,
        kernel: Any,
        config: AnyConfig,
        arguments: tuple[Any, ...],
        owns: str,
        constants: Constants,
        **options: Any,
    ) -> None:
        """Launch a kernel whose programs own a block of rows or columns, and a chunk of a chain of pairs."""
        blocks = self._blocks(config, owns)
        grid, programs = self._chunks(blocks)
        run(kernel, programs, (self.frames, self.pairs, *arguments, grid), _options(constants, config, options))

    def results_kernel(
        self,
        kernel: Any,
        name: str,
        d: backward.Gradient,
        results: tuple[Tensor | None, Tensor | None],
        constants: Constants,
    ) -> None:
        """Launch a kernel that adds up results for frames that begin pairs (all frames of a clip) or end them."""
        config, owns = self.config(name), "columns" if name == "bwd_dk" else "rows"
        partial = self.Nq < config.BLOCK_M if name == "bwd_dk" else self.Nk < config.BLOCK_N
        self.pair_kernel(kernel, replace(config, PARTIAL=partial), (d, results), owns, constants)

    def rho_of_frames(self, parts: backward.RowParts) -> Tensor:
        """rho of the frames of a clip, from its parts by the pairs that a frame begins and by those that it ends."""
        rho = torch.zeros((self.B, self.T, self.H * self.G * self.Nq), dtype=torch.float32, device=parts.rho.device)
        begins, ends = (self.of_rows(x).view(self.B, self.P, -1) for x in parts)
        rho[:, : self.P] = begins
        rho[:, self.step :] += ends
        return rho

    def map_constants(self, **kind: int | bool | str) -> Constants:
        """Compile-time constants of kernels that compare the maps of a pair."""
        return self.constants_of_pairs._replace(**kind) if kind else self.constants_of_pairs

    def tiled_forward(self, lse: Tensor | None, lse_b: Tensor | None, flow: Tensor, base: float, growth: str) -> None:
        """Three passes over tiles; the first is skipped for frames whose log-sum-exps are given."""
        self.row_statistics(lse, lse_b)
        w = self.weights(growth)
        mean = (self.of_rows(w) * self.of_rows(self.e_sum)).sum(-1).div_(self.Nk)  # sum_i w_i ebar_i, to be subtracted
        config = self.config("fwd")
        arguments = (w, mean.neg_().add_(base), flow)
        constants, tail = self.map_constants(GROWTH=growth), configs.tail(self.Nq, config.BLOCK_M)
        self.pair_kernel(forward.am_flow_fwd_kernel, config, arguments, "columns", constants, TAIL=tail)

    def row_statistics(self, lse: Tensor | None, lse_b: Tensor | None) -> None:
        """Row maxima and normalisers of all maps, from log-sum-exps where those are given."""
        tail = configs.tail(self.Nk, self.config("rows").BLOCK_N)
        for f, known in zip(self.frames, (lse, lse_b), strict=True):
            if f is None:
                continue
            if known is not None:
                self._statistics_from_lse(known, f)
            else:
                arguments = (FramePair(f, None), self.pairs)
                self.frame_kernel(forward.am_flow_rows_kernel, "rows", arguments, "rows", self.constants, TAIL=tail)

    def weights(self, growth: str) -> Tensor:
        """w of all pairs' rows; fills e_sum."""
        w = torch.empty_like(self.e_sum)
        config = self.config("weights")
        constants, tail = self.map_constants(GROWTH=growth), configs.tail(self.Nk, config.BLOCK_N)
        self.pair_kernel(forward.am_flow_weights_kernel, config, (self.e_sum, w), "rows", constants, TAIL=tail)
        return w

    def of_rows(self, x: Tensor) -> Tensor:
        """Values of the pairs' rows, allocated as e_sum, in the shape (B * P * Z * G, Nq)."""
        maps = self.B * self.P * self.Z * self.G
        return x[: maps * self.Nq].view(maps, self.Nq)

    def times(self, x: Tensor, transpose: bool, softmax: bool, w: Tensor | None) -> Tensor:
        """The motion operator, or its transpose, times x (B, P, *G, N, C): float32.

        At low temperatures e can be 1e27 and w 1e-31. A power of two that x or w takes on beforehand keeps the products
        of either with x within the range of float32.
        """
        if w is None:
            return self._change_times(x.float(), transpose, softmax)
        unit = 2.0**46 if self.low_temperature else 1.0
        weight = self.of_rows(w).view(*x.shape[:-2], self.Nq, 1) * unit
        x = x.float() * (weight if transpose else 1 / unit)
        y = self._change_times(x, transpose, softmax)
        y += x.sum(-2, keepdim=True, dtype=torch.float64).to(torch.float32)
        return y.mul_(1 / unit if transpose else weight)

    def _change_times(self, x: Tensor, transpose: bool, softmax: bool) -> Tensor:
        """M x, or with softmax e x, or their transposes times x."""
        C = x.shape[-1]
        y = x.new_empty((*x.shape[:-2], self.Nk if transpose else self.Nq, C))
        kernel = matmul.am_flow_matmul_k_kernel if transpose else matmul.am_flow_matmul_q_kernel
        config = self.config("matmul_k" if transpose else "matmul_q")
        width = min(LARGEST_FEATURES, max(16, triton.next_power_of_2(C)))
        grid = Grid(self._blocks(config, "columns" if transpose else "rows"), -(-C // width))
        constants = self.constants._replace(GROWTH=self.growth, SOFTMAX=softmax)
        programs = grid.blocks * grid.columns * self.B * self.P * self.H * self.G
        arguments = (self.frames, self.pairs, x.contiguous(), y, C, coded(grid))
        run(kernel, programs, arguments, _options(constants, config, {"BLOCK_C": width}))
        return y

    def _statistics_from_lse(self, lse: Tensor, f: Frames) -> None:
        """Row statistics from log-sum-exps; one that is not finite turns its row into NaN.

        The part of an lse that float32 row_max can't hold goes into row_norm. The factor is the logits' scale_log2 as
        the kernels round it: with log2(e) itself, large elements of a map would be off by the rounding of scale_log2.
        """
        rounded = torch.tensor(self.scale_log2, dtype=torch.float32).item()
        exact = lse.detach().flatten().double() * (rounded / abs(self.scale) if self.scale else log2(e))
        row_max, row_norm = f.row_max[: exact.numel()], f.row_norm[: exact.numel()]
        row_max.copy_(exact).clamp_(min=torch.finfo(torch.float32).min)
        torch.exp2((row_max - exact).float(), out=row_norm)

    def strip_forward(self, config: configs.Strip, flow: Tensor, base: float, growth: str) -> None:
        """One pass; each program stores its rows' share of the flow, and the shares are added up afterwards."""
        remaining = self.Nq % config.rows
        short = 0 < remaining <= 16 < config.rows
        tail = _short_tiling(config) if short else None
        blocks = self._blocks(config, "rows")
        part = torch.empty((blocks, *flow.shape), dtype=torch.float32, device=flow.device)
        arguments = (self.e_sum, part, flow.numel())
        constants = self.map_constants(GROWTH=growth)
        self.pair_kernel(strip.am_flow_strip_kernel, config, arguments, "rows", constants, TAIL=tail)
        torch.sum(part, 0, out=flow).add_(base)

    def _chunks(self, blocks: int) -> tuple[Grid, int]:
        """The grid of a kernel whose programs take chunks of chains, `coded`, and the number of programs."""
        longest = -(-self.P // self.step)
        chains = blocks * min(self.step, self.P) * self.B * self.Z * self.G
        chunk = configs.chunk(longest, chains, self.device.processors)
        chunks = -(-longest // chunk)
        return coded(Grid(blocks, chunks, chunk)), chains * chunks

    def _blocks(self, config: AnyConfig, owns: str) -> int:
        rows = config.rows if isinstance(config, configs.Strip) else config.BLOCK_M
        return -(-self.Nq // rows) if owns == "rows" else -(-self.Nk // config.BLOCK_N)


def _options(constants: Constants, config: AnyConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments and launch options of a kernel."""
    return {
        "CONST": constexprs(constants),
        "TILING": constexprs(_tiling(config)),
        **extra,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # of products into sums; where it would change bits, kernels use `maps.product`
    }


@cache
def _tiling(config: AnyConfig) -> Tiling:
    fields = {name.replace("KEY_TILES", "TILES"): value for name, value in asdict(config).items()}
    return Tiling(**{name: fields[name] for name in Tiling._fields if name in fields})


@cache
def _short_tiling(config: configs.Strip) -> Any:
    """The tiling of a strip's last block of at most 16 rows."""
    return constexprs(_tiling(replace(config, ROW_TILES=1, BLOCK_M=16)))


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launch a kernel; returns it as compiled. All launches go through this function."""
    return kernel[(programs,)](*arguments, **options)


def am_flow(problem: Problem) -> tuple[Tensor, Tensor]:
    """The flow, and the statistics that its backward takes."""
    saved = new_saved(problem)
    launch = _Launch(problem, saved)
    base = 0.0 if problem.center else launch.Nq / launch.Nk
    # The flow of equal frames hides small errors of its change, unless it is subtracted.
    growth = launch.growth if problem.center or launch.low_temperature else "rough"
    mean = problem.head_reduction == "mean"
    shape = (launch.B, launch.P, *([] if launch.mean_map else [launch.H]), *launch.q.shape[3:-2], launch.Nk)
    flow = torch.empty(shape, dtype=torch.float32, device=launch.q.device)
    with _on(launch.q):
        config = None if launch.mean_map else configs.strip(launch.Nk, launch.D, launch.q.dtype, launch.device)
        if config is not None:
            launch.strip_forward(config, flow, 0.0 if mean else base, growth)
        else:
            launch.tiled_forward(problem.lse, problem.lse_b, flow, 0.0 if mean else base, growth)
    return flow.mean(HEADS).add_(base) if mean else flow, saved


def am_flow_backward(problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """dq, dk, dq_b, dk_b; without elements where `needs` is False. `saved` is empty after another forward."""
    if not saved.numel():
        saved = _statistics(problem)
    launch = _Launch(problem, saved)
    q = problem.q
    dq, dk, dq_b, dk_b = empty_gradients(problem.frames, needs)
    g = subtract_mean(dflow) * launch.scale
    if problem.head_reduction == "mean":
        g = (g / launch.H).unsqueeze(HEADS).expand(launch.B, launch.P, launch.H, *g.shape[2:])
    elif launch.mean_map:
        g = g.unsqueeze(HEADS)
    if q.dim() == 5:
        g = g.unsqueeze(-2)
    with _on(q):
        if _strips_backward(launch, g, (dq, dk, dq_b, dk_b)):
            return dq, dk, dq_b, dk_b
        w, delta = torch.empty((2, launch.e_sum.numel()), dtype=torch.float32, device=q.device)
        d = backward.Gradient(g, coded_strides(g.stride()[:4], 1), g, g, w, delta, None, None)
        _tiled_backward(launch, d, (dq, dk, dq_b, dk_b), FLOW)
    return dq, dk, dq_b, dk_b


def _statistics(problem: Problem) -> Tensor:
    """What `am_flow` saves."""
    saved = new_saved(problem)
    launch = _Launch(problem, saved)
    with _on(problem.q):
        launch.row_statistics(None, None)
        launch.weights(launch.growth)
    return saved


def am_flow_matmul(problem: MatmulProblem) -> Tensor:
    """The motion operator times x."""
    launch = _matmul_launch(problem)
    with _on(launch.q):
        launch.row_statistics(None, None)
        w = launch.weights(launch.growth) if problem.softmax else None
        return launch.times(problem.x, problem.transpose, problem.softmax, w)


def am_flow_matmul_backward(problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """dq, dk, dq_b, dk_b, dx; without elements where `needs` is False."""
    launch = _matmul_launch(problem)
    x, transpose, softmax = problem.x, problem.transpose, problem.softmax
    dq, dk, dq_b, dk_b = empty_gradients(problem.frames, needs[:4])
    dx = x.new_empty(0)
    with _on(launch.q):
        launch.row_statistics(None, None)
        w = launch.weights(launch.growth) if softmax else None
        if needs[4]:
            dx = launch.times(dy, not transpose, softmax, w).to(x.dtype)
        if any(needs[:4]):
            u, v = (x, dy) if transpose else (dy, x)  # features of the queries and of the keys
            v = v.float()
            if softmax:  # a constant added to all keys has no effect; subtracting the mean makes equal v give 0 exactly
                v = v - v.mean(-2, keepdim=True, dtype=torch.float64).float()
            u, v = (u.float() * launch.scale).contiguous(), v.contiguous()
            w_rows, delta = torch.empty((2, launch.e_sum.numel()), dtype=torch.float32, device=launch.q.device)
            d = backward.Gradient(u, coded_strides((0, 0, 0, 0), 1), u, v, w_rows, delta, None, None)
            _tiled_backward(launch, d, (dq, dk, dq_b, dk_b), {"C": problem.C, "SOFTMAX": softmax})
    return dq, dk, dq_b, dk_b, dx


def _matmul_launch(problem: MatmulProblem) -> _Launch:
    saved = problem.q.new_empty(sum(saved_sizes(problem)), dtype=torch.float32)
    return _Launch(problem, saved)


def _tiled_backward(
    launch: _Launch,
    d: backward.Gradient,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    kind: dict[str, int | bool],
) -> None:
    """dq, dk, dq_b, dk_b in three passes over tiles; in four for mean maps."""
    constants = launch.map_constants(**kind)
    parts = backward.RowParts(*torch.empty((2, launch.e_sum.numel()), dtype=torch.float32, device=d.w.device))
    arguments = (d, parts, launch.e_sum)
    launch.pair_kernel(backward.am_flow_bwd_rows_kernel, launch.config("bwd_rows"), arguments, "rows", constants)
    if launch.mean_map:
        rho = [torch.empty_like(f.row_max) for f in launch.frames if f is not None]
        d = d._replace(rho=rho[0], rho_b=rho[-1])
        launch.results_kernel(backward.am_flow_bwd_rho_kernel, "bwd_rho", d, (rho[0], rho[-1]), constants)
    elif launch.pair:
        d = d._replace(rho=parts.rho, rho_b=parts.next_rho)
    else:
        of_frames = launch.rho_of_frames(parts)
        d = d._replace(rho=of_frames, rho_b=of_frames)
    dq, dk, dq_b, dk_b = grads
    for kernel, name, results in (
        (backward.am_flow_bwd_dq_kernel, "bwd_dq", (dq, dq_b)),
        (backward.am_flow_bwd_dk_kernel, "bwd_dk", (dk, dk_b)),
    ):
        first, second = (_sums(x) if x.numel() else None for x in results)
        if first is not None or second is not None:
            of_pairs = (first, second if launch.pair else first)
            launch.results_kernel(kernel, name, d, of_pairs, constants)
        for x, total in zip(results, (first, second), strict=True):
            if total is not None and x is not total:
                x.copy_(total)
    if not launch.pair:
        _clear_unpaired(launch, grads)


def _sums(x: Tensor) -> Tensor:
    """Where float32 sums for x are made: x itself if it is float32."""
    return x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)


def _clear_unpaired(launch: _Launch, grads: tuple[Tensor, ...]) -> None:
    """Set the gradients of frames in no pair to 0. A forward by strips leaves their row statistics uninitialised."""
    for grad in grads:
        if grad.numel():
            grad[:, launch.P : launch.step] = 0


def _strips_backward(launch: _Launch, g: Tensor, grads: tuple[Tensor, Tensor, Tensor, Tensor]) -> bool:
    """All gradients in two passes by strips, if those fit; returns whether they do."""
    by_rows = configs.gradient_strip("bwd_strip_q", launch.Nk, launch.D, launch.q.dtype)
    by_columns = configs.gradient_strip("bwd_strip_k", launch.Nq, launch.D, launch.q.dtype)
    if by_rows is None or by_columns is None or launch.mean_map:
        return False
    _clear_unpaired(launch, grads)
    dq, dk, dq_b, dk_b = (x if x.numel() else None for x in (grads if launch.pair else (*grads[:2], *grads[:2])))
    w, delta = torch.empty((2, launch.e_sum.numel()), dtype=torch.float32, device=g.device)
    rho = torch.empty((1 + launch.pair, launch.frames.first.row_max.numel()), dtype=torch.float32, device=g.device)
    d = strip_backward.StripGradient(g, coded_strides(g.stride()[:4], 1), w, delta, rho[0], rho[-1], None, None)
    if by_columns.REST and (dk is not None or dk_b is not None):
        maps = launch.frames.first.row_max.numel() // launch.Nq
        last = torch.empty((1 + launch.pair, maps * 4 * -(-launch.Nk // 4)), dtype=torch.float32, device=g.device)
        d = d._replace(last=last[0], last_b=last[-1])
    constants = launch.map_constants()
    arguments = (d, launch.e_sum, (dq, dq_b))
    launch.pair_kernel(strip_backward.am_flow_bwd_strip_q_kernel, by_rows, arguments, "rows", constants)
    if dk is not None or dk_b is not None:
        launch.pair_kernel(strip_backward.am_flow_bwd_strip_k_kernel, by_columns, (d, (dk, dk_b)), "columns", constants)
    return True


def _strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of (batch, frame, head, window, token); 16 for dimensions with one element, where any does."""
    plain = [16 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)]
    return (*plain[:3], plain[3] if len(shape) == 6 else 16, plain[-2])


def _index_type(shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> tl.dtype:
    """Integer type of frame numbers and of offsets within the rows of one map. 64 bits take more registers than 32."""
    largest = 0
    for shape, stride in zip(shapes, strides, strict=True):
        *_, N, D = shape
        rows = (N + configs.LARGEST_BLOCK) * max(stride[-2], D) + D
        frames = shape[1] * max(stride[1], prod(shape[2:-1]))  # in q or k, and in flows
        largest = max(largest, rows, frames)
    return tl.int64 if largest >= 2**31 else tl.int32


def _on(q: Tensor) -> AbstractContextManager[object]:
    """A context that makes the GPU of q current, as launches need."""
    there = q.is_cuda and q.device.index != torch.cuda.current_device()
    return torch.cuda.device(q.device) if there else nullcontext()


def _precision(q: Tensor) -> str:
    """Precision of q k^T and its gradients: "tf32" only if PyTorch's own float32 products may use it."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"
