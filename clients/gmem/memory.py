"""A window of guest memory as a numpy array, and accesses that refuse instead of kill.

Touching a private page of a guest_memfd, or one past its end, is SIGBUS, and Python
cannot survive that: a handler written in Python returns to the very instruction that
faulted, for ever. System calls can: the kernel copies from or to the address for us and
answers EFAULT. `read`, `write` and `fill` therefore go through a scratch memfd, one per
thread, because a write to a file holds that file's lock while it faults:

    os.pwrite(scratch, window)      the kernel reads the window
    os.preadv(scratch, [window])    the kernel writes the window

`array` is the memory itself: as fast as memory, and as deadly. With the backend memfd
it kills nobody and refuses nothing: a private page is zeros there, and what is stored
in it reaches nobody. Safe accesses look at the page states then.

A process that serves the file, runs an event loop or answers RPCs must not map it: one
fault that waits in the kernel stops every thread of its interpreter. Map windows in a
process of their own.

A service that is killed and started again is not felt: its pages stay, and what is
written meanwhile is kept. Where it stays away, the keeper ends the connection. Pages of
such a *dead connection* stay mapped, readable and writable without a word, and what is
written there reaches nobody. After each safe access the window looks whether its
connection still lives, and raises TransportError if it does not; who uses `array` calls
`require_alive` himself.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import numpy as np

from gmem.runtime import fdpass
from gmem.runtime.broker_client import BrokerClient
from gmem.runtime.scratch import thread_scratch
from gmem.runtime.state_table import HostStates
from gmem.uapi.errors import BadRequest, NotFaultable, Reason, TransportError
from gmem.uapi.pages import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCRATCH_BYTES: Final = 1 << 20
"""Most bytes that one system call copies: bounds how long it holds the scratch file."""

STAT_SECONDS: Final = 0.05
"""How long a dead file system behind a living broker may go unnoticed."""


class Connection(Protocol):
    """What keeps a view's references alive: the broker connection it came through."""

    def alive(self) -> bool:
        """Whether the service holds its end at this moment; never blocks."""
        ...

    def wait_alive(self) -> bool:
        """Wait for a service that was killed to take this client back; False: not."""
        ...

    def report_windows(self, windows: list[dict[str, Any]]) -> None:
        """Tell the service what is mapped here."""
        ...

    def close(self) -> None:
        """End it: to the service this client has exited."""
        ...


class MappedWindow:
    """`size` bytes of a file from byte `offset` on, mapped shared into this process.

    `fd` stays the caller's (the window keeps a duplicate). `size` None means up to the
    end of the file. `connection` is closed with the window. `service` and `target` name
    in errors who serves the file. With `file`, the file's resource name, the window
    tells the service over `connection` what is mapped: needed where the service cannot
    look into this process. It counts as mapped from the start, after `dont_need` only
    what is left, after the next safe access all of it again.

    `states`, a descriptor that came with the view, tells what is private where a fault
    does not (the backend memfd): safe accesses look there first and last; the caller's.

    Offsets in method arguments count from the start of the window; `error_offset` in
    errors counts from the start of the file, as everywhere else.

    Raises BadRequest for a range that is unaligned, empty or past the end of the file.
    """

    def __init__(
        self,
        fd: int,
        offset: int = 0,
        size: int | None = None,
        *,
        writable: bool = True,
        connection: Connection | None = None,
        service: str = "guest_memfd",
        target: str = "",
        file: str = "",
        states: int | None = None,
    ) -> None:
        self.service = service
        self.target = target
        self.offset = offset
        self.size = _window_size(self._file_size(fd), offset, size)
        self._connection = connection
        self._stat_due = 0.0
        self._states = None if states is None else HostStates(states)
        self._fd = os.dup(fd)
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            # Anonymous memory aside, the mapping is made by fd: no path, no mount.
            self._map = mmap.mmap(
                self._fd, self.size, flags=mmap.MAP_SHARED, prot=prot, offset=offset
            )
        except BaseException:
            os.close(self._fd)
            raise
        self._array: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        self._file = file
        self._mapped = [(0, 0)]
        self._report([(0, self.size)])

    @property
    def fd(self) -> int:
        """The window's own descriptor of the file, to hand to a broker."""
        self._require_open()
        return self._fd

    @property
    def array(self) -> NDArray[np.uint8]:
        """The memory itself. Touching a page that is refused here is SIGBUS: death."""
        return self._require_open()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._array is None

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Return a copy of `size` bytes (None: up to the end of the window).

        Raises NotFaultable (PAGE_NOT_FAULTABLE, `error_offset` of the first bad page),
        BadRequest for a range outside the window, TransportError for a dead connection.
        """
        start, stop = self._range(offset, size)
        self._report([(0, self.size)])
        copied = bytearray(stop - start)
        scratch = thread_scratch()
        while start < stop:
            got = self._fetch(scratch, start, min(stop, start + SCRATCH_BYTES))
            done = len(copied) - (stop - start)
            os.preadv(scratch, [memoryview(copied)[done : done + got]], 0)
            start += got
        self._look(offset, stop)
        return bytes(copied)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `offset`.

        Pages before the first bad one have been written when this raises; errors are
        those of `read`.
        """
        source = memoryview(data).cast("B")
        start, stop = self._range(offset, len(source))
        self._report([(0, self.size)])
        scratch = thread_scratch()
        while start < stop:
            chunk = min(stop, start + SCRATCH_BYTES) - start
            done = len(source) - (stop - start)
            os.pwrite(scratch, source[done : done + chunk], 0)
            self._put(scratch, start, start + chunk)
            start += chunk
        self._look(offset, stop)

    def fill(self, value: int, offset: int = 0, size: int | None = None) -> None:
        """Write the byte `value` into a range; errors are those of `write`."""
        start, stop = self._range(offset, size)
        self._report([(0, self.size)])
        scratch = thread_scratch()
        os.pwrite(scratch, bytes([value]) * min(SCRATCH_BYTES, stop - start), 0)
        while start < stop:
            end = min(stop, start + SCRATCH_BYTES)
            self._put(scratch, start, end)
            start = end
        self._look(offset, stop)

    def dont_need(self, offset: int = 0, size: int | None = None) -> None:
        """Drop this process's mappings of a range, MADV_DONTNEED; the data stay.

        What RFC_V1 asks of everybody before a conversion to private. `offset` must be a
        multiple of 4096.
        """
        start, stop = self._range(offset, size)
        if start % PAGE_SIZE:
            raise BadRequest(
                Reason.RANGE_UNALIGNED,
                f"offset {start:#x} is no multiple of {PAGE_SIZE}: align it",
                offset=start,
            )
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
            end = -(-stop // PAGE_SIZE) * PAGE_SIZE
            self._report(
                [part for r in self._mapped for part in _outside(r, start, end)]
            )

    def require_alive(self) -> None:
        """Raise TransportError unless somebody still serves the file.

        What was read or written before this returned reached the service's memory, or
        pages that it will write back.
        """
        self._require_connection()
        self._file_size(self._fd)

    def close(self) -> None:
        """Give up pages, file and connection; harmless when repeated.

        The pages are dropped at once. An array (or a slice of one) that somebody still
        refers to keeps the mapping, and with it the file, open until it goes.
        """
        if self._array is None:
            return
        self._array = None
        self._map.madvise(mmap.MADV_DONTNEED)
        try:
            self._map.close()
        except BufferError:
            del self._map  # The last array that refers to it unmaps it.
        os.close(self._fd)
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the bytes in the window."""
        return self.size

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        size = format_size(self.size)
        return f"<{type(self).__name__} {size} at {self.offset:#x} {state}>"

    def _report(self, mapped: list[tuple[int, int]]) -> None:
        """Tell what is mapped now, as starts and stops inside the window."""
        if self._connection is None or not self._file or mapped == self._mapped:
            return
        address = int(self._require_open().ctypes.data)
        self._connection.report_windows(
            [
                {
                    "file": self._file,
                    "offset": self.offset + start,
                    "length": stop - start,
                    "address": address + start,
                }
                for start, stop in mapped
            ]
        )
        self._mapped = mapped

    def _look(self, start: int, stop: int) -> None:
        """Look after an access whether it still counted; cheap enough for each one.

        Without faults, a page that became private meanwhile was zeros, or took what
        nobody gets.
        The end of the broker connection is seen at once. fstat() asks the service,
        30 us each time, so that beside a broker it comes once in STAT_SECONDS.
        """
        self._require_shared(start, stop)
        self._require_connection()
        now = time.monotonic()
        if self._connection is None or now >= self._stat_due:
            self._file_size(self._fd)
            self._stat_due = now + STAT_SECONDS

    def _require_connection(self) -> None:
        self._require_open()
        if self._connection is None or self._connection.alive():
            return
        # Killed, and started again? Then this waits until it is, and what was written
        # meanwhile is kept. Where the connection was given up it fails at once.
        self._file_size(self._fd)
        if not self._connection.wait_alive():
            raise self._dead("closed the broker connection")

    def _fetch(self, scratch: int, start: int, stop: int) -> int:
        """Copy window bytes to the start of `scratch`; return how many."""
        stop = self._require_shared(start, stop)
        try:
            # No local name for the slice: a traceback would keep the mapping alive.
            return os.pwrite(scratch, self._require_open()[start:stop].data, 0)
        except OSError as error:
            self._raise_refused(error, start)
            raise

    def _put(self, scratch: int, start: int, stop: int) -> None:
        """Copy the first bytes of `scratch` into the whole of a window range."""
        self._require_writable()
        done = 0
        while start + done < stop:
            end = self._require_shared(start + done, stop)
            try:
                # As in _fetch: no local name.
                done += os.preadv(
                    scratch, [self._require_open()[start + done : end].data], done
                )
            except OSError as error:
                self._raise_refused(error, start + done)
                raise

    def _require_shared(self, start: int, stop: int) -> int:
        """Return how far a range may be accessed; NotFaultable: not at all.

        Where page states are known; elsewhere the fault says it.
        """
        if self._states is None or start == stop:
            return stop
        first = (self.offset + start) // PAGE_SIZE
        end = -(-(self.offset + stop) // PAGE_SIZE)
        private = self._states.first_private(first, end)
        if private == first:
            raise self._not_faultable(start)
        return stop if private is None else private * PAGE_SIZE - self.offset

    def _require_writable(self) -> None:
        if not self._require_open().flags.writeable:
            raise BadRequest(
                Reason.ARGUMENT_INVALID, "the window is read-only: map it writable"
            )

    def _raise_refused(self, error: OSError, position: int) -> None:
        """Raise what EFAULT at `position` of the window means; else return."""
        if error.errno != errno.EFAULT:
            return
        self.require_alive()
        raise self._not_faultable(position) from error

    def _not_faultable(self, position: int) -> NotFaultable:
        page = (self.offset + position) & -PAGE_SIZE
        return NotFaultable(
            Reason.PAGE_NOT_FAULTABLE,
            f"the page at {page:#x} is private, or past the end of the file: "
            "convert it to shared, or stay inside",
            error_offset=page,
        )

    def _range(self, offset: int, size: int | None) -> tuple[int, int]:
        """Check a range of the window; return its start and stop."""
        self._require_open()
        _require_not_negative(offset, size)
        stop = self.size if size is None else offset + size
        if not offset <= stop <= self.size:
            raise BadRequest(
                Reason.RANGE_PAST_END,
                f"[{offset:#x}, {stop:#x}) is outside the window of "
                f"{format_size(self.size)}: stay inside, or map more",
                offset=offset,
            )
        return offset, stop

    def _require_open(self) -> NDArray[np.uint8]:
        if self._array is None:
            raise ValueError("the window is closed: map it again")
        return self._array

    def _file_size(self, fd: int) -> int:
        try:
            return os.fstat(fd).st_size
        except OSError as error:
            if error.errno not in {errno.ENOTCONN, errno.ECONNABORTED}:
                raise
            raise self._dead("serves its files no more") from error

    def _dead(self, what: str) -> TransportError:
        at = f" at {self.target}" if self.target else ""
        return TransportError(
            f"{self.service}{at} {what}: what was written since may be lost; "
            "look after the service, then open the view again",
            service=self.service,
            target=self.target,
        )


def open_host_view(
    token: str,
    broker_path: str | Path,
    offset: int = 0,
    size: int | None = None,
    *,
    writable: bool = True,
    client: str = "gmem-memory",
    file: str = "",
) -> MappedWindow:
    """Turn what OpenView returned (`token`, `broker_path`) into a mapped window.

    The broker knows this process by a connection of the window's own: closing the
    window ends it. `client` names the process in the service's logs. `file` (the
    inode's resource name) is for services that cannot look into this process: those
    whose GetCapabilities says mapped_source "reported".

    Raises NoSuchObject for a token that was used or is too old, TransportError where
    the broker does not answer, BadRequest as MappedWindow does.
    """
    path = Path(broker_path)
    connection = BrokerClient(path, client, secrets.token_hex(8))
    try:
        fd, *states = connection.take_all(token)
        try:
            return MappedWindow(
                fd,
                offset,
                size,
                writable=writable,
                connection=connection,
                target=str(path),
                file=file,
                states=states[0] if states else None,
            )
        finally:
            fdpass.close_all([fd, *states])
    except BaseException:
        connection.close()
        raise


class AnonymousMemory(MappedWindow):
    """`size` bytes of zeros of our own, for a memslot's userspace side.

    Stands in for mmap(MAP_ANONYMOUS), which no other process can map: a memfd, whose
    `fd` is given to the broker of a service.
    """

    def __init__(self, size: int, *, name: str = "anonymous") -> None:
        """Make and map it; `name` shows in /proc/PID/maps. Raises BadRequest."""
        if size <= 0:
            raise BadRequest(
                Reason.SIZE_INVALID, f"size {size} must be positive", size=size
            )
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            super().__init__(fd, service="memfd", target=name)
        finally:
            os.close(fd)


def _require_not_negative(offset: int, size: int | None) -> None:
    if offset < 0 or (size is not None and size < 0):
        raise BadRequest(
            Reason.RANGE_NEGATIVE,
            f"offset {offset} and size {size} must not be negative",
        )


def _outside(part: tuple[int, int], start: int, stop: int) -> list[tuple[int, int]]:
    """Return what of `part` lies before `start` and from `stop` on."""
    pieces = [(part[0], min(part[1], start)), (max(part[0], stop), part[1])]
    return [(first, last) for first, last in pieces if first < last]


def _window_size(file_size: int, offset: int, size: int | None) -> int:
    """Check a window of a file; return its bytes."""
    if offset % PAGE_SIZE:
        raise BadRequest(
            Reason.RANGE_UNALIGNED,
            f"offset {offset:#x} is no multiple of {PAGE_SIZE}: align it",
            offset=offset,
        )
    _require_not_negative(offset, size)
    size = file_size - offset if size is None else size
    if size == 0:
        raise BadRequest(Reason.RANGE_EMPTY, "an empty window cannot be mapped")
    if offset + size > file_size or size < 0:
        raise BadRequest(
            Reason.RANGE_PAST_END,
            f"[{offset:#x}, {offset + size:#x}) ends past the file of "
            f"{format_size(file_size)}: map less",
            offset=offset,
        )
    return size
