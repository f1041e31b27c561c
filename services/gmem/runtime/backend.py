"""Which data plane serves the views of a host: a word that people choose."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

BACKEND_VARIABLE: Final = "GMEM_BACKEND"
"""Environment variable with the word, where no flag says it."""


class Backend(StrEnum):
    """What stands behind `--backend`; nothing but that flag or variable chooses it."""

    FUSE = "fuse"
    """Files that the service serves: a private page is SIGBUS."""
    MEMFD = "memfd"
    """Plain memfds, without /dev/fuse or a privilege: a private page is zeros."""
