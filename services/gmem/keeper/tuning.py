"""Writeback settings of a FUSE mount: without them rewriting is ten times slower.

A FUSE mount may hold 1% of the dirty memory of the machine (`max_ratio`), strictly
(`strict_limit`); a client that fills guest memory then waits for writeback all the
time. The files belong to root and are read-only in most containers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SETTINGS: Final = {"strict_limit": "0", "max_ratio": "100", "read_ahead_kb": "1024"}


def tune(major: int, minor: int) -> dict[str, str]:
    """Write SETTINGS of the mount `major:minor`; return those refused, with why."""
    directory = Path(f"/sys/class/bdi/{major}:{minor}")
    refused = {}
    for name, value in SETTINGS.items():
        try:
            (directory / name).write_text(value)
        except OSError as error:
            refused[name] = error.strerror or str(error)
    return refused
