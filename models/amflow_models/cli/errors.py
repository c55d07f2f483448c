"""Errors that the command ``amflow`` prints in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A failure that the user can do something about, as one line of text."""


class MissingPackageError(ModuleNotFoundError):
    """A package of an extra is not installed; the message names the extra."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns the error about a missing package into one that names the extra which installs it.

    Args:
        extra: a name in ``[project.optional-dependencies]``, such as ``"demo"``.

    Raises:
        MissingPackageError: a package is missing; the message says how to install it.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:  # also importlib.metadata.PackageNotFoundError
        package = str(error.name).partition(".")[0]
        if package in ("amflow_kernels", "amflow_models"):
            raise  # a bug: no extra contains modules of this project
        raise MissingPackageError(
            f"the package {package} is missing; it comes with: pip install 'amflow-kernels[{extra}]'", name=package
        ) from error
