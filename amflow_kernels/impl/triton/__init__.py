"""Handles of the Triton kernels. Triton itself is imported by the first call that needs it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the kernels can't run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def am_flow(*arguments: Any) -> Tensor:
    """As `launch.am_flow`."""
    from amflow_kernels.impl.triton import launch

    return launch.am_flow(*arguments)


def am_flow_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `launch.am_flow_backward`."""
    from amflow_kernels.impl.triton import launch

    return launch.am_flow_backward(*arguments)


def am_flow_matmul(*arguments: Any) -> Tensor:
    """As `launch.am_flow_matmul`."""
    from amflow_kernels.impl.triton import launch

    return launch.am_flow_matmul(*arguments)


def am_flow_matmul_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch.am_flow_matmul_backward`."""
    from amflow_kernels.impl.triton import launch

    return launch.am_flow_matmul_backward(*arguments)


def uses_lse(q: Tensor, k: Tensor) -> bool:
    """Whether the forward has a pass for row statistics, which log-sum-exps spare."""
    from amflow_kernels.impl.triton import configs

    return configs.strip(k.shape[-2], q.shape[-1], q.dtype, configs.Device.of(q.device)) is None


def describe() -> list[str]:
    """What `explain` says of the Triton kernels."""
    why_not = unavailable()
    if why_not is not None:
        return [f"triton kernels: not available: {why_not}"]
    import triton

    return [f"triton kernels: Triton {triton.__version__}" + (", interpreted" if interpreted() else "")]


def describe_launch(q: Tensor, k: Tensor) -> str:
    """What `explain` says of the launches for q and k, without a head reduction."""
    from amflow_kernels.impl.triton import configs

    device, Nq, Nk, D = configs.Device.of(q.device), q.shape[-2], k.shape[-2], q.shape[-1]
    strip = configs.strip(Nk, D, q.dtype, device)
    if strip is not None:
        told = f"one pass, strips of {strip.rows} rows and {strip.KEY_TILES} x {strip.BLOCK_N} + {strip.REST} keys"
    else:
        tiles = (configs.config(name, D, q.dtype, device) for name in ("rows", "weights", "fwd"))
        told = "three passes, tiles of " + ", ".join(f"{tile.BLOCK_M} x {tile.BLOCK_N}" for tile in tiles)
    fits = (("bwd_strip_q", Nk), ("bwd_strip_k", Nq))
    by_strips = all(configs.gradient_strip(kernel, n, D, q.dtype) is not None for kernel, n in fits)
    backward = "two passes by strips" if by_strips else "three passes by tiles"
    return f"forward in {told}; backward in {backward}; configurations for sm_{device.sm}"
