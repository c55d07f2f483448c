"""The families of models of `python -m benchmarks.families`, and where Hiera's tokens lie."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from amflow_kernels import am_flow, record_am_flow, record_qk
from amflow_kernels.integrations import recording
from amflow_kernels.integrations import transformers as preset
from benchmarks import families

T = 3


@pytest.mark.slow
def test_no_family_is_recorded_wrongly_or_crashes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hiera", reason="needs hiera-transformer (the extra families)")
    pytest.importorskip("open_clip", reason="needs open_clip_torch (the extra families)")
    failed = families.main([])
    printed = capsys.readouterr().out
    assert not failed, printed
    counts = re.fullmatch(r"right (\d+), refused (\d+), wrong 0, crashed 0", printed.splitlines()[-1])
    assert counts is not None
    assert int(counts[1]) >= 40


def test_the_page_has_every_family() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (right|refused) \|", families.PAGE.read_text(), re.M)
    assert [name for name, _ in rows] == [family.name for family in families.FAMILIES]


def test_the_command_fails_where_a_flow_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where an error is not one of this library that names a layer."""
    assert families.main(["torchvision ViT"]) == 0
    assert capsys.readouterr().out.endswith("right 1, refused 0, wrong 0, crashed 0\n")
    monkeypatch.setattr(recording, "am_flow", lambda *args, **options: am_flow(*args, **options) + 1e-3)
    assert families.main(["torchvision ViT"]) == 1
    assert capsys.readouterr().out.endswith("right 0, refused 0, wrong 1, crashed 0\n")
    monkeypatch.setattr(recording, "am_flow", None)
    assert families.main(["torchvision ViT"]) == 1
    assert capsys.readouterr().out.endswith("right 0, refused 0, wrong 0, crashed 1\n")


class PlaceEmbed(nn.Module):
    """Tokens that carry their place on the grid in their first two channels, beside the image's own content."""

    def __init__(self, embed: nn.Module, grid: int) -> None:
        super().__init__()
        self.embed, self.grid = embed, grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.embed(*args, **kwargs).clone()
        place = torch.arange(float(self.grid))
        x[..., :2] = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).flatten(0, 1)
        return x


def keep_first_two(linear: nn.Linear, rows: slice) -> None:
    """Makes a linear layer pass the first two channels on, as the first of some rows of its output."""
    linear.weight[rows].zero_()
    linear.bias[rows].zero_()
    linear.weight[rows.start, 0] = linear.weight[rows.start + 1, 1] = 1


@torch.no_grad()
def test_hieras_grid_is_where_its_tokens_are() -> None:
    """In facebookresearch's own Hiera: keys carry the place of their token through its unrolling, windows and pooling.

    Pooling takes the largest row and column of 2 x 2 tokens, which is 2 r + 1 of the pooled token r.
    """
    pytest.importorskip("hiera", reason="needs hiera-transformer (the extra families)")
    torch.manual_seed(0)
    model = families.hiera_model().eval()
    model.patch_embed = PlaceEmbed(model.patch_embed, 16)
    model.pos_embed.zero_()
    for block in model.blocks:
        block.norm1 = nn.Identity()
        for residual in (block.attn.proj, block.mlp.fc2):
            residual.weight.zero_()
            residual.bias.zero_()
        width = block.attn.dim_out
        keep_first_two(block.attn.qkv, slice(width, 2 * width))
        if block.dim != width:
            keep_first_two(block.proj, slice(0, 2))
    x = torch.randn(2 * T, 3, 64, 64)
    with record_am_flow(model, num_frames=T) as flows, record_qk(model) as qk:
        model(x)
    sizes = []
    for name, (_, k) in qk.items():
        flow, grid = flows[name], flows[name].grid
        size = grid.shape[-1]
        k = k if k.dim() == 5 else k[:, :, None]
        place = k[0, 0, ..., :2].div(16 // size, rounding_mode="floor").long()  # (windows, keys, 2)
        values = flow.flow if flow.windows > 1 else flow.flow.unsqueeze(-2)
        assert sorted(map(tuple, place.flatten(0, 1).tolist())) == [(r, c) for r in range(size) for c in range(size)]
        for window, keys in enumerate(place.tolist()):
            for key, (row, column) in enumerate(keys):
                assert torch.equal(grid[..., row, column], values[..., window, key])
        assert values.unique().numel() > size * size // 2  # with equal flows any order would pass
        sizes.append((size, flow.windows))
    assert sizes == [(16, 16), (16, 16), (8, 16), (8, 16), (4, 1)]
    assert torch.equal(values.squeeze(-2), am_flow(*(part.squeeze(2).unflatten(0, (2, T)) for part in qk[name])))


@pytest.mark.parametrize("record", [record_am_flow, preset.record_am_flow], ids=["any model", "transformers"])
def test_a_clip_model_is_told_to_record_its_vision_model(record: Any) -> None:
    model = tf.CLIPModel(tf.CLIPConfig(**families.clip_options()))
    with pytest.raises(TypeError, match=r"model: .*record its `\.vision_model`"), record(model, num_frames=T):
        pass
