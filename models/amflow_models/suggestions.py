"""Error messages for unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_known(argument: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `known`; the message suggests the nearest known names."""
    names = list(known)
    if name in names:
        return
    listed = f" of {', '.join(map(repr, names))}" if len(names) < 20 else ""
    raise ValueError(f"{argument}: expected one{listed or ' that is known'}, got {name!r}{nearest(name, names)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """The suggestion "; did you mean ...?" to append to an error message; empty if no known name is near."""
    matches = get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
