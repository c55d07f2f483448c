"""One process or many: accelerate finds the machines; the model is replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_wandb_available
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from amflow_kernels.integrations.block_finder import find_blocks
from amflow_models.blocks import AdaptedBlock
from amflow_models.classifier import VideoClassifier
from amflow_models.training.config import Training

T = TypeVar("T")


def choose_precision(precision: str) -> str:
    """The precision that "auto" stands for on this machine; other names are returned as they are.

    "auto" is "bf16" where it is faster than "fp32": on accelerators, and on CPUs with AVX512_BF16 or AMX. Other CPUs
    emulate bf16 products, which take 20 to 35 times as long as fp32 ones.
    """
    if precision != "auto":
        return precision
    return "bf16" if torch.accelerator.is_available() or cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether PyTorch multiplies bf16 matrices with AVX512_BF16 or AMX here."""
    # The capability also respects ATEN_CPU_CAPABILITY, the other two only the hardware.
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def make_accelerator(precision: str, *, wandb: bool = False) -> Accelerator:
    """The accelerator of the processes that torchrun (or ``accelerate launch``) started, or of this one process.

    Args:
        precision: "fp32", "bf16" or "fp16", see `choose_precision`.
        wandb: log to Weights & Biases, too.

    Raises:
        ValueError: the precision is fp16, and there is no GPU.
        ModuleNotFoundError: wandb is wanted and not installed.
        RuntimeError: accelerate found another number of processes than were started.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("training.precision: fp16 needs a GPU, and there is none here; expected bf16, fp32 or auto")
    if wandb and not is_wandb_available():
        raise ModuleNotFoundError("training.wandb: the package wandb is missing: pip install wandb", name="wandb")
    # Without `cpu`, accelerate would treat each process on a CPU as a run of its own.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="wandb" if wandb else None,
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise RuntimeError(f"{started} processes were started, and accelerate found {accelerator.num_processes}")
    return accelerator


def distribute(model: VideoClassifier, training: Training, accelerator: Accelerator) -> nn.Module:
    """Moves the model to this process's device and prepares it for training by all processes.

    FSDP2 shards each block, frozen or not, and gathers it when it runs: each of N processes holds an N-th of the
    backbone. PyTorch's FSDP2 is used directly, since accelerate's does not run on a CPU.

    Args:
        model: the model, on the CPU.
        training: the config's section.
        accelerator: the processes.
    """
    blocks = list(find_blocks(model.backbone)[1])
    if training.compile:
        for block in blocks:
            if isinstance(block, AdaptedBlock):
                block.name = "a compiled block"  # different names would compile to different graphs
            block.compile()
    shards = training.parallel == "fsdp2" and accelerator.num_processes > 1
    if shards:  # before the model is moved: unsharded it may not fit
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    model.to(accelerator.device)
    if shards or accelerator.num_processes == 1:
        return model
    prepared: nn.Module = accelerator.prepare_model(model)
    return prepared


def without_sync(model: nn.Module, accelerator: Accelerator, last: bool) -> AbstractContextManager[Any]:
    """DDP averages gradients only in the last part of a step. FSDP always reduces: a rank has no memory for unsharded
    gradients."""
    return nullcontext() if last or isinstance(model, FSDPModule) else accelerator.no_sync(model)


def clip_gradients(parameters: list[nn.Parameter], norm: float | None) -> float:
    """Clips gradients to a norm, or not if it is None; returns their norm before, over all processes."""
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, norm, total)
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def broadcast_from_main(value: T, accelerator: Accelerator) -> T:
    """The main process's value, in all processes."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def exit_process(status: int) -> NoReturn:
    """Ends this process, immediately if it is one of several.

    A gloo thread may release the tensors of the last collective only while Python shuts down. That aborts the process,
    and a successful run would be reported as failed. The process group does not end its threads earlier, since FSDP2
    keeps it alive.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
