"""The motion tasks: single frames carry no information on the class, and motion reveals it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from amflow_models.cli.offline import CLIPS
from scipy.stats import binom, chi2_contingency
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, one_hot

from benchmarks.motion.render import EVERY, LEVELS, Scene, render, window_side
from benchmarks.motion.tasks import DIGITS, SPLITS, TASKS, draw_scene, make_clips, shots

pytestmark = pytest.mark.demo
SIZE, FRAMES = 56, 4
OPPOSITE = {"left": "right", "up": "down", "zoom_in": "zoom_out"}
FAST = ("camera", "direction_pan")  # the tasks whose pixels the fast tier looks at


def by_task(rows: Iterable[tuple[object, ...]]) -> list[object]:
    """Parameters whose first is the task; those of tasks not in `FAST` are slow."""
    return [pytest.param(*row, marks=() if row[0] in FAST else pytest.mark.slow) for row in rows]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache
def scenes(task: str, split: str = "train", count: int = 2800) -> list[Scene]:
    return [draw_scene(task, split, index, frames=FRAMES) for index in range(count)]


@lru_cache
def small_clips(task: str, split: str) -> tuple[Tensor, Tensor]:
    return make_clips(task, split, 840, size=SIZE, frames=FRAMES)


# Clips and scenes.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_balanced_and_each_depends_only_on_its_index(task: str, split: str) -> None:
    """Shapes and exact balance; other clips and later frames have no influence on a clip."""
    classes = len(TASKS[task].classes)
    count = 2 * classes
    clips, labels = make_clips(task, split, count, size=56, frames=5)
    assert clips.shape == (count, 5, 3, 56, 56)
    assert clips.dtype == torch.uint8
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert labels.bincount(minlength=classes).tolist() == [2] * classes
    fewer, fewer_labels = make_clips(task, split, classes + 1, size=56, frames=2)
    assert torch.equal(fewer, clips[: classes + 1, :2])
    assert torch.equal(fewer_labels, labels[: classes + 1])


@pytest.mark.parametrize("size", [14, pytest.param(112, marks=pytest.mark.slow)])
def test_clips_have_the_size_that_was_asked_for(size: int) -> None:
    for task in TASKS:
        assert make_clips(task, "test", 2, size=size, frames=2)[0].shape == (2, 2, 3, size, size)


@pytest.mark.parametrize("task", TASKS)
def test_each_block_has_every_class_once_in_random_order(task: str) -> None:
    """The position within the block carries no information on the class."""
    classes = len(TASKS[task].classes)
    labels = torch.tensor([scene.label for scene in scenes(task)]).view(-1, classes)
    assert torch.equal(labels.sort(1).values, torch.arange(classes).expand_as(labels))
    for position in range(classes):
        counts = labels[:, position].bincount(minlength=classes)
        assert chi2_contingency([counts.tolist(), [len(labels) // classes] * classes]).pvalue > 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_the_states_determine_the_class(task: str) -> None:
    """The steps are constant, as fast as the task says, and give the class."""
    classes, kind = TASKS[task].classes, TASKS[task]
    for scene in scenes(task)[:280]:
        periods = torch.tensor(scene.periods)
        step = (scene.states[1:] - scene.states[:-1]) % periods
        step = torch.where(2 * step > periods, step - periods, step)  # less than half a period, so unambiguous
        assert torch.equal(step, step[:1].expand_as(step))
        y, x, zoom, *digits = step[0].tolist()
        if not digits:
            name = {(0, 0): "still", (0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[
                ((y > 0) - (y < 0), (x > 0) - (x < 0))
            ]
            name = name if zoom == 0 else "zoom_in" if zoom < 0 else "zoom_out"
            assert 2 * abs(zoom) < LEVELS / 3
            assert zoom == 0 or (y, x) == (0, 0)
        else:
            assert kind.pan == ((y, x) != (0, 0))
            steps = list(zip(digits[::2], digits[1::2], strict=True))
            if len(steps) == 1:
                ((dy, dx),) = steps
                assert 4 <= abs(dy) + abs(dx) <= 14
                name = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[
                    ((dy > 0) - (dy < 0), (dx > 0) - (dx < 0))
                ]
            else:
                assert steps.count((0, 0)) == 1
                name = ("left", "right")[steps.index((0, 0)) == 0]
        assert name == classes[scene.label]


def test_pixels_move_as_the_class_says() -> None:
    """A camera that pans left moves the picture right, zooming in enlarges its middle, digits follow their states."""
    classes = TASKS["camera"].classes
    for name, (dy, dx) in {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}.items():
        scene = next(s for s in scenes("camera") if classes[s.label] == name)
        states = scene.states.clone()
        states[:, 2] = 0  # the narrowest window: its pixels are the photograph's
        a, b = render(replace(scene, states=states), 98)[:2]
        step = int((scene.states[1] - scene.states[0])[:2].abs().max())
        assert torch.equal(
            a.roll((dy * step, dx * step), (1, 2))[:, step:-step, step:-step], b[:, step:-step, step:-step]
        )

    scene = next(s for s in scenes("camera") if classes[s.label] == "zoom_in" and s.states[0, 2] > s.states[1, 2])
    a, b = render(scene, 98)[:2].float()
    ratio = window_side(int(scene.states[1, 2]), 98) / window_side(int(scene.states[0, 2]), 98)
    assert ratio < 1
    theta = ratio * torch.eye(2, 3)[None]
    enlarged = grid_sample(a[None], affine_grid(theta, [1, 3, 98, 98], align_corners=False), align_corners=False)[0]
    assert (enlarged - b).abs().mean() < 0.5 * (a - b).abs().mean()

    for task in ("direction", "which"):
        for scene in scenes(task)[:14]:
            ground = render(replace(scene, digits=(), states=scene.states[:, :3]), 98)
            objects = (render(scene, 98) != ground).any(1)
            for half, digit, positions in zip(
                objects.chunk(len(scene.digits), -1),
                scene.digits,
                scene.states[:, 3:].split(2, 1),
                strict=True,
            ):
                for seen, (y, x) in zip(half, positions.tolist(), strict=True):
                    box = seen.roll((-y, -x), (0, 1))
                    assert box[: digit.side, : digit.side].any()
                    assert not box[digit.side :].any()
                    assert not box[:, digit.side :].any()


def test_only_the_moving_parts_change() -> None:
    """All pixels stay in `still`, and the half without motion in `which`; nothing else does."""
    clips, labels = small_clips("camera", "test")
    moves = (clips != clips[:, :1]).flatten(1).any(1)
    assert torch.equal(moves, labels != TASKS["camera"].classes.index("still"))
    clips, labels = small_clips("which", "test")
    moves = torch.stack([(half != half[:, :1]).flatten(1).any(1) for half in clips.chunk(2, -1)], 1)
    assert torch.equal(moves, torch.stack((labels == 0, labels == 1), 1))


# Splits.


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_photograph_shot_digit_or_seed(task: str) -> None:
    """In tasks with pan, splits share no video either. Every photograph lies in its shot."""
    used = {split: scenes(task, split, 280) for split in SPLITS}
    for split, scene in ((name, scene) for name in SPLITS for scene in used[name]):
        clip, number = scene.photograph
        assert any(clip == name and first <= number < end for name, first, end in shots(task, split))
        assert number % EVERY == 0
        assert all(DIGITS[split][0] <= digit.sample < DIGITS[split][1] for digit in scene.digits)
    for one, other in itertools.combinations(SPLITS, 2):
        for a, b in itertools.product(shots(task, one), shots(task, other)):
            assert a[0] != b[0] or (not TASKS[task].pan and (a[2] <= b[1] or b[2] <= a[1]))
        assert DIGITS[one][1] <= DIGITS[other][0]
        for index in range(20):
            assert not torch.equal(used[one][index].states, used[other][index].states)


def test_no_image_of_a_digit_is_in_two_splits() -> None:
    """`load_digits` holds no image that is in two of the ranges."""
    images = load_digits().images.reshape(1797, -1)
    sets = [{row.tobytes() for row in images[slice(*DIGITS[split])]} for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert DIGITS["train"][0] == 0
    assert DIGITS["test"][1] == 1797


# Information in the states.


def lowest_p(labels: Tensor, values: Tensor) -> float:
    """Lowest p of chi-squared tests whether each column of values (clips, columns) is independent of the class.

    A column is binned into 8 cells of about equal counts, or fewer if it has few values; p has Bonferroni's correction.
    """
    lowest = []
    for column in values.double().T:
        cells = torch.bucketize(column.contiguous(), column.quantile(torch.arange(1, 8).double() / 8).unique())
        table = torch.stack([cells[labels == label].bincount(minlength=8) for label in labels.unique()])
        table = table[:, table.any(0)]
        if table.shape[1] > 1:  # a constant carries no information
            lowest.append(float(chi2_contingency(table.numpy()).pvalue))
    return min(1.0, min(lowest) * len(lowest))


@pytest.mark.parametrize("task", TASKS)
def test_states_are_independent_of_the_class_at_every_time(task: str) -> None:
    """So is each number of a state, and the sum of every two."""
    drawn = scenes(task)
    labels = torch.tensor([scene.label for scene in drawn])
    states = torch.stack([scene.states for scene in drawn])
    for t in range(FRAMES):
        assert lowest_p(labels, states[:, t]) > 1e-3, f"frame {t}"
        shares = states[:, t].double() / torch.tensor(drawn[0].periods)
        pairs = [(a + b) % 1 for a, b in itertools.combinations(shares.T, 2)]
        assert lowest_p(labels, torch.stack(pairs, 1)) > 1e-3, f"frame {t}, two at once"


@pytest.mark.parametrize("task", TASKS)
def test_photograph_and_digits_are_independent_of_the_class(task: str) -> None:
    """Sizes and colours of the digits as well."""
    drawn = scenes(task)
    rows = [
        [
            list(CLIPS).index(scene.photograph[0]),
            scene.photograph[1],
            *(value for d in scene.digits for value in (d.sample, d.side, d.outline, *d.fill)),
        ]
        for scene in drawn
    ]
    assert lowest_p(torch.tensor([scene.label for scene in drawn]), torch.tensor(rows)) > 1e-3


@pytest.mark.parametrize("spoil", ["no wrap", "late start"])
def test_the_test_of_independence_detects_leaks(spoil: str) -> None:
    """Namely a zoom without wraps, and digits that all start at one edge."""
    if spoil == "no wrap":
        drawn = scenes("camera")
        wraps = [bool((scene.states[1:, 2] - scene.states[:-1, 2]).abs().max() > LEVELS / 2) for scene in drawn]
        zooms = [TASKS["camera"].classes[scene.label].startswith("zoom") for scene in drawn]
        share = sum(wraps) / sum(zooms)
        assert 0.2 < share < 0.3  # "about one in four"
        drawn = [scene for scene, wrap in zip(drawn, wraps, strict=True) if not wrap]
        times = (0, FRAMES - 1)
    else:
        drawn = [replace(scene, states=scene.states - scene.states[:1]) for scene in scenes("direction")]
        drawn = [replace(scene, states=scene.states % torch.tensor(scene.periods)) for scene in drawn]
        times = (1, 2, 3)
    labels = torch.tensor([scene.label for scene in drawn])
    for t in times:
        assert lowest_p(labels, torch.stack([scene.states[t] for scene in drawn])) < 1e-6


@pytest.mark.parametrize("task", ["camera", "direction", "direction_pan"])
def test_a_reversed_clip_is_a_clip_of_the_opposite_class(task: str) -> None:
    """It has the start and the steps of a clip of the opposite class, and its frames are those of the clip reversed."""
    drawn, classes = scenes(task), TASKS[task].classes
    periods = torch.tensor(drawn[0].periods)
    for name, other in OPPOSITE.items():
        if name not in classes:
            continue
        forwards = torch.stack([s.states for s in drawn if classes[s.label] == other])
        backwards = torch.stack([s.states.flip(0) for s in drawn if classes[s.label] == name])
        both = torch.cat((forwards, backwards))
        labels = torch.arange(2).repeat_interleave(len(forwards))
        steps = (both[:, 1] - both[:, 0] + periods // 2) % periods
        assert lowest_p(labels, both[:, 0]) > 1e-3
        assert lowest_p(labels, steps) > 1e-3
    for scene in drawn[:14]:
        assert torch.equal(
            render(replace(scene, states=scene.states.flip(0)), 98),
            render(scene, 98).flip(0),
        )


def test_a_frame_is_a_function_of_its_state() -> None:
    """A single frame drawn by itself is that of the clip, whatever the label: there are no traces of motion."""
    for task in TASKS:
        for scene in scenes(task)[:14]:
            clip = render(scene, 98)
            for t in range(FRAMES):
                single = replace(scene, states=scene.states[t : t + 1], label=-1)
                assert torch.equal(render(single, 98)[0], clip[t])


# Information in the pixels.


def looks(clips: Tensor) -> Tensor:
    """(n, FRAMES, 256): mean colours and contrast, which blur lowers, of each frame on an 8 x 8 grid."""
    x = clips.flatten(0, 1).float() / 255
    cell, grey = SIZE // 8, x.mean(1, keepdim=True)
    variance = avg_pool2d(grey.square(), cell) - avg_pool2d(grey, cell).square()
    grids = torch.cat((avg_pool2d(x, cell), variance.clamp_min(0).sqrt()), 1)
    return grids.flatten(1).unflatten(0, (-1, FRAMES))


def count_right(x: Tensor, labels: Tensor, test_x: Tensor, test_labels: Tensor) -> int:
    """Test clips that a linear classifier gets right: regression of the one-hot labels with a small ridge."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = ((y - mean).div(std).double() for y in (x, test_x))
    targets = one_hot(labels).double()
    weights = torch.linalg.solve(x.mT @ x + 0.1 * len(x) * torch.eye(x.shape[1]), x.mT @ (targets - targets.mean(0)))
    return int(((test_x @ weights + targets.mean(0)).argmax(1) == test_labels).sum())


def guesses(
    task: str, features: Callable[[str], Tensor], classes: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(Right, total) from train to test, and within test, where no difference between scenes can hide a leak."""
    x, labels, test_x, test_labels = (
        value for split in ("train", "test") for value in (features(split), small_clips(task, split)[1])
    )
    if classes is not None:
        kept, test_kept = (torch.isin(y, torch.tensor(classes)) for y in (labels, test_labels))
        x, labels, test_x, test_labels = x[kept], labels[kept], test_x[test_kept], test_labels[test_kept]
        labels, test_labels = ((y == classes[0]).long() for y in (labels, test_labels))
    half = 3 * len(test_x) // 5
    return [
        (count_right(x, labels, test_x, test_labels), len(test_x)),
        (count_right(test_x[:half], test_labels[:half], test_x[half:], test_labels[half:]), len(test_x) - half),
    ]


@lru_cache
def looks_of(task: str, split: str) -> Tensor:
    return looks(small_clips(task, split)[0])


@pytest.mark.parametrize("task", by_task((task,) for task in TASKS))
def test_a_classifier_of_single_frames_is_at_chance(task: str) -> None:
    """For each t, on frames t: within the binomial interval that holds 99.9% of guesses."""
    for t in range(FRAMES):
        for right, count in guesses(task, lambda split, t=t: looks_of(task, split)[:, t]):
            low, high = binom.interval(0.999, count, 1 / len(TASKS[task].classes))
            assert low <= right <= high, f"frame {t}: {right} of {count}"


def test_the_classifier_of_single_frames_detects_a_leak() -> None:
    """If digits start in the middle rather than anywhere, it recognises the class by the last frame."""
    drawn = [draw_scene("direction", "test", index, size=SIZE, frames=FRAMES) for index in range(840)]
    clips = []
    for scene in drawn:
        states = scene.states.clone()
        states[:, 3:] += SIZE // 3 - states[:1, 3:]
        clips.append(render(replace(scene, states=states % torch.tensor(scene.periods)), SIZE))
    x, labels = looks(torch.stack(clips))[:, -1], torch.tensor([scene.label for scene in drawn])
    assert count_right(x[:504], labels[:504], x[504:], labels[504:]) > binom.interval(1 - 1e-9, 336, 0.25)[1]


@pytest.mark.parametrize("task", by_task([("camera",), ("direction",), ("direction_pan",)]))
def test_unordered_frames_do_not_separate_opposites(task: str) -> None:
    """From mean and spread over the frames, left and right, up and down, in and out are a guess."""
    classes = TASKS[task].classes

    def unordered(split: str) -> Tensor:
        x = looks_of(task, split)
        return torch.cat((x.mean(1), x.std(1)), 1)

    for one, other in OPPOSITE.items():
        if one in classes:
            for right, count in guesses(task, unordered, (classes.index(one), classes.index(other))):
                low, high = binom.interval(0.999, count, 0.5)
                assert low <= right <= high, f"{one}: {right} of {count}"


def aligned_difference(a: Tensor, b: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Frame a and the difference b - a for the shift of b that fits a best; a, b are grey (n, size, size).

    Both lose a margin of `reach`, the longest shift; 0 compares the frames unshifted.
    """
    size = a.shape[-1]
    inner = a[:, reach : size - reach, reach : size - reach]
    best, left = torch.full((len(a),), torch.inf), torch.zeros_like(inner)
    for y, x in itertools.product(range(2 * reach + 1), repeat=2):
        difference = b[:, y : y + inner.shape[1], x : x + inner.shape[2]] - inner
        error = difference.abs().clamp_max(0.1).mean((1, 2))  # objects are few: they must not decide
        left[error < best] = difference[error < best]
        best = torch.minimum(best, error)
    return inner, left


def motion(clips: Tensor, reach: int) -> Tensor:
    """(n, 5): difference of frames 0 and 1, left minus right; flow to the right, down and outwards; mean difference."""
    a, b = (clips[:, t].float().mean(1) / 255 for t in (0, 1))
    a, change = aligned_difference(a, b, reach)
    amount = change.abs()
    a, change = (
        avg_pool2d(x[:, None], 4)[:, 0] for x in (a + change / 2, change)
    )  # motions of a pixel or two are left
    dy, dx = (a[:, 2:, 1:-1] - a[:, :-2, 1:-1]), (a[:, 1:-1, 2:] - a[:, 1:-1, :-2])
    change = change[:, 1:-1, 1:-1]
    line = torch.linspace(-1, 1, change.shape[-1])
    out = dx * line + dy * line[:, None]
    flow = [-(change * g).sum((1, 2)) / (g.square().sum((1, 2)) + 1e-3) for g in (dx, dy, out)]
    halves = [half.mean((1, 2)) for half in amount.chunk(2, -1)]
    return torch.stack(((halves[0] - halves[1]) / (sum(halves) + 1e-6), *flow, amount.mean((1, 2))), 1)


@pytest.mark.parametrize(
    ("task", "reach", "least"),
    by_task(
        [
            ("camera", 0, 0.5),
            ("direction", 0, 0.5),
            ("which", 0, 0.9),
            ("direction_pan", 5, 0.33),
            ("which_pan", 0, 0.9),
        ]
    ),
)
def test_frame_differences_reveal_the_class(task: str, reach: int, least: float) -> None:
    """Five numbers of the difference (with a pan: after alignment) beat chance by far."""
    for right, count in guesses(task, lambda split: motion(small_clips(task, split)[0], reach)):
        assert right > least * count


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "directions"}, r"task: there is no 'directions', did you mean 'direction'\?"),
        ({"task": "wich"}, "did you mean 'which'"),
        ({"split": "val"}, r"split: there is no 'val', did you mean 'validation'\?"),
        ({"count": 0}, "count: expected 1 to .*, got 0"),
        ({"size": 0}, "size: expected a positive multiple of 14, got 0"),
        ({"size": 100}, "size: expected a positive multiple of 14, got 100"),
        ({"size": -14}, "size: expected a positive multiple of 14, got -14"),
        ({"frames": 1}, "frames: expected at least 2, got 1"),
    ],
)
def test_bad_input_raises_before_any_work(
    arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.motion.tasks.draw_scene", None)
    with pytest.raises(ValueError, match=message):
        make_clips(**{"task": "camera", "split": "train", "count": 4, **arguments})


@pytest.mark.parametrize("index", [-1, 1 << 24])
def test_an_index_that_belongs_to_another_split_raises(index: int) -> None:
    with pytest.raises(ValueError, match="index: expected 0 to"):
        draw_scene("camera", "test", index)
