"""Records one small model of every family with random weights, and judges each: right, refused, wrong or crashed.

python -m benchmarks.families [PART OF A NAME ...] [--write]

A family is right if all its flows keep the error budget against float64, computed from q and k that are captured
without this library, and if recording changes no bit of the model's output. It is refused if an error of this library
names the layer or the argument. The exit code is 1 if any is wrong or crashed. --write writes docs/families.md.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from amflow_kernels import record_am_flow
from amflow_kernels import testing as tt
from amflow_kernels.problem import Problem
from benchmarks.dino import DinoViT
from benchmarks.result_files import add_write
from benchmarks.tables import Table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
TABLE = "<!-- written by python -m benchmarks.families --write -->"
CLIPS, FRAMES = 2, 2
Model = Any


@dataclass(frozen=True)
class Family:
    """How to make a model, what it is given, and how it is recorded.

    Attributes:
        name: as in the table.
        make: makes the model.
        given: makes its arguments, of CLIPS * FRAMES images.
        options: of `record_am_flow`.
        run: runs the model.
    """

    name: str
    make: Callable[[], Model]
    given: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = lambda model, *given: model(*given)


@dataclass(frozen=True)
class Verdict:
    family: str
    outcome: str  # right, refused, wrong or crashed
    layers: int
    text: str


def images(size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(CLIPS * FRAMES, 3, size, size),)


def videos(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(CLIPS, *shape),)


TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 2}),
    "cpubone_b0_bfrobust": (64, {}),
    "crossvit_9_240": (240, {}),
    "csatv2": (128, {}),
    "davit_tiny": (64, {}),
    "deepseek_vit_412m": (56, {"depth": 2}),
    "deit3_small_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "fastvit_mci0": (64, {}),
    "gemma4_vit_167m": (64, {"depth": 2}),
    "hiera_tiny_224": (64, {"img_size": 64}),
    "sam2_hiera_tiny": (64, {}),
    "iformer_s": (64, {}),
    "lowformer_b0": (64, {}),
    "coatnet_0_224": (64, {"img_size": 64}),
    "maxvit_tiny_tf_224": (64, {"img_size": 64}),
    "caformer_s18": (64, {}),
    "mobilenetv5_base": (64, {}),
    "mobilevit_xxs": (128, {}),
    "naflexvit_base_patch16_gap": (64, {"depth": 2}),
    "nest_tiny": (64, {"img_size": 64}),
    "nextvit_small": (64, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "qwen3_vit_88m": (64, {"depth": 2}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "tiny_vit_5m_224": (64, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "vit_small_patch14_reg4_dinov2": (56, {"img_size": 56, "depth": 2}),
    "vit_small_patch16_dinov3": (64, {"img_size": 64, "depth": 2}),
    "vit_base_mci_224": (64, {"img_size": 64, "depth": 2}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "samvit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "vitamin_small_224": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2}),
}  # fmt: skip

TINY: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip


def timm_family(name: str, **recording: Any) -> Family:
    size, options = TIMM[name]

    def make() -> Model:
        import timm

        return fused(timm.create_model(name, pretrained=False, **options))

    said = "".join(f", {key}={value!r}" for key, value in recording.items())
    return Family(f"timm {name}{said}", make, images(size), recording)


def fused(model: nn.Module) -> nn.Module:
    """Switches on the fused attention of timm's layers that are eager by default."""
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True  # type: ignore[assignment]
    return model


def transformers_family(
    name: str, model: str, given: Callable[[], tuple[Any, ...]] | None = None, *, tiny: bool = True, **options: Any
) -> Family:
    def make() -> Model:
        import transformers

        model_class = getattr(transformers, f"{model}Model")
        return model_class(model_class.config_class(**(TINY if tiny else {}), **options))

    return Family(f"transformers {name}", make, given or images(64))


def torchvision_vit() -> Model:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=64)


def open_clip_model() -> Model:
    from open_clip import CLIP

    vision = {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 32}
    return CLIP(32, vision, {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2})


def hiera_model(size: tuple[int, ...] = (64, 64), mask_unit_size: tuple[int, ...] = (4, 4), **options: Any) -> Model:
    from hiera import Hiera

    return Hiera(
        input_size=size, embed_dim=32, num_classes=8, stages=(1, 2, 2), q_pool=2,
        mask_unit_size=mask_unit_size, mask_unit_attn=(True, True, False),
        **options,
    )  # fmt: skip


def hiera_video() -> Model:
    return hiera_model(
        (4, 64, 64), q_stride=(1, 2, 2), mask_unit_size=(1, 4, 4), patch_kernel=(3, 7, 7), patch_stride=(2, 4, 4),
        patch_padding=(1, 3, 3), sep_pos_embed=True,
    )  # fmt: skip


def clip_options() -> dict[str, Any]:
    return {"text_config": {**TINY, "vocab_size": 64, "max_position_embeddings": 8}, "vision_config": TINY}


def clip_inputs() -> tuple[Any, ...]:
    return torch.randint(0, 64, (CLIPS * FRAMES, 8)), torch.randn(CLIPS * FRAMES, 3, 64, 64)


def siglip2_inputs(padded: int = 0) -> tuple[Any, ...]:
    """Images of 4 x 4 patches, of which the last ones are padding."""
    count = CLIPS * FRAMES
    mask = torch.ones(count, 16, dtype=torch.int64)
    mask[:, 16 - padded :] = 0
    return torch.randn(count, 16, 3 * 16 * 16), mask, torch.full((count, 2), 4)


SIGLIP2: dict[str, Any] = {"num_patches": 16}
SWIN: dict[str, Any] = {"image_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 7}

FAMILIES: list[Family] = [
    *map(timm_family, TIMM),
    *(timm_family(name, windows="batch") for name in ("davit_tiny", "mobilevit_xxs", "sam2_hiera_tiny")),
    Family("torchvision ViT", torchvision_vit, images(64)),
    Family("torch TransformerEncoder", lambda: encoder(True), lambda: (torch.randn(4, 9, 48),)),
    Family("torch TransformerEncoder, tokens first", lambda: encoder(False), lambda: (torch.randn(9, 4, 48),)),
    Family("open_clip ViT", lambda: open_clip_model().visual, images(64)),
    Family("open_clip CLIP", open_clip_model, images(64), run=lambda model, x: model.encode_image(x)),
    Family(
        "open_clip CLIP, layers='visual.*'",
        open_clip_model,
        images(64),
        {"layers": "visual.*"},
        lambda model, x: model.encode_image(x),
    ),
    Family("Hiera", hiera_model, images(64)),
    Family("Hiera, video", hiera_video, videos(3, 4, 64, 64)),
    Family("DINOv2 repository", DinoViT, images(56)),
    Family("DINOv2 repository, eager", lambda: DinoViT(fused=False), images(56)),
    Family("DINOv3 repository", lambda: DinoViT(in_lists=True), images(56)),
    transformers_family("ViT", "ViT"),
    transformers_family("ViT, eager", "ViT", attn_implementation="eager"),
    transformers_family("DINOv2", "Dinov2"),
    transformers_family("DINOv2 with registers", "Dinov2WithRegisters", num_register_tokens=4),
    transformers_family("DINOv3", "DINOv3ViT", num_register_tokens=4),
    transformers_family("CLIP vision", "CLIPVision"),
    transformers_family("CLIP", "CLIP", clip_inputs, **clip_options()),
    transformers_family("SigLIP vision", "SiglipVision"),
    transformers_family("SigLIP 2 vision", "Siglip2Vision", siglip2_inputs, **SIGLIP2),
    transformers_family("SigLIP 2 vision, padded", "Siglip2Vision", lambda: siglip2_inputs(3), **SIGLIP2),
    transformers_family("DeiT", "DeiT"),
    transformers_family("I-JEPA", "IJepa"),
    transformers_family("ViT-MSN", "ViTMSN"),
    transformers_family("AIMv2 vision", "Aimv2Vision"),
    transformers_family("BEiT", "Beit", use_relative_position_bias=True),
    transformers_family("Data2Vec vision", "Data2VecVision"),
    transformers_family("Swin", "Swin", images(56), tiny=False, **SWIN),
    transformers_family("SAM vision", "SamVision", global_attn_indexes=[1], window_size=2, mlp_dim=64),
    transformers_family("VideoMAE", "VideoMAE", videos(2, 3, 64, 64), num_frames=2, tubelet_size=1),
    transformers_family("ViViT", "Vivit", videos(2, 3, 64, 64), num_frames=2, tubelet_size=[1, 16, 16]),
    transformers_family("TimeSformer", "Timesformer", videos(2, 3, 64, 64), num_frames=2),
    transformers_family(
        "V-JEPA 2", "VJEPA2", videos(2, 3, 64, 64), crop_size=64, frames_per_clip=2, pred_hidden_size=48,
        pred_num_attention_heads=3, pred_num_hidden_layers=1,
    ),
]  # fmt: skip


def encoder(batch_first: bool) -> Model:
    layer = nn.TransformerEncoderLayer(48, 4, 64, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@torch.no_grad()
def judge(family: Family) -> Verdict:
    """Records a model of the family in eval mode."""
    torch.manual_seed(0)
    model = family.make().eval()
    given = family.given()
    state = deepcopy(model.state_dict())
    for noise in (0.05, 0.03, 0.02, 0.01, 0.0):  # attention of freshly initialised layers is nearly uniform
        model.load_state_dict(state)
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        with captured_qk() as captured:
            expected = tensors(family.run(model, *given))
        if all((q.shape[-1] ** -0.5 * q @ k.mT).std() < 6 for q, k in captured):  # the range of the error budget
            break
    try:
        with record_am_flow(model, num_frames=FRAMES, **family.options) as flows:
            out = tensors(family.run(model, *given))
    except Exception as error:
        return Verdict(family.name, "refused" if is_refusal(error, model) else "crashed", 0, first_line(error))
    faults = [] if all(map(torch.equal, out, expected)) else ["recording changes the output"]
    seen = [(q, k) for q, k in captured if q.dim() == 5 or q.shape[-2] > 1 or k.shape[-2] == 1]
    if len(seen) != len(flows):
        faults.append(f"{len(flows)} of {len(seen)} attention calls recorded")
    for (q, k), (name, flow) in zip(seen, flows.items(), strict=False):
        if family.options.get("windows"):
            q, k = (x.unflatten(0, (CLIPS * FRAMES, -1)).transpose(1, 2) for x in (q, k))
        fault = fault_of(flow, *(x.unflatten(0, (-1, FRAMES)) for x in (q, k)))
        faults += [f"{name}: {fault}"] * bool(fault)
    if max(flow.flow.std() for flow in flows.values()) < 1e-5:
        faults.append("all flows are so even that any would pass")
    shape = " x ".join(map(str, next(iter(flows.values())).flow.shape[2:]))
    grids = sum(flow.grid is not None for flow in flows.values())
    text = "; ".join(faults) or f"{shape}{', grid known' if grids == len(flows) else ''}"
    return Verdict(family.name, "wrong" if faults else "right", len(flows), text)


def fault_of(flow: Any, q: Tensor, k: Tensor) -> str:
    """What is wrong with a recorded flow, of q and k (B, T, heads, [windows,] N, D)."""
    if q.dim() == 6 and q.shape[3] == flow.flow.shape[2] != q.shape[2]:  # windows come before heads
        q, k = q.transpose(2, 3), k.transpose(2, 3)
    if q.dim() == 6 and q.shape[3] == 1:
        q, k = q.squeeze(3), k.squeeze(3)
    problem = Problem(q.contiguous(), k.contiguous(), center=True)
    exact = tt.oracle_flow(problem)
    if flow.flow.shape != exact.shape:
        return f"flow of shape {tuple(flow.flow.shape)}, not {tuple(exact.shape)}"
    try:
        tt.assert_flow(flow.flow, exact, q.shape[-2])
    except AssertionError as error:
        return str(error)
    if flow.grid is not None:
        on_grid = torch.cat((flow.prefix, flow.grid.flatten(-2)), -1)
        whole = flow.flow.flatten(-2) if flow.windows > 1 else flow.flow
        if not torch.equal(on_grid.sort().values, whole.sort().values):
            return "the grid has other values than the flow"
    return ""


@contextmanager
def captured_qk() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """q and k of all attention calls, in order, with the fused inference kernels of torch.nn off."""
    seen: list[tuple[Tensor, Tensor]] = []
    attention = nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query, key))
        return attention(query, key, *args, **kwargs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch.object(nn.functional, "scaled_dot_product_attention", spy):
            yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors(out: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if hasattr(out, "values") else out if isinstance(out, (list, tuple)) else ()
    return [x for value in values for x in tensors(value)]


def is_refusal(error: Exception, model: nn.Module) -> bool:
    """Whether an error was raised by this library and names a layer or an argument."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    layers = [name for name, _ in model.named_modules() if "." in name]
    names_one = str(error).partition(":")[0] in ("model", "num_frames") or any(name in str(error) for name in layers)
    return "amflow_kernels" in where and names_one


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def table(verdicts: list[Verdict]) -> Table:
    rows = [[v.family, v.outcome, str(v.layers or ""), v.text.replace("|", "\\|")] for v in verdicts]
    return Table(
        "Families", ["model", "outcome", "layers", "tokens of the first layer's flow, or the message"], rows, []
    )


def summary(verdicts: list[Verdict]) -> str:
    """Counts of the outcomes."""
    words = ("right", "refused", "wrong", "crashed")
    return ", ".join(f"{word} {sum(v.outcome == word for v in verdicts)}" for word in words)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names of families; all by default")
    add_write(parser, PAGE)
    options = parser.parse_args(arguments)
    verdicts = []
    for family in FAMILIES:
        if not options.names or any(name.lower() in family.name.lower() for name in options.names):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdicts.append(judge(family))
            print(f"{verdicts[-1].outcome:8} {family.name}: {verdicts[-1].text}", flush=True)
    if options.write:
        head, _, _ = PAGE.read_text().partition(TABLE)
        PAGE.write_text(f"{head}{TABLE}\n\n{table(verdicts).markdown()}\n\n{summary(verdicts)}.\n")
    print(summary(verdicts))
    return int(any(v.outcome in ("wrong", "crashed") for v in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
