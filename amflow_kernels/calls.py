"""From the arguments of a public function to a checked problem and the implementation that runs it.

Both are remembered by the kind of a call, which is all that checks and choice depend on: shapes, strides, dtypes,
devices, options. So only the first call of a kind is checked.
"""

from __future__ import annotations

from typing import Any, TypeVar

from amflow_kernels.dispatch import check_impl, lasting_choice
from amflow_kernels.impl.base import Implementation
from amflow_kernels.plain import is_plain, unwatched
from amflow_kernels.problem import MapPairs

Kind = TypeVar("Kind", bound=MapPairs)

MOST = 4096  # remembered kinds; then all are forgotten

_known: dict[tuple[Any, ...], tuple[dict[str, Any], Implementation]] = {}  # options and choices


def problem_of(
    form: type[Kind], impl: str | None, tensors: dict[str, Any], options: dict[str, Any]
) -> tuple[Kind, Implementation | None]:
    """A checked problem of this form.

    Args:
        tensors: the fields that should be tensors, or may be.
        options: the other fields.

    Returns:
        The problem, and the implementation that may run it at once; None if the op is to be called, for whatever
        watches it, or for its warnings.

    Raises:
        TypeError, ValueError, RuntimeError: as the problem, `check_impl` and `choose`.
    """
    key = _key(form, impl, tensors, options) if unwatched() else None
    try:
        known = None if key is None else _known.get(key)
    except TypeError:  # an option that has no hash, which no check lets pass
        known = None
    if known is not None:
        problem = form.__new__(form)
        problem.__dict__ = {**known[0], **tensors}
        return problem, known[1]
    problem = form(**tensors, **options)
    check_impl(impl, problem)
    chosen = None if key is None else lasting_choice(problem, impl)
    if key is not None and chosen is not None:
        if len(_known) >= MOST:  # several threads may add at once
            _known.clear()
        _known[key] = {**problem.__dict__, **dict.fromkeys(tensors)}, chosen
    return problem, chosen


def _key(form: type[MapPairs], impl: str | None, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kind of a call, or None if a tensor is not plain."""
    values = options.values()  # which options there are follows from the names of the tensors
    key = [form, impl, *tensors, *values, *map(type, values)]  # checks can tell True from 1: they are equal
    for x in tensors.values():
        if x is None:
            key.append(None)
        elif is_plain(x):
            key += x.shape, x.stride(), x.dtype, x.get_device()
        else:
            return None
    return tuple(key)
