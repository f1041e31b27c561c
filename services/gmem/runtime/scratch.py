"""A memfd per thread, through which memory that may be refused is copied safely.

A write to a file holds that file's lock while it faults: threads that shared one would
wait for each other (rule V10 of the design).
"""

from __future__ import annotations

import os
import threading


class _Scratch:
    """A memfd of one thread; goes with it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.fd = os.memfd_create("gmem-scratch", os.MFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.fd)


_scratches = threading.local()


def thread_scratch() -> int:
    """Return the descriptor of this thread's scratch file."""
    scratch: _Scratch | None = getattr(_scratches, "scratch", None)
    # A forked child has a copy of the descriptor, of one and the same file.
    if scratch is None or scratch.pid != os.getpid():
        scratch = _scratches.scratch = _Scratch()
    return scratch.fd
