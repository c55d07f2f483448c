"""Writes clips of a motion task as mp4 files, with lists of them: a small data set of real pictures.

python -m examples.motion.make_clips FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor

from benchmarks.motion.tasks import TASKS, make_clips

COUNTS = {"train": 2400, "validation": 200, "test": 400}
SIZE, FRAMES = 70, 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.motion.make_clips", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, default="direction")
    parser.add_argument("--part", type=float, default=1.0, help="share of the clips, for a quick look (default 1)")
    args = parser.parse_args(argv)
    (args.folder / "videos").mkdir(parents=True, exist_ok=True)
    (args.folder / "classes.txt").write_text("\n".join(TASKS[args.task].classes) + "\n")
    for split, count in COUNTS.items():
        clips, labels = make_clips(args.task, split, round(count * args.part), size=SIZE, frames=FRAMES)
        lines = []
        for number, (clip, label) in enumerate(zip(clips, labels.tolist(), strict=True)):
            name = f"videos/{split}_{number:05d}.mp4"
            write(args.folder / name, clip)
            lines.append(f"{name} {label}\n")
        (args.folder / f"{split}.txt").write_text("".join(lines))
        print(f"{split}: {len(lines)} clips")


def write(path: Path, clip: Tensor) -> None:
    """Writes a clip, uint8 (T, 3, H, W), as H.264, nearly lossless: only a few pixels move."""
    with av.open(f"file:{path}", "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(10), options={"crf": "12", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[-2], clip.shape[-1], "yuv420p"
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


if __name__ == "__main__":
    main()
