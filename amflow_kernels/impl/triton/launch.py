"""Host code of the Triton kernels: shapes and strides in, memory and launches out. Meaning as in the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amflow_kernels.impl.triton import configs, kernels, saved_sizes

HEADS = 2  # the heads' dimension in (B, T, heads, ...)


class _Problem:
    """One call's arguments in the form that the kernels take."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        q_b: Tensor | None,
        k_b: Tensor | None,
        scale: float,
        lag: int,
        temperature: float,
        head_reduction: str,
        saved: Tensor,
    ) -> None:
        self.B, self.T, self.H = q.shape[:3]
        self.G = q.shape[3] if q.dim() == 6 else 1
        self.Nq, self.Nk, self.D = q.shape[-2], k.shape[-2], q.shape[-1]
        self.P = self.T - lag
        self.mean_map = head_reduction == "mean_map"
        self.Z = 1 if self.mean_map else self.H
        self.q = q
        self.pair = q_b is not None
        self.step = self.P if self.pair else lag
        *statistics, self.e_sum = saved.split(saved_sizes(q, self.pair, lag, head_reduction))
        tensors = [q, k]
        self.first = self.second = self._frames(q, k, *statistics[:2])
        if q_b is not None and k_b is not None:
            tensors += [q_b, k_b]
            self.second = self._frames(q_b, k_b, *statistics[2:])
        self.pairs = kernels.Pairs(
            self.P, lag, self.step, self.Z, self.H, self.G, self.Nq, self.Nk, scale * log2(e), 1 / temperature
        )
        self.product = {
            "D": self.D,
            "BLOCK_D": configs.block_d(self.D),
            "PRECISION": _precision(q),
            "INDEX": _index_type(tensors),
        }
        self.options = {"MEAN_MAP": self.mean_map, "SHARP": temperature < 1}

    def _frames(self, q: Tensor, k: Tensor, row_max: Tensor, row_norm: Tensor) -> kernels.Frames:
        return kernels.Frames(q, k, _strides(q), _strides(k), row_max, row_norm, self.T)

    def frame_kernel(self, name: str, frames: Any, *arguments: Any, owns: str, **constants: Any) -> None:
        """Launch a kernel whose programs own a block of rows (queries) or columns (keys) of one head's map."""
        config = configs.config(name, self.q.dtype)
        blocks = self._blocks(config, owns)
        kernel = getattr(kernels, f"am_flow_{name}_kernel")
        kernel[(blocks * self.B * self.T * self.H * self.G,)](
            frames, *arguments, blocks, **self.product, **constants, **_launch(config)
        )

    def pair_kernel(self, name: str, *arguments: Any, owns: str) -> None:
        """Launch a kernel whose programs own a block of rows or columns of a run of pairs of a chain."""
        config = configs.config(name, self.q.dtype)
        blocks = self._blocks(config, owns)
        chunk, chunks, programs = self._chunks(blocks)
        kernel = getattr(kernels, f"am_flow_{name}_kernel")
        kernel[(programs,)](
            self.first, self.second, self.pairs, *arguments, blocks, chunks,
            CHUNK=chunk, **self.product, **self.options, **_launch(config),
        )  # fmt: skip

    def strip_kernel(self, config: configs.Config, flow: Tensor, base: float) -> None:
        """The whole forward in one pass; each program leaves the flow of its rows."""
        blocks = -(-self.Nq // config.BLOCK_M)
        chunk, chunks, programs = self._chunks(blocks)
        part = torch.empty((blocks, *flow.shape), dtype=torch.float32, device=flow.device)
        product = {name: self.product[name] for name in ("D", "BLOCK_D", "INDEX")}
        kernels.am_flow_strip_kernel[(programs,)](
            self.first, self.second, self.pairs, self.e_sum, part, flow.numel(), blocks, chunks,
            CHUNK=chunk, REST=self.Nk - config.BLOCK_N, SHARP=self.options["SHARP"], **product, **_launch(config),
        )  # fmt: skip
        torch.sum(part, 0, out=flow).add_(base)

    def _chunks(self, blocks: int) -> tuple[int, int, int]:
        """Pairs of a chain in one program, such chunks in a chain, and programs."""
        longest = -(-self.P // self.step)
        chains = blocks * min(self.step, self.P) * self.B * self.Z * self.G
        chunk = configs.chunk(longest, chains, _processors(self.q))
        chunks = -(-longest // chunk)
        return chunk, chunks, chains * chunks

    def _blocks(self, config: configs.Config, owns: str) -> int:
        return -(-self.Nq // config.BLOCK_M) if owns == "rows" else -(-self.Nk // config.BLOCK_N)


def am_flow(
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    center: bool,
    saved: Tensor,
) -> Tensor:
    pb = _Problem(q, k, q_b, k_b, scale, lag, temperature, head_reduction, saved)
    base = 0.0 if center else pb.Nq / pb.Nk
    mean = head_reduction == "mean"
    shape = (pb.B, pb.P, *([] if pb.mean_map else [pb.H]), *q.shape[3:-2], pb.Nk)
    flow = torch.empty(shape, dtype=torch.float32, device=q.device)
    with _on(q):
        strip = None if pb.mean_map else configs.strip(pb.Nk, pb.D, q.dtype)
        if strip is not None:
            pb.strip_kernel(strip, flow, 0.0 if mean else base)
        else:
            for frames in (pb.first, pb.second) if pb.pair else (pb.first,):
                pb.frame_kernel("rows", frames, pb.pairs, frames.row_max, frames.row_norm, owns="rows")
            pb.pair_kernel("weights", pb.e_sum, owns="rows")
            pb.pair_kernel("fwd", pb.e_sum, flow, 0.0 if mean else base, owns="columns")
    return flow.mean(HEADS).add_(base) if mean else flow


def am_flow_backward(
    dflow: Tensor,
    q: Tensor,
    k: Tensor,
    q_b: Tensor | None,
    k_b: Tensor | None,
    scale: float,
    lag: int,
    temperature: float,
    head_reduction: str,
    needs: Sequence[bool],
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pb = _Problem(q, k, q_b, k_b, scale, lag, temperature, head_reduction, saved)
    dq, dk, dq_b, dk_b = (
        torch.empty(x.shape if needed and x is not None else 0, dtype=q.dtype, device=q.device)
        for x, needed in zip((q, k, q_b, k_b), needs, strict=True)
    )
    # Less its mean: a constant has no effect, as the rows of P sum to 1; without it a constant dflow gives exactly 0.
    g = (dflow - dflow.mean(-1, keepdim=True, dtype=torch.float64).to(dflow.dtype)).contiguous()
    if head_reduction == "mean":
        g = (g / pb.H).unsqueeze(HEADS).expand(pb.B, pb.P, pb.H, *g.shape[2:])
    elif pb.mean_map:
        g = g.unsqueeze(HEADS)
    if q.dim() == 5:
        g = g.unsqueeze(-2)
    rows = torch.empty((4, pb.e_sum.numel()), dtype=torch.float32, device=q.device)
    d = kernels.Gradient(g, g.stride()[:4], *rows)
    with _on(q):
        pb.pair_kernel("bwd_rows", d, pb.e_sum, scale, owns="rows")
        if pb.pair:
            _frames_backward(pb, kernels.Frame(pb.second, pb.first, pb.second, pb.P, pb.P), d, dq, dk)
            _frames_backward(pb, kernels.Frame(pb.first, pb.second, pb.first, 0, 0), d, dq_b, dk_b)
        else:
            _frames_backward(pb, kernels.Frame(pb.first, pb.first, pb.first, pb.pairs.shift, pb.P), d, dq, dk)
    return dq, dk, dq_b, dk_b


def _frames_backward(pb: _Problem, frame: kernels.Frame, d: kernels.Gradient, dq: Tensor, dk: Tensor) -> None:
    """dq and dk of one set of frames, of those that have room for them."""
    if not dq.numel() and not dk.numel():
        return
    rho = d.rho  # mean maps have one for each head, too
    if pb.mean_map:
        rho = torch.empty(pb.B * pb.T * pb.H * pb.G * pb.Nq, dtype=torch.float32, device=pb.q.device)
        pb.frame_kernel("bwd_rho", frame, d, pb.pairs, rho, owns="rows", SHARP=pb.options["SHARP"])
    wide = max(16, triton.next_power_of_2(pb.D))
    if dq.numel():
        pb.frame_kernel("bwd_dq", frame, d, pb.pairs, rho, dq, owns="rows", WIDE_D=wide, **pb.options)
    if dk.numel():
        pb.frame_kernel("bwd_dk", frame, d, pb.pairs, rho, dk, owns="columns", WIDE_D=wide, **pb.options)


def _launch(config: configs.Config) -> dict[str, Any]:
    # No fusing of products and sums but where the kernels say so: a frame has to give the same bits in every place.
    return {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, frame, head, window, token; without windows there is one."""
    return (*x.stride()[:3], x.stride(3) if x.dim() == 6 else 0, x.stride(-2))


def _index_type(tensors: Sequence[Tensor]) -> tl.dtype:
    """Of offsets within the rows of one map: 64 bits only where they are needed, since they cost registers."""
    largest = max((x.shape[-2] + configs.LARGEST_BLOCK) * max(x.stride(-2), x.shape[-1]) + x.shape[-1] for x in tensors)
    return tl.int64 if largest >= 2**31 else tl.int32


def _on(q: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensors' GPU, whichever is current."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()


def _processors(q: Tensor) -> int:
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.device.type == "cuda" else 1


def _precision(q: Tensor) -> str:
    """tf32 for float32 only where PyTorch's own products may use it, else exact products."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
