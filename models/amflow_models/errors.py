"""One way to say that a name is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_known(argument: str, name: object, known: Iterable[str]) -> None:
    """Raises ValueError, which names the nearest known one, unless `name` is one of `known`."""
    names = list(known)
    if name in names:
        return
    nearest = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    listed = f" of {', '.join(map(repr, names))}" if len(names) < 20 else ""
    raise ValueError(f"{argument}: expected one{listed or ' that is known'}, got {name!r}{hint}")
