"""One process or many: accelerate knows the machines; the model is copied (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from amflow_models.blocks import AdaptedBlock, find_blocks
from amflow_models.classifier import VideoClassifier
from amflow_models.training.config import Training

T = TypeVar("T")


def make_accelerator(precision: str) -> Accelerator:
    """Of the processes that torchrun (or ``accelerate launch``) started, or of this one alone."""
    # Unless told that it is on a CPU, accelerate takes each process on one for a run of its own.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no" if precision == "fp32" else precision
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise RuntimeError(f"{started} processes were started, and accelerate found {accelerator.num_processes}")
    return accelerator


def distribute(model: VideoClassifier, training: Training, accelerator: Accelerator) -> nn.Module:
    """The model on this process's device, ready to be trained by all processes together.

    FSDP2 shards each block, frozen or not, and gathers it when it runs: per device, a backbone that N processes train
    takes an N-th of its memory. It is PyTorch's own, as accelerate's does not run on a CPU.
    """
    blocks = list(find_blocks(model.backbone)[1])
    if training.compile:
        for block in blocks:
            if isinstance(block, AdaptedBlock):
                block.name = "a compiled block"  # with names of their own, each would be a graph of its own
            block.compile()
    shards = training.parallel == "fsdp2" and accelerator.num_processes > 1
    if shards:  # before anything is moved: whole, the model may not fit
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    model.to(accelerator.device)
    if shards or accelerator.num_processes == 1:
        return model
    prepared: nn.Module = accelerator.prepare_model(model)
    return prepared


def without_sync(model: nn.Module, accelerator: Accelerator, last: bool) -> AbstractContextManager[Any]:
    """Gradients of copies are averaged in the last part of a step alone; shards always are, they have no room else."""
    return nullcontext() if last or isinstance(model, FSDPModule) else accelerator.no_sync(model)


def clip_gradients(parameters: list[nn.Parameter], norm: float | None) -> float:
    """Clips to a norm, if any; returns what the norm was, over all processes."""
    found = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, norm, found)
    return float(found.full_tensor() if isinstance(found, DTensor) else found)


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in one of the processes: all get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def of_main(found: T, accelerator: Accelerator) -> T:
    """What the main process found, in all of them."""
    return found if accelerator.num_processes == 1 else broadcast_object_list([found])[0]


def leave(status: int) -> NoReturn:
    """Ends this process, at once if it is one of several.

    A thread of gloo's may come to drop the last collective's tensors only when Python is being taken down, which
    aborts the process: a run that succeeded would be told as failed. The group can't be relied on to end its threads
    before, as FSDP2 keeps it alive.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
