"""Settings and files that tests of data share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from amflow_models.data.published import SMARTHOME_CROSS_SUBJECT
from list_files import write


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Data is loaded in one thread."""
    torch.set_num_threads(1)


@pytest.fixture
def smarthome(tmp_path: Path) -> Path:
    """A folder with a clip of every activity, by several persons, from every camera."""
    for activity in (*SMARTHOME_CROSS_SUBJECT, "Pour.Fromcup"):
        for person in (2, 3, 19, 20, 25):
            for camera in range(1, 8):
                (tmp_path / f"{activity}_p{person:02}_r00_v02_c{camera:02}.mp4").touch()
    write(tmp_path / "README.txt", "not a clip")
    return tmp_path
