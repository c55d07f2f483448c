"""``amflow doctor``: versions, devices, and which kernels run here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from amflow_kernels.doctor import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status 0."""
    argparse.ArgumentParser(
        prog="amflow doctor",
        description="Prints versions, devices and which kernels run here; builds the native library if it is missing.",
    ).parse_args(arguments)
    print(report())
    return 0
