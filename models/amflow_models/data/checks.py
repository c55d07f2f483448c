"""Checks of lists of videos: they find problems before a training run does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import StringIO
from itertools import combinations

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from amflow_models.data.frames import frame_files
from amflow_models.data.reading import UnreadableVideo
from amflow_models.data.video import frames_of, open_listed
from amflow_models.data.videos import Video, VideoList

_EXAMPLES = 3
_SEVERAL = "videos with several labels"
_MORE_FRAMES = "folders with more frames than the list says"  # a warning: those that the list says are there


@dataclass(frozen=True)
class Problem:
    """One kind of problem in one list, or in two.

    Attributes:
        where: name of the list.
        kind: the kind of problem.
        count: number of times that it occurs.
        cases: every occurrence, in the list's order; empty if they have no names.
        warning: whether training can go ahead nevertheless.
    """

    where: str
    kind: str
    count: int
    cases: tuple[str, ...] = ()
    warning: bool = False

    def __str__(self) -> str:
        more = ", ..." if len(self.cases) > _EXAMPLES else ""
        listed = f" ({', '.join(self.cases[:_EXAMPLES])}{more})" if self.cases else ""
        return f"{self.where}: {self.kind}: {self.count}{listed}"


@dataclass(frozen=True)
class Report:
    """The result of `check_lists`; prints as a table.

    Attributes:
        lists: the lists by name.
        num_classes: the number of classes that they were checked against.
        problems: all problems, including warnings.
        bad: for each list the videos that can't be trained on: {index in the list: reasons}.
    """

    lists: Mapping[str, VideoList]
    num_classes: int
    problems: tuple[Problem, ...]
    bad: Mapping[str, Mapping[int, tuple[str, ...]]]

    def raise_for_problems(self) -> None:
        """Raises a ValueError that lists all problems, if there are any besides warnings."""
        errors = [str(problem) for problem in self.problems if not problem.warning]
        if errors:
            raise ValueError("\n  ".join([f"{len(errors)} kinds of problems with the lists:", *errors]))

    def __rich__(self) -> RenderableType:
        return self.table()

    def table(self, *, examples: int | None = _EXAMPLES) -> RenderableType:
        """The report as rich prints it, with so many cases of each problem; None takes all."""
        lists = Table("list", *("videos", "classes", "labels"), title=f"Lists, for {self.num_classes} classes")
        for name, listed in self.lists.items():
            labels = {video.label for video in listed.videos}
            span = f"{min(labels)} to {max(labels)}" if labels else "none"
            lists.add_row(name, str(len(listed.videos)), str(len(labels)), span)
        if not self.problems:
            return Group(lists, "No problems found.")
        problems = Table("list", "", "problem", "count", title="Problems")
        problems.add_column("first", overflow="fold")  # whole paths
        for problem in self.problems:
            kind = "[yellow]warning" if problem.warning else "[red]error"
            cells = (problem.where, kind, problem.kind, str(problem.count), _listed(problem.cases, examples))
            problems.add_row(*cells)
        return Group(lists, problems)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120)
        with console.capture() as written:
            console.print(self)
        return written.get()


def _listed(cases: Sequence[str], examples: int | None) -> str:
    more = [] if examples is None or len(cases) <= examples else ["..."]
    return "\n".join([*map(escape, cases[:examples]), *more])


def check_lists(
    lists: Mapping[str, VideoList],
    num_classes: int,
    *,
    open_videos: bool = True,
    subset: bool = False,
    several_labels: bool = False,
) -> Report:
    """Looks for problems in lists, in each one and between them.

    - labels below 0 or above `num_classes` - 1, above all labels that count from 1;
    - empty lists; classes without a video: an error in a list with "train" in its name, a warning in others;
    - missing files, folders with fewer frames than their list says (with more: a warning) or with pictures of several
      series and no template, and videos that can't be opened;
    - files of macOS that were left out (a warning), and classes that have different names in two lists;
    - a video with several labels (unless `several_labels`), and videos that two lists share; paths that lead to the
      same file are the same video. A video may occur several times with the same label: some lists balance their
      classes in this way.

    Args:
        lists: the lists by name, such as {"train": ..., "validation": ...}.
        num_classes: number of classes of the model.
        open_videos: open every video and decode its first frame, in several threads; otherwise only check that it
            exists.
        subset: the lists hold a part of a data set, so that training lists may lack classes, too.
        several_labels: a video may have several labels.

    Returns:
        The report of all problems.

    Raises:
        ValueError: num_classes is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    videos = list({_unlabelled(video): None for listed in lists.values() for video in listed.videos})
    with ThreadPoolExecutor() as pool:
        checked = pool.map(lambda video: _check_video(video, open_videos), videos)
        progress = track(checked, "videos", len(videos), console=Console(stderr=True), disable=not sys.stderr.isatty())
        results = dict(zip(videos, progress, strict=True))
    problems: list[Problem] = []
    bad: dict[str, dict[int, tuple[str, ...]]] = {}
    files: dict[str, dict[str, Video]] = {}
    for name, listed in lists.items():
        own = [results[_unlabelled(video)] for video in listed.videos]
        files[name] = {file: video for (file, *_), video in zip(own, listed.videos, strict=True)}
        if listed.ignored:
            left_out = "files of macOS (._*), which are no videos, left out"
            problems.append(Problem(name, left_out, listed.ignored, warning=True))
        labels: dict[str, set[int]] = {}
        for (file, *_), video in zip(own, listed.videos, strict=True):
            labels.setdefault(file, set()).add(video.label)
        above = _above(listed, num_classes)
        cases: dict[str, list[str]] = {}  # by kind of problem
        bad[name] = {}
        for index, ((file, kind, detail), video) in enumerate(zip(own, listed.videos, strict=True)):
            found = []
            if video.label < 0:
                found.append(("labels below 0", f": {video.label}"))
            if video.label >= num_classes:
                found.append((above, f": {video.label}"))
            if kind:
                found.append((kind, detail))
            if len(labels[file]) > 1 and not several_labels:
                found.append((_SEVERAL, f": {sorted(labels[file])}"))
            for kind, detail in found:
                cases.setdefault(kind, []).append(f"{video.path}{detail}")
            reasons = tuple(f"{kind}{detail}" for kind, detail in found if kind != _MORE_FRAMES)
            if reasons:
                bad[name][index] = reasons
        for kind, every in cases.items():
            problems += _problem(name, kind, every, warning=kind == _MORE_FRAMES)
        if not listed.videos:
            problems += _problem(name, "no videos in the list", [listed.source])
            continue
        absent = _absent(listed, num_classes)
        problems += _problem(name, "classes without a video", absent, warning=subset or "train" not in name)
    for a, b in combinations(files, 2):
        shared = [str(video.path) for file, video in files[a].items() if file in files[b]]
        problems += _problem(f"{a}, {b}", "videos in both lists", shared)
        names = zip(lists[a].classes, lists[b].classes, strict=False)
        differing = [f"class {k}: {one!r} and {other!r}" for k, (one, other) in enumerate(names) if one != other]
        problems += _problem(f"{a}, {b}", "classes with different names", differing)
    return Report(lists, num_classes, tuple(problems), bad)


def _problem(where: str, kind: str, cases: list[str], *, warning: bool = False) -> list[Problem]:
    """The problem, if there is a case of it."""
    return [Problem(where, kind, len(cases), tuple(cases), warning)] if cases else []


def _above(listed: VideoList, num_classes: int) -> str:
    """The kind of problem of labels that are too high."""
    labels = {video.label for video in listed.videos}
    above = f"labels above {num_classes - 1}"
    if labels and min(labels) == 1 and max(labels) == num_classes:
        above += f" (labels run from 1 to {num_classes}, and should from 0: subtract 1 from all)"
    return above


def _absent(listed: VideoList, num_classes: int) -> list[str]:
    """The classes without a video."""
    labels = {video.label for video in listed.videos}
    names = [*listed.classes[:num_classes], *map(str, range(len(listed.classes), num_classes))]
    return [name for label, name in enumerate(names) if label not in labels]


def _unlabelled(video: Video) -> Video:
    """The video without its label, on which none of its problems depends."""
    return replace(video, label=0)


def _check_video(video: Video, open_it: bool) -> tuple[str, str, str]:
    """The file that a video's path leads to, the kind of its problem (empty if it has none), and details of that."""
    file = os.path.realpath(video.path) + (f" from frame {video.start} on" if video.start else "")
    if not os.path.exists(video.file):
        return file, "missing files", ""
    more, empty = "", False
    try:
        if video.file.is_dir():
            there = len(frame_files(video.path, video.template, video.start_index))
            try:
                expected = frames_of(video, there)
            except UnreadableVideo as error:
                return file, "folders with fewer frames than the list says", f": {error.reason}"
            more = f": {there}, not {expected}" if there > expected and video.start is None else ""
            empty = not there
        if open_it or empty:
            with open_listed(video) as reader:
                reader.read([video.start or 0])
    except UnreadableVideo as error:
        return file, "videos that can't be read", f": {error.reason}"
    return file, _MORE_FRAMES if more else "", more
