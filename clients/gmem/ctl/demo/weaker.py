"""Checks of the demo that cannot hold on a backend: they are said to be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gmem.runtime.backend import Backend

DIED: Final = "it died by signal 7, SIGBUS"
IOCTL: Final = "the ioctl reached guest_memfd"

WEAKER: Final[Mapping[Backend, Mapping[str, str]]] = {
    Backend.FUSE: {},
    Backend.MEMFD: {
        DIED: "nobody is asked at a fault of a plain memfd: a private page is zeros",
        IOCTL: "an ioctl on a memfd reaches the kernel alone: ConvertRange instead",
    },
}
"""By backend: the sentence of a check, and why it is skipped."""
