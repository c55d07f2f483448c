"""What is wrong with lists of videos, before a training run finds out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import StringIO
from itertools import combinations

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from amflow_models.data.lists import Video, VideoList
from amflow_models.data.video import UnreadableVideo, count_images, open_video

_EXAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """One kind of problem in one list, or in two.

    Attributes:
        where: name of the list.
        kind: what is wrong.
        count: how often.
        examples: the first few.
        warning: nothing that stands in the way of training.
    """

    where: str
    kind: str
    count: int
    examples: tuple[str, ...] = ()
    warning: bool = False

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) > 0 else ""
        listed = f" ({', '.join(self.examples)}{more})" if self.examples else ""
        return f"{self.where}: {self.kind}: {self.count}{listed}"


@dataclass(frozen=True)
class Report:
    """What `check_lists` found; prints as a table.

    Attributes:
        lists: by name.
        num_classes: as they were checked for.
        problems: all that was found, warnings among them.
    """

    lists: Mapping[str, VideoList]
    num_classes: int
    problems: tuple[Problem, ...]

    def raise_for_problems(self) -> None:
        """Raises one ValueError that lists all problems, if there are any besides warnings."""
        found = [str(problem) for problem in self.problems if not problem.warning]
        if found:
            raise ValueError("\n  ".join([f"{len(found)} kinds of problems with the lists:", *found]))

    def __rich__(self) -> RenderableType:
        lists = Table("list", *("videos", "classes", "labels"), title=f"Lists, for {self.num_classes} classes")
        for name, listed in self.lists.items():
            labels = {video.label for video in listed.videos}
            span = f"{min(labels)} to {max(labels)}" if labels else "none"
            lists.add_row(name, str(len(listed.videos)), str(len(labels)), span)
        if not self.problems:
            return Group(lists, "No problems found.")
        problems = Table("list", "", "problem", "count", title="Problems")
        problems.add_column("first", overflow="fold")  # paths are shown as a whole
        for problem in self.problems:
            kind = "[yellow]warning" if problem.warning else "[red]error"
            cells = (problem.where, kind, problem.kind, str(problem.count), "\n".join(map(escape, problem.examples)))
            problems.add_row(*cells)
        return Group(lists, problems)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120)
        with console.capture() as written:
            console.print(self)
        return written.get()


def check_lists(lists: Mapping[str, VideoList], num_classes: int, *, open_videos: bool = True) -> Report:
    """Looks for what is wrong with lists, each of its own and together.

    - labels below 0 or of more than `num_classes`, above all those that count from 1;
    - empty lists; classes without a video: an error in a list with "train" in its name, a warning in others;
    - missing files, folders with fewer frames than their list says, and videos that can't be opened;
    - one video with several labels, and videos that two lists share, by the file that a path leads to. A video that
      comes several times with the same label is no problem: some lists balance their classes so.

    Args:
        lists: by name, as {"train": ..., "validation": ...}.
        num_classes: how many the model has.
        open_videos: open every video and decode its first frame, in a few threads; else only look whether it is there.

    Raises:
        ValueError: num_classes is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    videos = list({(video.path, video.frames): video for listed in lists.values() for video in listed.videos}.values())
    with ThreadPoolExecutor() as pool:
        looked = pool.map(lambda video: _look(video, open_videos), videos)
        progress = track(looked, "videos", len(videos), console=Console(stderr=True), disable=not sys.stderr.isatty())
        seen = {(video.path, video.frames): found for video, found in zip(videos, progress, strict=True)}
    problems: list[Problem] = []
    files: dict[str, dict[str, Video]] = {}
    for name, listed in lists.items():
        found = [seen[video.path, video.frames] for video in listed.videos]
        files[name] = {file: video for (file, *_), video in zip(found, listed.videos, strict=True)}
        problems += _check_labels(name, listed, num_classes)
        for kind in dict.fromkeys(kind for _, kind, _ in found if kind):
            told = [f"{v.path}{why}" for (_, k, why), v in zip(found, listed.videos, strict=True) if k == kind]
            problems.append(_problem(name, kind, told))
        labels: dict[str, set[int]] = {}
        for (file, *_), video in zip(found, listed.videos, strict=True):
            labels.setdefault(file, set()).add(video.label)
        several = [f"{files[name][file].path}: {sorted(own)}" for file, own in labels.items() if len(own) > 1]
        problems.append(_problem(name, "videos with several labels", several))
    for a, b in combinations(files, 2):
        shared = [str(video.path) for file, video in files[a].items() if file in files[b]]
        problems.append(_problem(f"{a}, {b}", "videos in both lists", shared))
    return Report(lists, num_classes, tuple(problem for problem in problems if problem.count))


def _check_labels(name: str, listed: VideoList, num_classes: int) -> list[Problem]:
    if not listed.videos:
        return [Problem(name, "no videos in the list", 1, (listed.source,))]
    labels = {video.label for video in listed.videos}
    above = f"labels above {num_classes - 1}"
    if min(labels) == 1 and max(labels) == num_classes:
        above += f" (labels run from 1 to {num_classes}, and should from 0: subtract 1 from all)"

    def of(condition: Callable[[int], bool]) -> list[str]:
        return [f"{video.path}: {video.label}" for video in listed.videos if condition(video.label)]

    absent = [listed.classes[k] if k < len(listed.classes) else str(k) for k in range(num_classes) if k not in labels]
    return [
        _problem(name, "labels below 0", of(lambda label: label < 0)),
        _problem(name, above, of(lambda label: label >= num_classes)),
        _problem(name, "classes without a video", absent, warning="train" not in name),
    ]


def _look(video: Video, open_it: bool) -> tuple[str, str, str]:
    """The file that a path leads to; the kind of problem it has, empty if none; more about it."""
    file = os.path.realpath(video.path)
    if not os.path.exists(file):
        return file, "missing files", ""
    try:
        if video.frames is not None and os.path.isdir(file) and (there := count_images(file)) < video.frames:
            return file, "folders with fewer frames than the list says", f": {there} of {video.frames}"
        if open_it:
            with open_video(file) as reader:
                reader.read([0])
    except UnreadableVideo as error:
        return file, "videos that can't be read", f": {error.reason}"
    return file, "", ""


def _problem(where: str, kind: str, found: Sequence[str], *, warning: bool = False) -> Problem:
    return Problem(where, kind, len(found), tuple(found[:_EXAMPLES]), warning)
