"""What a set of services left behind: processes, mounts, sockets.

Everything of one emulated host lies below one directory, so the audit asks for that
directory alone, and hosts of other test runs on this machine do not disturb it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path


def leftovers(root: Path, *, apart_from: Collection[int] = ()) -> list[str]:
    """One sentence for each process, mount and socket that still belongs to `root`.

    A process belongs to `root` when its command line or its environment names it.
    """
    needle = re.compile(re.escape(os.fsencode(root)) + rb"(?![\w.-])")
    left_out = {os.getpid(), *apart_from}
    return [*_processes(needle, left_out), *_mounts(str(root)), *_sockets(str(root))]


def wait_for_none(root: Path, seconds_max: float) -> list[str]:
    """Poll `leftovers` until there are none; what is left after `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    while (left := leftovers(root)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _processes(needle: re.Pattern[bytes], left_out: set[int]) -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in left_out:
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            texts = command + b"\0" + (entry / "environ").read_bytes()
            if needle.search(texts):
                words = command.replace(b"\0", b" ").decode(errors="replace").strip()
                yield f"process {entry.name} still runs: {words}"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # It ended meanwhile, or is somebody else's.


def _mounts(root: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if point == root or point.startswith(root + "/"):
            yield f"{point} is still mounted"


def _sockets(root: str) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7].startswith(root + "/"):
            yield f"socket {words[7]} is still open"
