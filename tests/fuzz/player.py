"""Plays a script on one kernel and writes every result as a word.

This process maps nothing. One process touches, the *hand*; where it dies of SIGBUS,
another is forked from one that has never touched anything, and gets the mappings again:
a window is what mmap was asked for, and a descriptor that keeps the file as a mapping
does.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Final, Self

from gmem.testing.conformance.kvm import MAINLINE, Backend, GuestMemfd, HasFileno, Vm
from gmem.testing.conformance.toucher import Died, Toucher, Window
from gmem.uapi.errors import TransportError
from gmem.uapi.flags import VmType
from gmem.uapi.pages import PAGE_SIZE
from tests.fuzz.operations import (
    VMS,
    Bind,
    Call,
    Close,
    Create,
    Fallocate,
    Fstat,
    Load,
    Madvise,
    Mmap,
    Munmap,
    Operation,
    Store,
    Survey,
    Unbind,
)

ABSENT: Final = "absent"
OK: Final = "0"
PLAIN_BYTES: Final = 1 << 20
UNKNOWN_IOCTL: Final = 0xC010AF41

CALLS: Final[Mapping[str, Callable[[int], object]]] = {
    "pread": lambda fd: os.pread(fd, 1, 0),
    "pwrite": lambda fd: os.pwrite(fd, b"A", 0),
    "lseek": lambda fd: os.lseek(fd, 0, os.SEEK_SET),
    "ftruncate": lambda fd: os.ftruncate(fd, 4096),
    "fchmod": lambda fd: os.fchmod(fd, 0o644),
    "ioctl": lambda fd: fcntl.ioctl(fd, UNKNOWN_IOCTL, bytearray(16)),
}


@dataclass(frozen=True, slots=True)
class _Fd:
    """A descriptor of ours."""

    number: int

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        os.close(self.number)


class Player:
    """One kernel with the things of the script that it is playing."""

    def __init__(self, kernel: Backend) -> None:
        """Make the VMs and the process that touches; they serve every script."""
        self.kernel = kernel
        self._vms = [
            kernel.create_vm(lineage=MAINLINE, vm_type=VmType.DEFAULT)
            for _ in range(VMS)
        ]
        self._plain = _Fd(os.memfd_create("plain", os.MFD_CLOEXEC))
        os.ftruncate(self._plain.number, PLAIN_BYTES)
        self._files: dict[int, GuestMemfd] = {}
        self._bound: set[tuple[int, int]] = set()
        self._hand = Hand()

    def play(self, operation: Operation) -> str:
        """Do it; return its result as a word, ABSENT where its thing is not there."""
        try:
            return self._play(operation)
        except TransportError:
            raise
        except OSError as error:
            return error_name(error)

    def reset(self) -> None:
        """Forget the script: every file closed, every memslot deleted."""
        self._hand.munmap_all()
        for vm, slot in sorted(self._bound):
            _unbind(self._vms[vm], slot)
        self._bound.clear()
        for file in list(self._files):
            self._close(file)

    def forget(self, operation: Operation) -> None:
        """Drop a thing that the other kernel did not make."""
        match operation:
            case Create(file):
                self._close(file)
            case Mmap(window):
                self._hand.munmap(window)
            case _:
                pass

    def close(self) -> None:
        """End everything."""
        self.reset()
        self._hand.close()
        self._plain.close()
        for vm in self._vms:
            vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _play(self, operation: Operation) -> str:
        match operation:
            case Create():
                return self._create(operation)
            case Mmap():
                return self._mmap(operation)
            case Bind():
                return self._bind(operation)
            case Unbind(vm, slot):
                _unbind(self._vms[vm], slot)
                self._bound.discard((vm, slot))
                return OK
            case Close(file) | Fstat(file) | Fallocate(file) | Call(file):
                return self._on_file(operation, self._files.get(file))
            case (
                Munmap(window)
                | Load(window)
                | Survey(window)
                | Store(window)
                | Madvise(window)
            ):
                return self._on_window(operation, self._hand.window(window))
            case _:
                raise TypeError(f"{operation} is no operation")

    def _create(self, operation: Create) -> str:
        self._close(operation.file)
        vm = self._vms[operation.vm]
        file = vm.create_guest_memfd(operation.size, operation.flags)
        self._files[operation.file] = file
        return OK

    def _mmap(self, operation: Mmap) -> str:
        file = self._files.get(operation.file)
        if file is None:
            return ABSENT
        self._hand.mmap(operation, file)
        return OK

    def _bind(self, operation: Bind) -> str:
        file: HasFileno | GuestMemfd | None
        file = self._files.get(operation.file, self._plain)
        self._vms[operation.vm].set_user_memory_region2(
            slot=operation.slot,
            flags=operation.flags,
            guest_phys_addr=operation.gpa,
            memory_size=operation.size,
            guest_memfd=file,
            guest_memfd_offset=operation.offset,
        )
        self._bound.add((operation.vm, operation.slot))
        return OK

    def _on_file(self, operation: Operation, file: GuestMemfd | None) -> str:
        if file is None:
            return ABSENT
        match operation:
            case Close(number):
                self._close(number)
            case Fstat():
                found = file.fstat()
                return f"size={found.st_size} blocks={found.st_blocks}"
            case Fallocate(_, mode, offset, length):
                file.fallocate(mode, offset, length)
            case Call(_, name):
                return str(CALLS[name](file.fileno()) or OK)
            case _:
                raise TypeError(f"{operation} is none on a file")
        return OK

    def _on_window(self, operation: Operation, window: Window | None) -> str:
        if window is None or not _is_inside(operation, window):
            return ABSENT
        found: object = None
        match operation:
            case Munmap(number):
                self._hand.munmap(number)
            case Load(_, offset, size):
                found = window.load(offset, size)
            case Survey(number):
                found = window.load(0, self._hand.inside(number))
                if found == b"":
                    return ABSENT
            case Store(_, offset, size, value):
                found = window.fill(value, offset, size)
            case Madvise(_, advice, offset, length):
                window.madvise(advice, offset, length)
            case _:
                raise TypeError(f"{operation} is none on a window")
        if isinstance(found, Died):
            self._hand.died()
            return found.signal.name
        return _short(found) if isinstance(found, bytes) else OK

    def _close(self, number: int) -> None:
        file = self._files.pop(number, None)
        if file is not None:
            file.close()


def _short(found: bytes) -> str:
    """Write bytes with what is repeated as a count: 41*4096 00*4096."""
    runs = ((value, len(list(run))) for value, run in groupby(found))
    return " ".join(f"{value:02x}*{count}" for value, count in runs)


def _is_inside(operation: Operation, window: Window) -> bool:
    """Whether it stays inside the mapping: what lies behind it is anything."""
    match operation:
        case (
            Load(_, offset, size) | Store(_, offset, size) | Madvise(_, _, offset, size)
        ):
            return offset + size <= -(-window.length // PAGE_SIZE) * PAGE_SIZE
        case _:
            return True


class Hand:
    """The process that touches, and what it has mapped."""

    def __init__(self) -> None:
        """Start the process that its successors are forked from."""
        self._root = Toucher()
        self._process: Toucher | None = None
        self._asked: dict[int, tuple[Mmap, _Fd]] = {}
        self._inside: dict[int, int] = {}
        self._windows: dict[int, Window] = {}

    def inside(self, number: int) -> int:
        """Return how many bytes of a window the file had when it was mapped."""
        return self._inside[number]

    def window(self, number: int) -> Window | None:
        """Return a window of a process that lives, None where there is none."""
        if number in self._asked and number not in self._windows:
            for operation, fd in list(self._asked.values()):
                self._windows[operation.window] = self._map(operation, fd)
        return self._windows.get(number)

    def mmap(self, operation: Mmap, file: GuestMemfd) -> None:
        """Map in place of what has the window's number."""
        self.munmap(operation.window)
        fd = _Fd(os.dup(file.fileno()))
        inside = min(operation.length, max(0, file.size - operation.offset))
        try:
            self._windows[operation.window] = self._map(operation, fd)
        except OSError:
            fd.close()
            raise
        self._asked[operation.window] = operation, fd
        self._inside[operation.window] = inside

    def munmap(self, number: int) -> None:
        """Drop a window, if it is there."""
        window = self._windows.pop(number, None)
        if window is not None:
            window.munmap()
        if number in self._asked:
            self._asked.pop(number)[1].close()

    def munmap_all(self) -> None:
        """Drop every window."""
        for number in list(self._asked):
            self.munmap(number)

    def died(self) -> None:
        """Take note that the process died; its mappings are made again when needed."""
        self._process = None
        self._windows.clear()

    def close(self) -> None:
        """End the processes."""
        self.munmap_all()
        if self._process is not None:
            self._process.close()
        self._root.close()

    def _map(self, operation: Mmap, fd: _Fd) -> Window:
        if self._process is None:
            self._process = self._root.fork()
        number = self._process.send(fd)
        try:
            return self._process.map(
                operation.length,
                offset=operation.offset,
                file=number,
                prot=operation.prot,
                flags=operation.flags,
            )
        finally:
            self._process.drop(number)


def error_name(error: OSError) -> str:
    """Return errno's name; Python knows 95 by its other name."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return "EOPNOTSUPP" if name == "ENOTSUP" else name


def _unbind(vm: Vm, slot: int) -> None:
    vm.set_user_memory_region2(slot=slot, guest_phys_addr=0, memory_size=0)
