"""Who maps which pages of a host view, read from the processes themselves.

FUSE cannot say which process maps a page, but the 39-patch series refuses a conversion
to private when a page is mapped (folio_mapped). So the page tables are asked: the view
is found in /proc/PID/maps by device and inode number, and PAGEMAP_SCAN (Linux 6.7)
tells which of its pages are present. That is exact where the other processes are
visible (CAP_SYS_PTRACE, and no more privileges than ours); elsewhere clients report
their windows to the broker, and the service says which of the two it uses.

The guest processes are left out: their page tables stand for stage 2, which KVM never
counts as a host mapping.

A scan takes the other process's mmap_lock. If that process waits in a fault while
another of its threads wants the lock for writing, the scan waits as long as the fault;
so it is made by a worker thread, and whoever awaits it sets a limit.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, PgRange

SCAN_REGIONS_MAX = 512

# _IOWR('f', 16, struct pm_scan_arg): twelve 64-bit fields (include/uapi/linux/fs.h).
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_ARG = struct.Struct("=12Q")
_PAGE_REGION = struct.Struct("=3Q")
_PAGE_IS_PRESENT = 1 << 3


@dataclass(frozen=True, slots=True)
class MappedRun:
    """A run of pages of an inode that one process has in its page tables."""

    pid: int
    comm: str
    pages: PgRange


@dataclass(frozen=True, slots=True)
class _Window:
    """One line of /proc/PID/maps: where an address range shows which pages."""

    address: int
    pages: PgRange


def can_see_other_processes() -> bool:
    """Tell whether this process may read the page tables of any other one."""
    cap_sys_ptrace = 1 << 19
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = next(line for line in status.splitlines() if line.startswith("CapEff"))
    return bool(int(effective.split()[1], 16) & cap_sys_ptrace)


class MappingFinder:
    """Finds who maps pages of the files on one mount.

    `device` is the (major, minor) that /proc/PID/maps shows for the mount; `left_out`
    returns the pids not to look at: the service itself and the guest processes.
    """

    def __init__(
        self, device: tuple[int, int], left_out: Callable[[], frozenset[int]]
    ) -> None:
        """Look at nothing yet."""
        self._device = f"{device[0]:02x}:{device[1]:02x}"
        self._left_out = left_out
        self.hidden: frozenset[int] = frozenset()

    def find(self, st_ino: int, ranges: Iterable[PgRange]) -> tuple[MappedRun, ...]:
        """Return the present pages of file `st_ino` that lie in `ranges`, by process.

        Blocks on the page tables of other processes: for worker threads only. A
        process that ends meanwhile maps nothing any more. A process with more
        privileges than this one cannot be looked into: its pid goes to `hidden`, and
        the caller decides whether it was ever given a view.
        """
        wanted = tuple(ranges)
        left_out = self._left_out()
        runs: list[MappedRun] = []
        hidden: set[int] = set()
        for pid in _pids():
            if pid in left_out:
                continue
            try:
                runs.extend(self._runs_of(pid, st_ino, wanted))
            except (FileNotFoundError, ProcessLookupError):
                continue
            except PermissionError:
                hidden.add(pid)
        self.hidden = frozenset(hidden)
        return tuple(sorted(runs, key=lambda run: (run.pages.start, run.pid)))

    def _runs_of(
        self, pid: int, st_ino: int, wanted: tuple[PgRange, ...]
    ) -> Iterator[MappedRun]:
        windows = list(self._windows(pid, st_ino))
        if not windows:
            return
        comm = comm_of(pid)
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for window in windows:
                for pages in wanted:
                    part = window.pages.intersection(pages)
                    if len(part):
                        for present in _scan(pagemap, window, part):
                            yield MappedRun(pid, comm, present)
        finally:
            os.close(pagemap)

    def _windows(self, pid: int, st_ino: int) -> Iterator[_Window]:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
        needle = f" {self._device} {st_ino} ".encode()
        if needle not in maps:
            return
        for line in maps.splitlines():
            if needle not in line:
                continue
            addresses, _, offset = line.split(None, 3)[:3]
            start, stop = (int(part, 16) for part in addresses.split(b"-"))
            first = int(offset, 16) >> PAGE_SHIFT
            npages = (stop - start) >> PAGE_SHIFT
            yield _Window(start, PgRange(first, first + npages))


def comm_of(pid: int) -> str:
    """Return the name of process `pid` as the kernel knows it, `?` once it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "?"


def _pids() -> list[int]:
    entries = Path("/proc").iterdir()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())


def _scan(pagemap: int, window: _Window, part: PgRange) -> Iterator[PgRange]:
    """Ask for the present pages of `part` of `window`, as runs of the inode's pages."""
    regions = ctypes.create_string_buffer(_PAGE_REGION.size * SCAN_REGIONS_MAX)
    at = window.address + ((part.start - window.pages.start) << PAGE_SHIFT)
    stop = at + part.size
    while at < stop:
        argument = bytearray(
            _PM_SCAN_ARG.pack(
                *(_PM_SCAN_ARG.size, 0, at, stop, 0),
                *(ctypes.addressof(regions), SCAN_REGIONS_MAX, 0),
                *(0, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT),
            )
        )
        found = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        for index in range(found):
            low, high, _ = _PAGE_REGION.unpack_from(regions, index * _PAGE_REGION.size)
            first = window.pages.start + ((low - window.address) >> PAGE_SHIFT)
            yield PgRange(first, first + ((high - low) >> PAGE_SHIFT))
        at = max(_PM_SCAN_ARG.unpack(argument)[4], at + PAGE_SIZE)
