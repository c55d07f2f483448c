"""Transforms of clips."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from amflow_models.data import TrainTransform, names_directions, spatial_crops
from torch import Tensor


def picture(height: int = 60, width: int = 80, frames: int = 1) -> Tensor:
    """A clip with the same smooth picture in all frames."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    colours = torch.stack([x + 0 * y, y + 0 * x, (3 * x + 2 * y).sin().abs()])
    return (255 * colours).byte().expand(frames, 3, height, width)


@pytest.mark.parametrize("augment", [False, True])
def test_a_transform_treats_frames_alike_and_depends_only_on_its_seed(augment: bool) -> None:
    """PyTorch's global random state is not changed."""
    transform = TrainTransform(32, scale=(0.3, 1.0), flip=True, augment=augment)
    clip = picture(frames=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    results = []
    for seed in range(60):
        result = transform(clip, seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert result.shape == (4, 3, 32, 32)
        assert result.dtype == torch.uint8
        assert torch.equal(result, result[:1].expand_as(result)), seed
        torch.manual_seed(seed + 1)
        torch.rand(3)
        assert torch.equal(result, transform(clip, seed))
        results.append(result[0])
        torch.set_rng_state(before)
    assert len({result.numpy().tobytes() for result in results}) > 50


@pytest.mark.parametrize("name", ["train", "crops"])
def test_frames_are_resized_one_by_one_to_the_same_bits(name: str) -> None:
    """No frame of full size is kept once the next one is asked for."""
    clip = torch.randint(0, 256, (5, 3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = TrainTransform(32, scale=(0.3, 1.0), flip=True, augment=True)

    def transformed(frames: Iterable[Tensor]) -> Tensor:
        return transform(frames, 11) if name == "train" else spatial_crops(frames, 32, 3)

    earlier: list[weakref.ref[Tensor]] = []

    def decode() -> Iterator[Tensor]:
        for number in range(len(clip)):
            alive = sum(frame() is not None for frame in earlier)
            assert alive <= 1, f"{alive} frames are kept at frame {number}"
            frame = clip[number].clone()
            earlier.append(weakref.ref(frame))
            yield frame
            del frame

    result = transformed(decode())
    assert torch.equal(result, transformed(clip))
    if name == "train":  # as torchvision transforms a whole clip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(11)
            assert torch.equal(result, transform.steps(transform.crop(clip)))


def test_half_of_the_clips_are_flipped_or_none() -> None:
    """Red grows from left to right in the picture."""
    for flip, least, most in ((True, 20, 40), (False, 0, 0)):
        transform = TrainTransform(32, scale=(0.5, 1.0), flip=flip, augment=False)
        clips = [transform(picture(), seed)[0, 0].float() for seed in range(60)]
        flipped = sum(bool(clip[:, 0].mean() > clip[:, -1].mean()) for clip in clips)
        assert least <= flipped <= most


def test_crops_have_the_share_of_the_area_that_scale_says() -> None:
    """A crop of the whole area of a square is the square itself."""
    clip = picture(32, 32)
    transform = TrainTransform(32, scale=(1.0, 1.0), flip=False, augment=False)
    assert any(torch.equal(transform(clip, seed), clip) for seed in range(20))
    small = TrainTransform(32, scale=(0.05, 0.1), flip=False, augment=False)
    for seed in range(10):
        red = small(picture(200, 200), seed)[0, 0].float()
        assert red.max() - red.min() < 0.5 * 255


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (50, 50), (33, 1000), (1000, 7)])
def test_crops_in_testing_are_the_centre_and_both_ends(height: int, width: int) -> None:
    clip = picture(height, width, 2)
    one, three = spatial_crops(clip, 40, 1), spatial_crops(clip, 40, 3)
    assert one.shape == (1, 2, 3, 40, 40)
    assert three.shape == (3, 2, 3, 40, 40)
    assert torch.equal(one[0], three[1])
    red, green = three[:, 0, 0].float(), three[:, 0, 1].float()
    if width > height:  # red encodes the column, green the row
        assert red[0, :, 0].max() <= 12
        assert red[2, :, -1].min() >= 240
        assert (red[1].mean() - 127).abs() < 8
        assert green[1, 0].mean() < 20 < 230 < green[1, -1].mean()
    elif height > width:
        assert green[0, 0].max() <= 12
        assert green[2, -1].min() >= 240
        assert (green[1].mean() - 127).abs() < 8
    with pytest.raises(ValueError, match="crops: expected 1 or 3, got 2"):
        spatial_crops(clip, 40, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Pulling something from left to right", True),
        ("Turning the camera left while filming something", True),
        ("swipe_left", True),
        ("Rolling hand, CLOCKWISE", True),
        ("eating leftovers", False),
        ("putting up bright lights", False),
        ("Cook.Cut", False),
        ("3", False),
    ],
)
def test_class_names_with_directions_are_recognised(name: str, expected: bool) -> None:
    assert names_directions(["walk", name]) is expected
    assert not names_directions([])
