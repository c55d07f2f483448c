"""Reading clips from video files: throughput beside decord and torchcodec, bytes read, and memory; under 3 minutes.

python -m benchmarks.decoding --write

decord and torchcodec are compared where they are installed and load. All readers decode in one thread, and each opens
the file for every clip, as a loader process does that seldom meets the same file again.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import av
import numpy as np
import torch
from amflow_models.data import TrainTransform, Video, VideoFile, dense, read_frames_at, spatial_crops, tables
from amflow_models.data.videos import Videos
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.memory import peak_growth
from benchmarks.result_files import RESULTS, add_write, dumps
from benchmarks.tables import Table
from benchmarks.timing import interleave

ROOT = Path(__file__).resolve().parents[1]
T, SIZE, CLIPS = 16, 224, 2  # frames of a clip, side of the model's input, clips that are read in one turn
LISTED = 240_000  # videos of Kinetics-400

Reader = Callable[[Path, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Source:
    """A video file, made for the measurement.

    Attributes:
        name: name of the file.
        label: what it stands for.
        height, width, frames: its size.
        stride: distance in frames, of the clips that are read from it.
        codec: of its encoder.
    """

    name: str
    label: str
    height: int
    width: int
    frames: int
    stride: int
    codec: str = "libx264"


SOURCES = (
    Source("short.mp4", "10 s, 340x256", 256, 340, 250, 4),
    Source("large.mp4", "3 s, 1920x1080", 1080, 1920, 64, 2),
    Source("long.mp4", "6 min, 340x256", 256, 340, 9000, 4),
    Source("short.webm", "10 s, 340x256, VP9", 256, 340, 250, 4, "libvpx-vp9"),
    Source("short.avi", "10 s, 320x240, MPEG-4 in AVI", 240, 320, 250, 4, "mpeg4"),
)


def write_video(source: Source, folder: Path) -> Path:
    """Writes a video of moving squares."""
    path = folder / source.name
    height, width = source.height, source.width
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    picture = squares.repeat(16, 0).repeat(16, 1)[:height, :width]
    speed = {"libx264": {"preset": "ultrafast", "bf": "2"}, "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"}}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(source.codec, rate=Fraction(25), options=speed.get(source.codec, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 60
        for number in range(source.frames):
            moved = np.roll(picture, (number, 2 * number), (0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read_first(path: Path, indices: Sequence[int]) -> Tensor:
    """This library, for a file that the process reads for the first time."""
    tables.forget()
    return read_frames_at(path, indices)


def readers() -> dict[str, Reader]:
    """The readers that run here; a line says why one does not."""
    found: dict[str, Reader] = {"first": read_first, "again": read_frames_at}
    try:
        found["decord"] = _decord()
    except (ImportError, OSError) as error:
        print(f"decord is left out: {error}", file=sys.stderr)
    try:
        found |= {f"torchcodec, {mode}": _torchcodec(mode) for mode in ("exact", "approximate")}
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def _decord() -> Reader:
    decord: Any = import_module("decord")

    def read(path: Path, indices: Sequence[int]) -> Tensor:
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    return read


def _torchcodec(mode: str) -> Reader:
    decoders: Any = import_module("torchcodec.decoders")

    def read(path: Path, indices: Sequence[int]) -> Tensor:
        return decoders.VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode=mode).get_frames_at(list(indices)).data

    return read


def clips(source: Source) -> list[list[int]]:
    """The frames of clips at random places."""
    generator = torch.Generator().manual_seed(0)
    return [dense(source.frames, T, source.stride, generator).tolist() for _ in range(CLIPS)]


def wrong_frames(path: Path, reader: Reader, wanted: list[list[int]]) -> int:
    """How many of the frames differ from those of decoding the whole file."""
    numbers = {number for clip in wanted for number in clip}
    with av.open(str(path)) as container:
        expected = {
            number: torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            for number, frame in enumerate(container.decode(video=0))
            if number in numbers
        }
    read = ((number, frame) for clip in wanted for number, frame in zip(clip, reader(path, clip), strict=True))
    return sum(not torch.equal(frame, expected[number]) for number, frame in read)


def bytes_read(call: Callable[[], object]) -> int | None:
    """Bytes that a call reads from files; None where the system does not tell."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        return None
    before = int(counter.read_text().split()[1])
    call()
    return int(counter.read_text().split()[1]) - before


def throughput(source: Source, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """A row for each reader: clips per second from interleaved rounds, bytes of a clip, and wrong frames."""
    path, wanted, found = write_video(source, folder), clips(source), readers()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    for name, reader in found.items():
        try:
            reader(path, wanted[0])
        except Exception as error:
            rows.append({"source": source.label, "reader": name, "failed": str(error).splitlines()[0]})
            continue
        calls[name] = partial(_read_clips, reader, path, wanted)
    times = interleave(calls, seconds)
    for name, durations in times.items():
        q1, middle, q3 = quantiles(durations, n=4, method="inclusive")
        ratios = [t / base for t, base in zip(durations, times["first"], strict=True)]
        figures = {"clips_per_second": CLIPS / middle, "spread": (q3 - q1) / middle, "rounds": len(durations)}
        costs = {"time_to_first": median(ratios), "bytes": bytes_read(partial(found[name], path, wanted[0]))}
        wrong = {"file_bytes": path.stat().st_size, "wrong_frames": wrong_frames(path, found[name], wanted)}
        rows.append({"source": source.label, "reader": name, **figures, **costs, **wrong})
    return rows


def _read_clips(reader: Reader, path: Path, wanted: list[list[int]]) -> None:
    for clip in wanted:
        reader(path, clip)


ITEMS = {"training clip": 1, "30 views": 10}  # clips in time


def item(kind: str, path: Path, *, whole: bool) -> Tensor:
    """The clips of an item, resized one by one or when all frames are there."""
    with VideoFile(path) as opened:
        numbers = sorted({n for clip in range(ITEMS[kind]) for n in range(2 * clip, 2 * clip + 2 * T, 2)})
        frames = opened.read(numbers) if whole else opened.iterate(numbers)
        if kind == "training clip":
            return TrainTransform(SIZE, scale=(0.08, 1.0), flip=True, augment=True)(frames, 0)
        return spatial_crops(frames, SIZE, 3)


def item_memory(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of an item from the large video, each measured in a process of its own."""
    rows = []
    for kind in ITEMS:
        for whole in (True, False):
            how = "all frames, then resized" if whole else "resized as decoded"
            command = [sys.executable, "-m", "benchmarks.decoding", "--probe", kind, how, str(folder / "large.mp4")]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
            rows.append({"item": kind, "how": how, "bytes": int(done.stdout.split()[-1])})
    return rows


def list_memory() -> list[dict[str, Any]]:
    """Memory of its own that each loader process takes when it has looked at all videos of a long list."""
    if not Path("/proc/self/smaps_rollup").exists():
        return []
    rows: list[dict[str, Any]] = []
    stores: dict[str, Callable[[Iterator[Video]], Sequence[Video]]] = {"tensors": Videos, "objects": tuple}
    for name, store in stores.items():
        videos = store(_listed())
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_private_growth, args=(videos, sender))
        process.start()
        rows.append({"stored_as": name, "videos": LISTED, "bytes": receiver.recv()})
        process.join()
        del videos, process
    return rows


def _listed() -> Iterator[Video]:
    for number in range(LISTED):
        yield Video(Path(f"/data/k400/videos_train/class {number % 400}/video_{number:06}.mp4"), number % 400)


def _private_growth(videos: Sequence[Video], sender: Any) -> None:
    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024

    gc.disable()  # a collection touches all objects of the process, whatever the list is stored as
    before = private()
    total = sum(video.label + len(video.path.name) for video in videos)
    sender.send(private() - before)
    assert total > 0


def throughput_table(rows: list[dict[str, Any]]) -> Table:
    """Clips per second, by file and reader."""
    cells = [
        [row["source"], row["reader"], row["failed"][:40], "", "", ""]
        if "failed" in row
        else [
            row["source"], row["reader"], f"{row['clips_per_second']:.1f}", f"{1 / row['time_to_first']:.2f}x",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f} of {row['file_bytes'] / 1e6:.1f}",
            str(row["wrong_frames"]),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["file", "reader", "clips/s", "speed to the first", "MB read", f"wrong of {T * CLIPS} frames"]
    return Table(f"Clips of {T} frames", header, cells, [])


def memory_table(items: list[dict[str, Any]], lists: list[dict[str, Any]]) -> Table:
    """Peak memory of items, and memory of lists."""
    cells = [[f"{row['item']}, 1920x1080", row["how"], f"{row['bytes'] / 1e6:.0f}"] for row in items]
    cells += [
        [f"list of {row['videos']} videos, per process", row["stored_as"], f"{row['bytes'] / 1e6:.0f}"] for row in lists
    ]
    return Table("Memory", ["", "", "MB"], cells, [])


def main() -> None:
    """Measures and prints; with --write saves the figures under benchmarks/results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="time for the rounds of one file")
    add_write(parser, RESULTS / "decoding_cpu.json")
    parser.add_argument("--probe", nargs=3, metavar=("ITEM", "HOW", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        kind, how, path = args.probe
        print(peak_growth(lambda: item(kind, Path(path), whole=how.startswith("all")))[0])
        return
    lists = list_memory()  # before other libraries start threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for source in SOURCES:
            rows += throughput(source, folder, args.seconds)
            print(f"measured: {source.label}", file=sys.stderr)
        items = item_memory(folder)
    print(throughput_table(rows).plain(), memory_table(items, lists).plain(), sep="\n\n")
    if args.write:
        document = {"machine": machine(), "clips": rows, "items": items, "lists": lists}
        (RESULTS / "decoding_cpu.json").write_text(dumps(document))


if __name__ == "__main__":
    main()
