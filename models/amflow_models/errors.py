"""One way to say that a name is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_known(argument: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError, which names the nearest known one, unless `name` is one of `known`."""
    names = list(known)
    if name in names:
        return
    listed = f" of {', '.join(map(repr, names))}" if len(names) < 20 else ""
    raise ValueError(f"{argument}: expected one{listed or ' that is known'}, got {name!r}{nearest(name, names)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """A question about the nearest known names, to put behind an error; empty if none is near."""
    found = get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
