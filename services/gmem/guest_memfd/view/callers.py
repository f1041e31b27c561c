"""Whether the caller of a request is being killed: FUSE itself does not say.

FUSE_INTERRUPT comes once and for any signal. A task that waits for a page fault or a
request cannot die before it is answered; SIGKILL then stands in its pending set.
The pid of a request is a thread's, in the pid namespace of whoever mounted: keeper
and service must share one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SIGKILL_BIT: Final = 1 << 8


def is_being_killed(tid: int) -> bool:
    """Tell whether SIGKILL is pending for thread `tid`, or it is gone already.

    0 is a caller of another pid namespace, or the kernel itself: nobody to ask.
    """
    if tid == 0:
        return False
    try:
        status = Path(f"/proc/{tid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(
        int(line.split()[1], 16) & SIGKILL_BIT
        for line in status.splitlines()
        if line.startswith((b"SigPnd:", b"ShdPnd:"))
    )
