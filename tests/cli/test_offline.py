"""Frames of videos for the demo and the pictures: those of the one reader, resized and cropped."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from amflow_models.cli.drawing import video_writer
from amflow_models.cli.offline import IMAGENET_MEAN, IMAGENET_STD, iterate_frames, read_frames
from amflow_models.data import spatial_crops
from PIL import Image

from tests.data.video_files import decode_all, set_display_matrix, write_video, write_with_cover


def check_frames(path: Path, expected: torch.Tensor) -> None:
    """Checks frames 1 and 4 of a video."""
    crops = spatial_crops(expected, 32)[0] / 255  # computed in whole numbers
    frames = list(iterate_frames(path, 3, 32, start=1))
    assert [number for number, _ in frames] == [1, 4]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    clip = read_frames(path, 2, 3, 32, start=1)
    for (_, image), crop, normalised in zip(frames, crops[[1, 4]], clip, strict=True):
        torch.testing.assert_close(image, crop, rtol=0, atol=2.5 / 255)
        assert torch.equal((image - mean) / std, normalised)


def test_videos_are_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5)
    stored = decode_all(path)
    check_frames(path, stored)
    check_frames(set_display_matrix(path, [[0, 1], [-1, 0]]), torch.rot90(stored, -1, (2, 3)))


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    shades = torch.arange(5, dtype=torch.uint8)[:, None, None, None] * 50
    check_frames(write_with_cover(tmp_path / "a.mp4"), shades.expand(5, 3, 48, 64))


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    frames = decode_all(write_video(tmp_path / "a.mp4", frames=5))
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{number}.png")
    check_frames(tmp_path / "frames", frames)


def test_bad_arguments_and_short_videos_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5)
    with pytest.raises(ValueError, match="has 5 frames, but 3 frames, 1 in 2 from frame 1, need 6"):
        read_frames(path, 3, 2, start=1)
    for options, message in (
        ({"every": 0}, "every: expected at least 1"),
        ({"start": -1}, "start: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(iterate_frames(path, **options))
        with pytest.raises(ValueError, match=message):
            read_frames(path, 1, **options)
    assert list(iterate_frames(path, start=5)) == []


def test_the_overlay_video_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would take it for the end of a protocol."""
    monkeypatch.chdir(tmp_path)
    with video_writer(Path("a:b.mp4")) as write:
        write(np.zeros((64, 96, 3), np.uint8))
    with av.open(str(tmp_path / "a:b.mp4")) as container:
        assert len(list(container.decode(video=0))) == 1
