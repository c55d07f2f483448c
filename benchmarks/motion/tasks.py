"""Video classification tasks that only motion can solve, made from real pictures: no frame gives the class away.

=================  ======================================================================  ========================
task               what moves                                                              classes
=================  ======================================================================  ========================
``camera``         the camera, over a photograph                                           left right up down
                                                                                           zoom_in zoom_out still
``direction``      a digit, over a photograph                                              left right up down
``which``          one of two digits, in any direction: the class is its half              left right
``direction_pan``  as ``direction``, and the photograph slides behind the digit            left right up down
``which_pan``      as ``which``, and the photograph slides behind the digits               left right
=================  ======================================================================  ========================

**Why a frame carries no information.** From frame to frame only a state of whole numbers changes, each modulo its own
period (`render.Scene`): ``state[t] = state[0] + t * step``. The start is uniform over all states. The class determines
only the step, together with speeds and directions that are drawn independently of the start. Adding any step to a
uniform state gives a uniform state. So in every class and **at every index t**, ``state[t]`` has the same (uniform)
distribution, given the photograph, digits and colours that the frames share and that are drawn independently of the
class. A frame is a function of these and of its state, so it is independent of the class. (In ``camera`` the step of a
pan, in photograph pixels, grows with the width of the window. The argument then holds given the zoom level, which a pan
does not change.)

**Why unordered frames don't tell left from right**, up from down, or zoom in from zoom out. The steps of a class are
those of its opposite with the sign reversed. Played backwards, a clip has start ``state[T-1]`` and step ``-step``. That
start is uniform and independent of the step as well, so the reversed clips of a class are distributed like the clips of
its opposite, and the sets of frames of the two have the same distribution. ``which`` is its own reverse, so it needs no
order. Other pairs of classes (still and left, left and up, left half and right half) differ in the set, as they should:
two frames show where and along which line something moved.

**Wrapping.** A photograph and its mirror images tile the plane without seams, so pans never meet an edge. Digits that
leave the frame (in ``which`` its half) enter again on the other side. Zoom levels wrap as well: when zooming in, the
narrowest window is followed by one of the widest. This can't be avoided. If zooming in always narrowed the window, its
mean log-width would fall with t, and that of zooming out would rise; two such lines can't agree both at t = 0 and at
the last t, so some frame would carry information. With 4 frames, about one zoom in four has such a jump. As all steps
are less than half a period, the class can still be recognised.

**Splits.** Within a task, no two splits share digits or seeds. In tasks without pan they share no shots (parts of a
video between two cuts), in tasks with pan no videos. One task may test on a shot on which another trains.

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

Shot = tuple[str, int, int]  # video, first frame, first frame after the shot

SPLITS = ("train", "validation", "test")
DIGITS = {
    "train": (0, 1077),
    "validation": (1077, 1437),
    "test": (1437, 1797),
}  # in order: neighbours may be of one writer
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
# Pixels per frame at 98 px, uniform from the first number to the second. A digit moves less than 24.5, half the width
# in which one of `which` wraps, since a longer step to the left could be a step to the right.
CAMERA_SPEED, DIGIT_SPEED, PAN_SPEED = (3, 14), (4, 14), (2, 8)
ZOOM_SPEED = (0.04, 0.14)  # change of log width per frame: 2 to 7 pixels at the middle of an edge
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # y, x
_MAX_CLIPS = 1 << 24  # in a split


@dataclass(frozen=True)
class Task:
    """A classification task; label i is `classes[i]`. Directions of `camera` are the camera's, not the picture's."""

    classes: tuple[str, ...]
    digits: int = 0  # objects over the photograph
    pan: bool = False  # whether the photograph slides behind the objects, in any direction


# New tasks go last: the order is part of the seeds.
TASKS: dict[str, Task] = {
    "camera": Task((*_DIRECTIONS, "zoom_in", "zoom_out", "still")),
    "direction": Task(tuple(_DIRECTIONS), digits=1),
    "which": Task(("left", "right"), digits=2),
    "direction_pan": Task(tuple(_DIRECTIONS), digits=1, pan=True),
    "which_pan": Task(("left", "right"), digits=2, pan=True),
}


def make_clips(task: str, split: str, count: int, *, size: int = 98, frames: int = 4) -> tuple[Tensor, Tensor]:
    """The first `count` clips of a split of a task, the same every time.

    Clip i depends only on (task, split, i, size, frames), and a clip of more frames continues that of fewer. With n
    classes, clips i n to i n + n - 1 have each class once. Motion and digits scale with `size`. On another processor,
    resizing may round pixels differently.

    Args:
        task: one of `TASKS`.
        split: "train", "validation" or "test".
        count: clips, at least 1; classes are exactly balanced if it is a multiple of their number.
        size: width and height of a frame in pixels, a positive multiple of 14. Below 56, rounding makes speeds equal.
        frames: at least 2.

    Returns:
        Clips, uint8 (count, frames, 3, size, size), RGB, and labels, int64 (count,).

    Raises:
        ValueError: unknown task or split, or a number out of range.
        ModuleNotFoundError: av is missing.
        CommandError: a clip can't be downloaded.
    """
    _check(task, split, size, frames)
    if not 1 <= count <= _MAX_CLIPS:
        raise ValueError(f"count: expected 1 to {_MAX_CLIPS}, got {count}")
    clips = torch.empty(count, frames, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        scene = draw_scene(task, split, index, size=size, frames=frames)
        clips[index], labels[index] = render(scene, size), scene.label
    return clips, labels


def draw_scene(task: str, split: str, index: int, *, size: int = 98, frames: int = 4) -> Scene:
    """The scene of clip `index`, without pixels. Arguments and errors as those of `make_clips`.

    Every number is drawn for every class, in one order and before the class is looked at.
    """
    _check(task, split, size, frames)
    if not 0 <= index < _MAX_CLIPS:
        raise ValueError(f"index: expected 0 to {_MAX_CLIPS - 1}, got {index}")  # it would be a clip of another split
    draw = _Draw(_seed(task, split, index))
    possible = shots(task, split)
    clip, first, end = possible[draw.integer(0, len(possible))]
    photograph = (clip, EVERY * draw.integer(-(-first // EVERY), -(-end // EVERY)))
    label = _label(task, split, index)
    if TASKS[task].digits:
        return _digit_scene(draw, task, split, label, photograph, (size, frames))
    return _camera_scene(draw, task, label, photograph, (size, frames))


class _Draw:
    """Random numbers of one clip."""

    def __init__(self, seed: int) -> None:
        self._rng = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high - 1."""
        return int(torch.randint(low, high, (), generator=self._rng))

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._rng))

    def velocity(self, speeds: tuple[int, int], size: int) -> tuple[int, int]:
        """y, x of a step in any direction."""
        speed, angle = max(1.0, self.real(*speeds) * size / 98), self.real(0, 2 * math.pi)
        return round(speed * math.sin(angle)), round(speed * math.cos(angle))


def _camera_scene(draw: _Draw, task: str, label: int, photograph: tuple[str, int], shape: tuple[int, int]) -> Scene:
    """A photograph over which the camera pans or zooms. `shape` is the size and the number of frames."""
    size, frames = shape
    name = TASKS[task].classes[label]
    side = 3 * size  # the widest window sees all of its height
    periods = (2 * side, 2 * side, LEVELS)
    start = [draw.integer(0, period) for period in periods]
    shift = max(1, round(draw.real(*CAMERA_SPEED) * window_side(start[2], size) / 98))  # in pixels of the photograph
    grow = max(1, round(draw.real(*ZOOM_SPEED) / math.log(ZOOM_RANGE) * LEVELS))
    y, x = _DIRECTIONS.get(name, (0, 0))
    zoom = {"zoom_in": -grow, "zoom_out": grow}.get(name, 0)
    states = _path(start, [y * shift, x * shift, zoom], periods, frames)
    return Scene(label, photograph, side, True, (), states, periods)


def _digit_scene(
    draw: _Draw, task: str, split: str, label: int, photograph: tuple[str, int], shape: tuple[int, int]
) -> Scene:
    """One or two digits over a photograph, which slides in tasks with pan. `shape` as for `_camera_scene`."""
    size, frames = shape
    kind = TASKS[task]
    side = 2 * size
    periods = (2 * side, 2 * side, 1) + kind.digits * (size, size // kind.digits)
    start = [draw.integer(0, period) for period in periods]
    digits = tuple(_digit(draw, split, size) for _ in range(kind.digits))
    speed = max(1, round(draw.real(*DIGIT_SPEED) * size / 98))
    anywhere, camera = draw.velocity(DIGIT_SPEED, size), draw.velocity(PAN_SPEED, size)
    if not kind.pan:
        camera = (0, 0)
    if kind.digits == 1:
        y, x = _DIRECTIONS[kind.classes[label]]
        moves = [(y * speed, x * speed)]
    else:
        moves = [anywhere if half == label else (0, 0) for half in range(2)]
    step = [*camera, 0] + [along for move in moves for along in move]
    return Scene(label, photograph, side, False, digits, _path(start, step, periods, frames), periods)


def _digit(draw: _Draw, split: str, size: int) -> Digit:
    sample, side = draw.integer(*DIGITS[split]), draw.integer(2 * size // 7, 3 * size // 7 + 1)
    light = draw.integer(0, 2)
    red, green, blue = (draw.real(0.55, 1) if light else draw.real(0, 0.4) for _ in range(3))
    return Digit(sample, side, (red, green, blue), 0.0 if light else 1.0)


def shots(task: str, split: str) -> tuple[Shot, ...]:
    """The shots from which the photographs of a split are taken."""
    return (_SHOTS_PAN if TASKS[task].pan else _SHOTS)[split]


def _path(start: list[int], step: list[int], periods: tuple[int, ...], frames: int) -> Tensor:
    """States, int64 (frames, len(periods))."""
    time = torch.arange(frames)[:, None]
    return (torch.tensor(start) + time * torch.tensor(step)) % torch.tensor(periods)


def _label(task: str, split: str, index: int) -> int:
    """With n classes, each block of n clips has every class once, in its own random order."""
    classes = len(TASKS[task].classes)
    block, position = divmod(index, classes)
    rng = torch.Generator().manual_seed((1 << 31) + _seed(task, split, block))  # no seed of a scene
    return int(torch.randperm(classes, generator=rng)[position])


def _seed(task: str, split: str, index: int) -> int:
    """Unique, and below 2^31: PyTorch's generator uses 32 bits of a seed."""
    return (list(TASKS).index(task) * len(SPLITS) + SPLITS.index(split)) * _MAX_CLIPS + index


def _check(task: str, split: str, size: int, frames: int) -> None:
    for argument, value, known in (("task", task, list(TASKS)), ("split", split, list(SPLITS))):
        if value not in known:
            nearest = get_close_matches(value, known, n=1, cutoff=0)[0]
            raise ValueError(f"{argument}: there is no {value!r}, did you mean {nearest!r}? There are {known}")
    if size < 14 or size % 14:
        raise ValueError(f"size: expected a positive multiple of 14, got {size}")
    if frames < 2:
        raise ValueError(f"frames: expected at least 2, got {frames}")
