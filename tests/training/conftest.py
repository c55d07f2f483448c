"""Videos to train on, and the config of a run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from training_runs import write_config


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[Callable[[], None]]:
    """Each test may choose a precision, and another one after this call: accelerate keeps a process's first one."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield forget
    forget()


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sixteen training and five test videos of a bright square that moves left or right."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 16), ("test", 5)):
        lines = []
        for number in range(count):
            label = number % 2
            with av.open(str(folder / f"{split} {number}.mp4"), "w") as file:
                stream = file.add_stream("libx264", rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for t in range(6):
                    frame = np.full((48, 64, 3), 40 + number, np.uint8)
                    x = 8 * t if label else 40 - 8 * t
                    frame[16:32, x : x + 16] = 220
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                file.mux(stream.encode())
            lines.append(f"{split} {number}.mp4 {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def config_file(videos: Path, tmp_path: Path) -> Path:
    """The config of a run on these videos that takes seconds."""
    return write_config(videos, tmp_path)
