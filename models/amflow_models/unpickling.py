"""PyTorch files are read without running what they hold."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only(source: str | Path) -> Iterator[None]:
    """Inside the ``with`` block `torch.load` builds nothing but tensors and plain values, whoever calls it.

    Up to timm 1.0.25, files of weights are otherwise unpickled, which runs any code that they hold. Its own checkpoints
    have an `argparse.Namespace`, which is a plain value, too.

    Args:
        source: where the file is, for messages.

    Raises:
        ValueError: a file holds other objects, or is damaged so that it seems to.
    """
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"  # timm has no argument for all of its calls
    try:
        with torch.serialization.safe_globals([Namespace]):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if not any(isinstance(reason, pickle.UnpicklingError) for reason in (error, error.__cause__)):
            raise
        raise ValueError(
            f"{source}: is damaged, or holds Python objects besides tensors and plain values. These are never loaded, "
            "as they can run any code; save a state dict of tensors, best as safetensors"
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before
