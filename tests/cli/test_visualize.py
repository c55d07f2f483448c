"""`amflow visualize`: the pictures of pairs of frames, and the messages of failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import timm
import torch
from amflow_models import VideoClassifier, create_backbone, load_aligning_encoders, load_trained, save_trained
from amflow_models.cli import visualize
from amflow_models.cli.main import main
from amflow_models.cli.offline import clip_path, iterate_frames, read_frames
from matplotlib.image import imread
from torch import Tensor

from amflow_kernels import am_flow
from amflow_kernels.integrations.timm import record_qk

TINY = "vit_tiny_patch16_224"
SIZE = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the weights of a small model."""
    torch.manual_seed(0)
    model = timm.create_model(TINY, pretrained=False, img_size=SIZE, num_classes=0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def arguments(weights: str, *more: str) -> list[str]:
    """The command for the small model, with more arguments."""
    return ["visualize", "bikes", "--model", TINY, "--weights", weights, "--size", str(SIZE), *more]


def test_each_pair_gets_a_png(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "pictures"
    assert main(arguments(weights, "--blocks", "3", "0", "--pairs", "3", "--every", "5", "--start", "10",
                          "-o", str(folder))) == 0  # fmt: skip
    assert capsys.readouterr().out == f"3 pairs of frames: {folder}\n"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["pair_00010_00015.png", "pair_00015_00020.png", "pair_00020_00025.png"]
    for path in folder.iterdir():
        assert imread(path)[..., :3].std() > 0.05  # not an empty page


def test_overlay_video_has_a_frame_for_each_pair_with_five_tiles_in_a_row(weights: str, tmp_path: Path) -> None:
    """The tiles are the image and its blocks."""
    path = tmp_path / "out.mp4"
    assert main(arguments(weights, "--pairs", "4", "--blocks", "0", "1", "2", "3", "4", "-o", str(path))) == 0
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(2 * SIZE, 5 * SIZE, 3)] * 4
    image = (255 * next(iterate_frames(clip_path("bikes"), size=SIZE))[1]).byte().permute(1, 2, 0).numpy()
    assert abs(frames[0][:SIZE, :SIZE].astype(float) - image).mean() < 8  # they differ by compression


@pytest.mark.slow
@pytest.mark.demo
def test_every_block_of_the_offline_model_is_drawn_by_default(tmp_path: Path) -> None:
    assert main(["visualize", "bikes", "--pairs", "1", "-o", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    height, width = imread(path).shape[:2]
    assert width > 2 * height  # a column for each of twelve blocks


@torch.inference_mode()
def test_pictures_show_the_flow_of_the_two_frames_on_the_grid(weights: str) -> None:
    """Prefix tokens are left out, and colours are in [0, 1]."""
    vit = visualize.load(TINY, weights, SIZE)
    (pair, *_) = visualize.pictures(vit, [2], clip_path("bikes"), SIZE, 125, 0)
    assert pair.numbers == (0, 125)
    frames = torch.stack(pair.images)
    with record_qk(vit, blocks=[2]) as qk:
        vit((frames - 0.5) / 0.5)
    flow = am_flow(*(x.unsqueeze(0) for x in qk[2]), head_reduction="mean", center=True)[0, 0, 1:].view(4, 4)
    drawn = pair.blocks[2]
    torch.testing.assert_close(drawn.flow, flow, rtol=1e-3, atol=1e-6)
    assert drawn.rows.shape == drawn.columns.shape == (4, 4)
    assert drawn.pca.shape == (4, 4, 3)
    assert 0 <= drawn.pca.min() < drawn.pca.max() <= 1


def test_only_two_frames_are_in_memory_at_a_time(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def watched(*args: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:
        for number, image in iterate_frames(*args, **options):
            image = image.clone()
            alive.append(weakref.ref(image))
            yield number, image
            del image

    monkeypatch.setattr(visualize, "iterate_frames", watched)
    vit = visualize.load(TINY, weights, SIZE)
    for n, pair in enumerate(visualize.pictures(vit, [0], clip_path("bikes"), SIZE, 10, 0)):
        del pair
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2
        if n == 3:
            break
    assert len(alive) == 5


@pytest.mark.demo
def test_frames_read_one_by_one_equal_those_of_a_clip() -> None:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    clip = read_frames(clip_path("carphone_pristine"), 3, 4, 56, start=5)
    for (number, image), expected, index in zip(
        iterate_frames(clip_path("carphone_pristine"), 4, 56, start=5), clip, (5, 9, 13), strict=False
    ):
        assert number == index
        assert torch.equal((image - mean) / std, expected)


BAD: dict[str, tuple[list[str], str]] = {
    "video": (["visualize", "nowhere.mp4"], "nowhere.mp4: there is no such file"),
    "one frame": (["visualize", "bikes", "--start", "249"], "has no two frames, 1 in 2 from frame 249"),
    "block": (["visualize", "bikes", "--blocks", "0", "12"], "blocks: expected numbers from 0 to 11, got [0, 12]"),
    "offline": (
        ["visualize", "bikes", "--model", TINY],
        f"'offline' has those of vit_small_patch14_dinov2 alone, not of {TINY}",
    ),
    "file": (["visualize", "bikes", "--weights", "no.pth"], "there is no file no.pth"),
    "size": (["visualize", "bikes", "--size", "100"], "at 100 px: img_size: expected a positive multiple of 14"),
    "model": (["visualize", "bikes", "--model", "no_such_vit", "--weights", "hub"], "--model no_such_vit"),
    "output": (["visualize", "bikes", "-o", "{file}"], "expected a folder, or a name that ends in .mp4"),
    "no folder": (["visualize", "bikes", "-o", "nowhere/out.mp4"], "there is no folder nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_failures_are_reported_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD[name]
    file = tmp_path / "file.txt"
    file.write_text("mine")
    argv = [word.replace("{file}", str(file)) for word in argv]
    if "-o" not in argv:
        argv += ["-o", str(tmp_path / "out")]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("amflow: ")
    assert message in error
    assert error.count("\n") == 1
    assert file.read_text() == "mine"


def test_file_without_weights_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert main([*arguments(str(tmp_path / name)), "-o", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_model_that_is_no_vision_transformer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t", pretrained=False, num_classes=0).state_dict(), path)
    assert main(["visualize", "bikes", "--model", "resnet10t", "--weights", str(path), "-o", str(tmp_path)]) == 1
    assert "amflow: --model resnet10t" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoders(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of parameters as after training: the aligning encoders of blocks 0 and 11 change their input."""
    model = VideoClassifier(create_backbone(TINY, weights, SIZE), 3, 2, align=True, bottleneck=8)
    with torch.no_grad():
        for block in (0, 11):
            model.backbone.blocks[block].align.g.fill_(0.5)
    path = tmp_path_factory.mktemp("encoders") / "trained.safetensors"
    save_trained(model, path)
    return path


@torch.inference_mode()
def test_aligned_flow_equals_the_flow_that_the_trained_model_computes(weights: str, encoders: Path) -> None:
    """In block 0, which comes before any adapter, the trained model's gate gets the same flow."""
    vit = visualize.load(TINY, weights, SIZE)
    loaded = load_aligning_encoders(encoders)
    (pair, *_) = visualize.pictures(vit, [0], clip_path("bikes"), SIZE, 125, 0, loaded)
    model = VideoClassifier(create_backbone(TINY, weights, SIZE), 3, 2, align=True, bottleneck=8)
    load_trained(model, encoders)
    flows: list[Tensor] = []
    model.backbone.blocks[0].adapter.gate.register_forward_pre_hook(lambda _, args: flows.append(args[1]))
    model((torch.stack(pair.images) - 0.5)[None] / 0.5)
    drawn = pair.blocks[0]
    torch.testing.assert_close(drawn.aligned, flows[0][0, 0, 1:].view(4, 4), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(drawn.aligned, drawn.flow, rtol=1e-2)


def test_compare_alignment_adds_a_row_to_the_png(weights: str, encoders: Path, tmp_path: Path) -> None:
    for name, more in (("plain", []), ("aligned", ["--compare-alignment", str(encoders)])):
        words = arguments(weights, "--pairs", "1", "--blocks", "0", *more)
        assert main([*words, "-o", str(tmp_path / name)]) == 0
    plain, aligned = (imread(next((tmp_path / name).iterdir())).shape for name in ("plain", "aligned"))
    assert aligned[0] > plain[0]


def test_compare_alignment_adds_a_tile_for_each_block_to_the_video(
    weights: str, encoders: Path, tmp_path: Path
) -> None:
    """By default, the blocks with an encoder are drawn: 0 and 11."""
    path = tmp_path / "out.mp4"
    assert main(arguments(weights, "--pairs", "2", "--compare-alignment", str(encoders), "-o", str(path))) == 0
    with av.open(str(path)) as container:
        assert {frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)} == {(SIZE, 5 * SIZE, 3)}


def test_unsuitable_alignment_files_are_reported_in_one_line(
    weights: str, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    wide = tmp_path / "wide.safetensors"
    save_trained(VideoClassifier(create_backbone("vit_small_patch16_224", None, SIZE), 3, 2, align=True), wide)
    none = tmp_path / "none.safetensors"
    save_trained(VideoClassifier(create_backbone(TINY, None, SIZE), 3, 2), none)
    capsys.readouterr()
    for words, message in (
        (["--compare-alignment", str(bad)], "can't be read as safetensors"),
        (
            ["--compare-alignment", str(wide)],
            "is of block 0 and 384 channels; the model has 12 blocks and 192 channels",
        ),
        (["--compare-alignment", str(none)], "has no aligning encoder; models have them with align=True"),
        (["--compare-alignment", str(encoders), "--blocks", "1"], "has aligning encoders of [0, 11], got [1]"),
    ):
        assert main([*arguments(weights, *words), "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
