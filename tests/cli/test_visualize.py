"""`amflow visualize`: the pictures of pairs of frames, and the messages of failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import av
import pytest
import timm
import torch
from amflow_models import VideoClassifier, create_backbone, load_aligning_encoders, load_trained, save_trained
from amflow_models.cli import pictures, visualize
from amflow_models.cli.backbone import load
from amflow_models.cli.drawing import overlay
from amflow_models.cli.figure import draw
from amflow_models.cli.main import main
from amflow_models.cli.offline import clip_path, input_size, iterate_frames, read_frames
from amflow_models.cli.overlay import LARGEST, Sheet, write_flows
from amflow_models.cli.pictures import Flows, Pair, Pictures
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


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_one_pair_is_drawn_in_the_format_that_the_suffix_names(
    suffix: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"out.{suffix}"
    assert main(arguments(weights, "--blocks", "3", "--dpi", "60", "-o", str(path))) == 0
    assert capsys.readouterr().out == f"1 pair of frames: {path}\n"
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "png":
        assert content[24:26] == bytes((8, 6))  # 8 bits of each colour, red, green, blue and alpha: no palette
        half = tmp_path / "half.png"
        assert main(arguments(weights, "--blocks", "3", "--dpi", "30", "-o", str(half))) == 0
        assert abs(imread(path).shape[1] - 2 * imread(half).shape[1]) <= 2


@pytest.mark.parametrize(("height", "width", "expected"), [
    (720, 1280, (224, 392)), (1280, 720, (392, 224)), (272, 640, (224, 532)), (480, 480, (224, 224)),
    (225, 224, (224, 224)),
])  # fmt: skip
def test_inputs_keep_the_aspect_of_frames_to_half_a_patch(height: int, width: int, expected: tuple[int, int]) -> None:
    assert input_size(height, width, 224, 14) == expected


@torch.inference_mode()
def test_the_whole_frame_is_drawn_and_crop_draws_its_middle(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Pair] = []
    monkeypatch.setattr(visualize, "save_figure", lambda pair, *args, **options: drawn.append(pair))
    options: Any = {"model": TINY, "weights": weights, "size": SIZE, "blocks": [0]}
    for crop in (False, True):
        visualize.run(clip_path("bikes"), Path("out.png"), crop=crop, **options)
    whole, middle = drawn  # bikes has 640 x 272 pixels
    assert whole.images[0].shape == (3, 64, 144)
    assert whole.blocks[0].flow.shape == (4, 9)
    assert middle.images[0].shape == (3, 64, 64)
    torch.testing.assert_close(middle.images[0], whole.images[0][..., 40:104], rtol=0, atol=0.05)


def random_pair(blocks: int, height: int = 4, width: int = 7, numbers: tuple[int, int] = (0, 2)) -> Pair:
    generator = torch.Generator().manual_seed(numbers[0])
    flow = torch.rand(height, width, generator=generator)
    pca = torch.rand(height, width, 3, generator=generator)
    images = torch.rand(2, 3, 16 * height, 16 * width, generator=generator)
    shown = {block: Pictures((block + 1) * flow, flow, flow, pca) for block in range(blocks)}
    return Pair(numbers, (images[0], images[1]), shown)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("blocks", [2, 12])
def test_the_pictures_of_a_block_stand_in_one_column_and_those_of_a_row_in_one_row(blocks: int, shared: bool) -> None:
    """Also the last row, which has no colour bar."""
    figure = draw(random_pair(blocks), "title", shared=shared)
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.subfigs[1].axes if axes.images and axes.axison]
    boxes = [box for box in boxes if box.width > 2 * figure.dpi * 0.2]  # colour bars are narrower
    assert len(boxes) == 5 * blocks - blocks  # flow, to, from, components
    lefts = {round(box.x0, 1) for box in boxes}
    tops = {round(box.y1, 1) for box in boxes}
    assert len({(round(box.width, 1), round(box.height, 1)) for box in boxes}) == 1
    assert len(lefts) * len(tops) == len(boxes)
    assert boxes[0].height / boxes[0].width == pytest.approx(4 / 7, rel=0.02)


def test_scales_are_those_of_blocks_or_shared() -> None:
    for shared, ends in ((False, {1, 2}), (True, {2})):
        figure = draw(random_pair(2), "title", shared=shared)
        largest = {axes.images[0].get_clim()[1] for axes in figure.subfigs[1].axes if axes.images and axes.get_title()}
        flow = random_pair(2).blocks[0].flow
        values = torch.cat([(block + 1) * flow for block in range(2)]) if shared else flow
        base = 1e3 * values.quantile(0.995).item() / (2 if shared else 1)
        assert sorted(largest) == pytest.approx([base * end for end in sorted(ends)])


# What people without cones for red (protanopia) and for green (deuteranopia) see, in linear RGB: Machado, Oliveira and
# Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009.
VISION = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


@pytest.mark.parametrize("vision", VISION)
def test_readers_blind_to_red_and_green_can_tell_the_colours_of_two_components(vision: str) -> None:
    """In red, green and blue they could not tell two thirds of these pairs."""

    def distances(colours: Tensor) -> Tensor:
        seen = ((colours**2.2) @ torch.tensor(VISION[vision]).T).clamp(0, 1) ** (1 / 2.2)
        return (seen[0] - seen[1]).norm(dim=-1)

    levels = torch.tensor([0.0, 0.5, 1.0])
    for component in (0, 1):
        scores = torch.cartesian_prod(levels, levels, levels).expand(2, -1, -1).clone()
        scores[0, :, component], scores[1, :, component] = 0.0, 1.0
        scores[:, :, 2] = 0.5
        flat = torch.zeros(2, 27)
        colours = Pictures(flat, flat, flat, scores).pca_colours()
        assert 0 <= colours.min() < colours.max() <= 1
        assert distances(colours).min() > 0.35


def test_overlay_video_has_a_frame_for_each_pair_at_the_speed_of_the_clip(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    assert main(arguments(weights, "--pairs", "4", "--blocks", "0", "1", "--every", "5", "-o", str(path))) == 0
    with av.open(str(path)) as container, av.open(str(clip_path("bikes"))) as clip:
        assert container.streams.video[0].average_rate == clip.streams.video[0].average_rate / 5
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    sheet = Sheet(["frame", "block 0", "block 1"], [0, 1, 1], (64, 144))
    assert [frame.shape for frame in frames] == [(*sheet.size, 3)] * 4
    top, left = sheet._corner(0)
    shown = frames[0][top : top + sheet.tile[0], left : left + sheet.tile[1]]
    image = (255 * next(iterate_frames(clip_path("bikes"), size=sheet.tile))[1]).byte().permute(1, 2, 0).numpy()
    assert abs(shown.astype(float) - image).mean() < 8  # they differ by compression


def test_a_block_has_one_scale_in_the_whole_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the largest flow, which here comes last."""
    tiles: list[list[Tensor]] = []
    monkeypatch.setattr(Sheet, "draw", lambda self, given, title: tiles.append(given) or self._empty)
    monkeypatch.setattr("amflow_models.cli.overlay.video_writer", lambda *args: nullcontext(lambda frame: None))
    flow = torch.tensor([[0.1, 0.2]])
    flows = [Flows((n, n + 1), {0: (scale * flow, None)}) for n, scale in enumerate((1.0, 4.0))]
    write_flows(flows, tmp_path / "a.mp4", clip_path("bikes"), size=(16, 32), every=1, rate=None, title="")
    end = float(torch.tensor([0.1, 0.2, 0.4, 0.8]).quantile(0.995))
    for (image, drawn), pair in zip(tiles, flows, strict=True):
        assert torch.allclose(drawn, overlay(image, pair.blocks[0][0], end), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 13, 25])
@pytest.mark.parametrize("size", [(224, 392), (392, 224), (224, 224)])
def test_sheets_fit_a_video_and_keep_the_aspect_of_frames(count: int, size: tuple[int, int]) -> None:
    sheet = Sheet([str(n) for n in range(count)], [1.0] * count, size)
    assert sheet.size[0] <= LARGEST[1]
    assert sheet.size[1] <= LARGEST[0]
    assert not any(side % 2 for side in sheet.size)
    assert sheet.tile[0] / sheet.tile[1] == pytest.approx(size[0] / size[1], rel=0.02)
    drawn = sheet.draw([torch.ones(3, *sheet.tile)] * count, "title")
    assert drawn.shape == (*sheet.size, 3)
    assert (drawn == 255).all(-1).sum() >= count * sheet.tile[0] * sheet.tile[1]  # no tile hides another


@pytest.mark.slow
@pytest.mark.demo
def test_every_block_of_the_offline_model_is_drawn_by_default(tmp_path: Path) -> None:
    assert main(["visualize", "bikes", "--weights", "offline", "--pairs", "1", "-o", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    height, width = imread(path).shape[:2]
    assert width > 1.3 * height  # about a slide


@torch.inference_mode()
def test_pictures_show_the_flow_of_the_two_frames_on_the_grid(weights: str) -> None:
    """Prefix tokens are left out, and colours are in [0, 1]."""
    vit = load(TINY, weights, SIZE)
    (pair, *_) = pictures.pictures(vit, [2], clip_path("bikes"), SIZE, 125, 0)
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


def test_an_overlay_video_computes_flows_only_which_are_those_of_the_pictures(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = load(TINY, weights, SIZE)
    pair = next(pictures.pictures(vit, [0, 2], clip_path("bikes"), SIZE, 10, 0))
    monkeypatch.delattr(pictures, "motion_pca")
    monkeypatch.delattr(pictures, "motion_maps")
    flows = next(pictures.flows(vit, [0, 2], clip_path("bikes"), SIZE, 10, 0))
    assert flows.numbers == pair.numbers
    assert {block: aligned for block, (_, aligned) in flows.blocks.items()} == {0: None, 2: None}
    assert all(torch.equal(flow, pair.blocks[block].flow) for block, (flow, _) in flows.blocks.items())
    options: Any = {"model": TINY, "weights": weights, "size": SIZE, "every": 10, "pairs": 2}
    assert visualize.run(clip_path("bikes"), tmp_path / "flow.mp4", **options) == 2


def test_only_two_frames_are_in_memory_at_a_time(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def watched(*args: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:
        for number, image in iterate_frames(*args, **options):
            image = image.clone()
            alive.append(weakref.ref(image))
            yield number, image
            del image

    monkeypatch.setattr(pictures, "iterate_frames", watched)
    vit = load(TINY, weights, SIZE)
    for n, pair in enumerate(pictures.pictures(vit, [0], clip_path("bikes"), SIZE, 10, 0)):
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


OFFLINE = ("--weights", "offline")
BAD: dict[str, tuple[list[str], str]] = {
    "video": (["visualize", "nowhere.mp4"], "nowhere.mp4: there is no such file"),
    "one frame": (
        ["visualize", "bikes", "--start", "249"],
        "has 250 frames, and no two of them, 1 in 2",
    ),
    "block": (["visualize", "bikes", "--blocks", "0", "12"], "blocks: expected numbers from 0 to 11, got [0, 12]"),
    "offline": (
        ["visualize", "bikes", "--model", TINY, *OFFLINE],
        f"'offline' has those of vit_small_patch14_dinov2 alone, not of {TINY}",
    ),
    "file": (["visualize", "bikes", "--weights", "no.pth"], "there is no file no.pth"),
    "size": (
        ["visualize", "bikes", "--size", "225"],
        "--size 225: expected a multiple of 14, the patch size of vit_small_patch14_dinov2: 224 or 238",
    ),
    "size of another patch": (["visualize", "bikes", "--model", TINY, "--size", "225"], f"{TINY}: 224 or 240"),
    "model": (["visualize", "bikes", "--model", "no_such_vit"], "--model no_such_vit"),
    "another kind of model": (
        ["visualize", "bikes", "--model", "resnet18"],
        "--model resnet18: expected a plain vision transformer of timm, such as vit_small_patch14_dinov2",
    ),
    "output": (["visualize", "bikes", "-o", "{file}"], "expected a folder, or a name that ends in .mp4, .png"),
    "suffix": (["visualize", "bikes", "-o", "x.gif"], "x.gif: expected a name that ends in .mp4, .png, .svg, .pdf, or"),
    "pictures in a file": (["visualize", "bikes", "-o", "x.png", "--pairs", "2"], "x.png is a picture of one pair"),
    "no folder": (["visualize", "bikes", "-o", "nowhere/out.mp4"], "there is no folder nowhere"),
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded."""

    def fail(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(visualize, "load", fail)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", sorted(BAD.keys() - {"offline", "file"}))
def test_no_model_is_loaded_before_the_arguments_are_checked(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    argv = [word.replace("{file}", str(tmp_path / "file.txt")) for word in BAD[name][0]]
    assert main([*argv, *([] if "-o" in argv else ["-o", str(tmp_path / "out")])]) == 1
    assert not Path("x.gif").exists()
    assert not (tmp_path / "out").exists()


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
    vit = load(TINY, weights, SIZE)
    loaded = load_aligning_encoders(encoders)
    (pair, *_) = pictures.pictures(vit, [0], clip_path("bikes"), SIZE, 125, 0, loaded)
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
    sheet = Sheet(["frame", *(f"{n}{end}" for n in (0, 11) for end in ("", " aligned"))], [0, 1, 1, 1, 1], (64, 144))
    with av.open(str(path)) as container:
        assert {frame.to_ndarray(format="rgb24").shape[:2] for frame in container.decode(video=0)} == {sheet.size}


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
