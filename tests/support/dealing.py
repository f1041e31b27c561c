"""Which tests are dealt to one worker: those that share a host, or histories."""

from __future__ import annotations

import re
from typing import Final

from gmem.runtime.backend import Backend
from gmem.uapi.lineage import Lineage

_SHARED_BY: Final = frozenset((*Backend, *Lineage))


def scope_of(nodeid: str) -> str:
    """Return what a test shares with others: its module, and a backend or lineage.

    That is the first word in the brackets, where it is one.
    """
    path, _, name = nodeid.partition("::")
    word = re.split(r"[\[\]-]", name + "[")[1]
    return f"{path} {word}" if word in _SHARED_BY else path
