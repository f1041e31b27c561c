"""What a test left of itself on a host that goes on running."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gmem.ctl.state import spare_of
from gmem.testing.conformance.emulator import Emulator
from gmem.testing.leaks import leftovers

GONE_SECONDS_MAX: Final = 10.0
_JOURNAL: Final = ".db"


class Audit:
    """Remembers how things are; `left` says what is there beyond that.

    Looked at are processes and mounts and sockets of the host, children and descriptors
    of this process, files below the host's run directory, and the host's inodes, VMs
    and counters. Not a spare of guest_memfd: the keeper has one when it likes.
    """

    def __init__(self, kernel: Emulator) -> None:
        """Take everything down."""
        self._kernel = kernel
        kernel.begin()
        self._before = self._now()

    def left(self) -> list[str]:
        """Return a sentence for each thing that is new; waits for what is ending."""
        gc.collect()
        deadline = time.monotonic() + GONE_SECONDS_MAX
        while (new := self._new()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return new

    def _new(self) -> list[str]:
        new = sorted((self._now() - self._before).elements())
        return new + self._kernel.left_now()

    def _now(self) -> Counter[str]:
        host = self._kernel.host
        run_dir, spare = host.run_dir, spare_of(host.directory)
        spares = set() if spare is None else {spare.pid}
        # A set: what grows in number alone are connections that are kept for later.
        found = Counter(set(leftovers(run_dir, apart_from=spares)))
        found.update(_descriptors())
        found.update(_children())
        found.update(_files(run_dir, apart_from=host.directory.spare_pid))
        return found


def _descriptors() -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = entry.readlink()
        except FileNotFoundError:
            continue  # That of the listing itself.
        # Sockets and pipes have numbers of their own: they are counted by kind.
        yield f"descriptor of {str(target).split(':[', 1)[0]} is open"


def _children() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            yield f"child {entry.name} is there: {words.strip() or 'a zombie'}"


def _files(run_dir: Path, *, apart_from: Path) -> Iterator[str]:
    for path in run_dir.rglob("*"):
        if _JOURNAL not in path.suffix and path != apart_from:
            yield f"{path} is there"
