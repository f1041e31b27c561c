"""What calls of gmem.client raise: the classes of the Reason table, re-exported."""

from __future__ import annotations

from gmem.uapi.errors import (
    BadRequest,
    Contended,
    Errno,
    Exhausted,
    InUse,
    KernelError,
    NoSuchObject,
    NotFaultable,
    ObjectExists,
    PeerRestarted,
    Poisoned,
    Reason,
    TransportError,
    Unsupported,
)

__all__ = [
    "BadRequest",
    "Contended",
    "Errno",
    "Exhausted",
    "InUse",
    "KernelError",
    "NoSuchObject",
    "NotFaultable",
    "ObjectExists",
    "PeerRestarted",
    "Poisoned",
    "Reason",
    "TransportError",
    "Unsupported",
]
