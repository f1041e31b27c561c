"""Results as words, so that two kernels can be compared: 0, EINVAL, SIGBUS."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import ParamSpec

from gmem.testing.conformance.guest import Halted, MemoryFault
from gmem.testing.conformance.toucher import Died
from gmem.uapi.errors import Errno, TransportError

P = ParamSpec("P")

OK = "0"
SIGBUS = signal.SIGBUS.name


def outcome_of(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> str:
    """Make a call; return "0", or the name of the errno it failed with.

    A service that does not answer is no outcome: TransportError goes on.
    """
    try:
        call(*args, **kwargs)
    except TransportError:
        raise
    except OSError as error:
        return errno_name(error.errno)
    return OK


def errno_name(number: int | None) -> str:
    """Return `EINVAL` for 22; 0 is "0"."""
    if not number:
        return OK
    try:
        return Errno(number).name
    except ValueError:
        return f"errno {number}"


def worded(value: object) -> str:
    """Write whatever a call, a touch or a guest left."""
    match value:
        case Died():
            return value.signal.name
        case bytes():
            return value.hex()
        case MemoryFault():
            flags, gpa, size = hex(value.flags), hex(value.gpa), value.size
            name = errno_name(value.errno)
            return f"{name} MEMORY_FAULT flags={flags} gpa={gpa} size={size}"
        case Halted():
            return "HLT"
        case None:
            return OK
        case _:
            return str(value)
