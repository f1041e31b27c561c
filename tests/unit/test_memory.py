"""gmem.memory: windows that refuse instead of kill.

A memfd that is truncated under its mapping refuses pages as a guest_memfd does: SIGBUS
for an instruction, EFAULT for a system call. Real views are in tests/cluster.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmem.memory import SCRATCH_BYTES, AnonymousMemory, MappedWindow
from gmem.runtime.scratch import thread_scratch
from gmem.uapi.errors import BadRequest, NotFaultable, Reason, TransportError
from gmem.uapi.pages import PAGE_SIZE

MIB = 1 << 20


class FakeConnection:
    """A broker connection whose other end can be closed."""

    def __init__(self) -> None:
        self.is_alive = True
        self.comes_back = False
        self.closed = False
        self.reported: list[tuple[str, int, int]] | None = None
        self.addresses: list[int] = []

    def alive(self) -> bool:
        return self.is_alive

    def wait_alive(self) -> bool:
        self.is_alive = self.comes_back
        return self.is_alive

    def report_windows(self, windows: list[dict[str, Any]]) -> None:
        self.reported = [(w["file"], w["offset"], w["length"]) for w in windows]
        self.addresses = [w["address"] for w in windows]

    def close(self) -> None:
        self.closed = True


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_window_is_the_file() -> None:
    with memfd(4 * PAGE_SIZE) as fd, MappedWindow(fd, PAGE_SIZE, PAGE_SIZE) as window:
        window.array[:3] = [1, 2, 3]
        assert os.pread(fd, 4, PAGE_SIZE) == b"\1\2\3\0"
        os.pwrite(fd, b"xyz", PAGE_SIZE + 8)
        assert bytes(window.array[8:11]) == b"xyz"
        assert window.array.dtype == np.uint8
        assert len(window) == PAGE_SIZE


@pytest.mark.parametrize("size", [1, PAGE_SIZE, 2 * SCRATCH_BYTES + 777])
def test_read_returns_what_write_wrote(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    with AnonymousMemory(4 * MIB) as window:
        window.write(33, data)
        assert window.read(33, size) == data
        assert window.read(0, 33) == bytes(33)
        assert os.pread(window.fd, size, 33) == data


def test_fill_writes_the_range_and_nothing_else() -> None:
    with AnonymousMemory(4 * MIB) as window:
        window.fill(0x5A, 100, 2 * MIB + 5)
        assert window.read(100, 2 * MIB + 5) == b"\x5a" * (2 * MIB + 5)
        assert window.read(0, 100) == bytes(100)
        assert window.read(2 * MIB + 105, 100) == bytes(100)


Access = Callable[[MappedWindow], object]


@pytest.mark.parametrize(
    ("access", "bad_page"),
    [
        (lambda w: w.read(0, 3 * PAGE_SIZE), 1),
        (lambda w: w.read(PAGE_SIZE - 10, 20), 1),
        (lambda w: w.read(2 * PAGE_SIZE + 5, 1), 2),
        (lambda w: w.write(PAGE_SIZE - 1, b"ab"), 1),
        (lambda w: w.write(2 * PAGE_SIZE, b"a"), 2),
        (lambda w: w.fill(1), 1),
    ],
    ids=["read", "read-crossing", "read-inside", "write-crossing", "write", "fill"],
)
def test_a_refused_page_raises_with_its_offset(access: Access, bad_page: int) -> None:
    # The window starts at page 2 of the file, of which only page 2 stays.
    with memfd(6 * PAGE_SIZE) as fd, MappedWindow(fd, 2 * PAGE_SIZE) as window:
        os.ftruncate(fd, 3 * PAGE_SIZE)
        with pytest.raises(NotFaultable) as caught:
            access(window)
        assert caught.value.reason is Reason.PAGE_NOT_FAULTABLE
        assert caught.value.numbers["error_offset"] == (2 + bad_page) * PAGE_SIZE
        assert hex((2 + bad_page) * PAGE_SIZE) in str(caught.value)


def test_a_refusal_does_not_stick() -> None:
    with memfd(2 * PAGE_SIZE) as fd, MappedWindow(fd) as window:
        os.ftruncate(fd, PAGE_SIZE)
        with pytest.raises(NotFaultable):
            window.read(PAGE_SIZE, 1)
        os.ftruncate(fd, 2 * PAGE_SIZE)
        assert window.read(PAGE_SIZE, 1) == b"\0"


def test_raw_access_to_a_refused_page_kills() -> None:
    code = (
        "import os, sys\n"
        "from gmem.memory import MappedWindow\n"
        "fd = os.memfd_create('x'); os.ftruncate(fd, 8192)\n"
        "window = MappedWindow(fd); os.ftruncate(fd, 4096)\n"
        "print(window.array[0], flush=True); print(window.array[4096])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGBUS, "0\n")


def test_dont_need_drops_mappings_and_keeps_data() -> None:
    with AnonymousMemory(MIB) as window:
        window.fill(7)
        with MappedWindow(window.fd) as other:
            assert other.read(0, 4) == b"\7\7\7\7"
            before = rss_kib(window)
            assert before >= 1024
            window.dont_need(PAGE_SIZE, MIB - PAGE_SIZE)
            other.dont_need()
            assert rss_kib(window) <= before - 1020
            assert window.read(MIB - 1, 1) == b"\7"


def mappings_of(fd: int) -> list[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if f" {os.fstat(fd).st_ino} " in line]


def rss_kib(window: MappedWindow) -> int:
    """Rss of every mapping of the window's file in this process, in KiB."""
    return mapped_kib(file_of(window))


def file_of(window: MappedWindow) -> str:
    return str(Path(f"/proc/self/fd/{window.fd}").readlink())


def mapped_kib(name: str) -> int:
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = name in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize(
    ("access", "reason"),
    [
        (lambda w: w.read(-1, 1), Reason.RANGE_NEGATIVE),
        (lambda w: w.read(0, -1), Reason.RANGE_NEGATIVE),
        (lambda w: w.read(2**63, 1), Reason.RANGE_PAST_END),
        (lambda w: w.read(PAGE_SIZE, 1), Reason.RANGE_PAST_END),
        (lambda w: w.write(PAGE_SIZE - 1, b"ab"), Reason.RANGE_PAST_END),
        (lambda w: w.fill(0, PAGE_SIZE + 1), Reason.RANGE_PAST_END),
        (lambda w: w.dont_need(1), Reason.RANGE_UNALIGNED),
    ],
)
def test_a_bad_range_is_refused_and_changes_nothing(
    access: Access, reason: Reason
) -> None:
    with AnonymousMemory(PAGE_SIZE) as window:
        window.fill(9)
        with pytest.raises(BadRequest) as caught:
            access(window)
        assert caught.value.reason is reason
        assert window.read() == b"\t" * PAGE_SIZE


@pytest.mark.parametrize(
    ("offset", "size", "reason"),
    [
        (1, None, Reason.RANGE_UNALIGNED),
        (-PAGE_SIZE, None, Reason.RANGE_NEGATIVE),
        (0, -1, Reason.RANGE_NEGATIVE),
        (0, 0, Reason.RANGE_EMPTY),
        (4 * PAGE_SIZE, None, Reason.RANGE_EMPTY),
        (8 * PAGE_SIZE, None, Reason.RANGE_PAST_END),
        (0, 5 * PAGE_SIZE, Reason.RANGE_PAST_END),
        (2**63 - PAGE_SIZE, PAGE_SIZE, Reason.RANGE_PAST_END),
    ],
)
def test_a_bad_window_is_refused(offset: int, size: int | None, reason: Reason) -> None:
    with memfd(4 * PAGE_SIZE) as fd:
        before = descriptors()
        with pytest.raises(BadRequest) as caught:
            MappedWindow(fd, offset, size)
        assert caught.value.reason is reason
        assert descriptors() == before


def test_anonymous_memory_of_no_size_is_refused() -> None:
    with pytest.raises(BadRequest) as caught:
        AnonymousMemory(0)
    assert caught.value.reason is Reason.SIZE_INVALID


def test_a_closed_window_keeps_nothing() -> None:
    connection = FakeConnection()
    with memfd(MIB) as fd:
        before = descriptors()
        with MappedWindow(fd, connection=connection) as window:
            window.fill(1)
        window.close()
        assert window.closed
        assert connection.closed
        # The scratch file of this thread stays.
        assert descriptors() <= before + 1
        with pytest.raises(ValueError, match="closed"):
            window.read(0, 1)


def test_an_array_outlives_its_window_without_its_pages() -> None:
    with memfd(MIB) as fd:
        window = MappedWindow(fd)
        array = window.array[:16]
        window.fill(3)
        name = file_of(window)
        assert mapped_kib(name) >= 1024
        window.close()
        assert mapped_kib(name) == 0
        assert array[0] == 3
        del array
        gc.collect()
        assert not mappings_of(fd)


def test_a_refusal_that_is_kept_keeps_no_mapping() -> None:
    with memfd(2 * PAGE_SIZE) as fd:
        window = MappedWindow(fd)
        os.ftruncate(fd, PAGE_SIZE)
        errors = []
        for access in (window.read, lambda: window.fill(1)):
            with pytest.raises(NotFaultable) as caught:
                access()
            errors.append(caught.value)
        window.close()
        assert errors
        assert not mappings_of(fd)


def test_a_window_with_a_file_name_reports_what_is_mapped() -> None:
    connection = FakeConnection()
    page = PAGE_SIZE
    with (
        memfd(8 * page) as fd,
        MappedWindow(fd, 2 * page, connection=connection, file="f") as window,
    ):
        assert connection.reported == [("f", 2 * page, 6 * page)]
        first = connection.addresses[0]
        assert first == window.array.ctypes.data
        window.dont_need(page, 1)
        assert connection.reported == [("f", 2 * page, page), ("f", 4 * page, 4 * page)]
        assert connection.addresses == [first, first + 2 * page]
        window.dont_need(3 * page, page)
        assert len(connection.reported) == 3
        window.dont_need()
        assert connection.reported == []
        window.read(0, 1)
        assert connection.reported == [("f", 2 * page, 6 * page)]


def test_a_window_without_a_file_name_reports_nothing() -> None:
    connection = FakeConnection()
    with memfd(PAGE_SIZE) as fd, MappedWindow(fd, connection=connection) as window:
        window.dont_need()
        assert connection.reported is None


def test_a_dead_connection_is_told_with_the_service_that_died() -> None:
    connection = FakeConnection()
    with (
        memfd(2 * PAGE_SIZE) as fd,
        MappedWindow(fd, connection=connection, target="/run/x.broker") as window,
    ):
        window.write(0, b"heard")
        connection.is_alive = False
        for access in (lambda: window.read(0, 1), lambda: window.write(0, b"lost")):
            with pytest.raises(TransportError, match=r"guest_memfd at /run/x\.broker"):
                access()
        # A page that a dead service refuses is the service's fault, not the page's.
        os.ftruncate(fd, PAGE_SIZE)
        with pytest.raises(TransportError) as caught:
            window.read(PAGE_SIZE, 1)
        assert caught.value.service == "guest_memfd"


def test_a_file_that_nobody_serves_is_a_dead_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def enotconn(fd: int) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with AnonymousMemory(PAGE_SIZE) as window:
        monkeypatch.setattr("os.fstat", enotconn)
        with pytest.raises(TransportError, match="serves its files no more"):
            window.read(0, 1)
        monkeypatch.undo()


def test_a_read_only_window_refuses_writes() -> None:
    with memfd(PAGE_SIZE) as fd, MappedWindow(fd, writable=False) as window:
        assert window.read(0, 1) == b"\0"
        with pytest.raises(ValueError, match="read-only"):
            window.array[0] = 1
        with pytest.raises(BadRequest, match="read-only"):
            window.write(0, b"x")
        assert window.read(0, 1) == b"\0"


def test_threads_do_not_share_a_scratch_file() -> None:
    found: list[int] = []
    barrier = threading.Barrier(2)

    def look() -> None:
        found.append(thread_scratch())
        barrier.wait()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


def test_importing_it_brings_no_grpc_and_no_loop() -> None:
    code = (
        "import sys, gmem.memory; "
        "sys.exit(' '.join({'grpc', 'asyncio', 'google'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
