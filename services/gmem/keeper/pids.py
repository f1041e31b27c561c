"""Processes told apart by pid and start time, and written down for people who look."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SERVICE: Final = "guest_memfd.pid"
"""The service that holds the descriptors now, or is being started."""
SPARE: Final = "guest_memfd.spare"
"""A successor that waits to be started: no service."""


def write(path: Path, pid: int) -> None:
    """Write a process down; a reader sees the old line or the new one."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(f"{pid} {start_time(pid)}\n", encoding="ascii")
    fresh.replace(path)


def is_alive(path: Path) -> bool:
    """Tell whether the process that was written down still lives."""
    try:
        pid, began = path.read_text(encoding="ascii").split()
        return start_time(int(pid)) == int(began)
    except (OSError, ValueError):
        return False


def start_time(pid: int) -> int:
    """Return when a process began, in ticks since boot (field 22 of stat); 0: gone."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0


def is_zombie(pid: int) -> bool:
    """Tell whether a process's leader has ended; 0 is one of another pid namespace."""
    if pid == 0:
        return False
    fields = _stat_fields(pid)
    return not fields or fields[0] in {"Z", "X"}


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
