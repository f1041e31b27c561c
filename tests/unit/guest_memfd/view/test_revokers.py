"""Threads with a table of descriptors of their own."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gmem.guest_memfd.view import revokers
from gmem.guest_memfd.view.revokers import STANDARD_STREAMS, Revokers, is_bare
from gmem.runtime.drive import wake_up_fd
from gmem.runtime.journal import Journal, is_in_memory
from gmem.uapi.errors import InUse


@contextmanager
def running(number: int, *keep: int) -> Iterator[Revokers]:
    threads = Revokers(number, keep)
    try:
        yield threads
    finally:
        threads.stop(10)


def own_descriptors() -> set[int]:
    """What the calling thread has open; the directory that it reads is not one."""
    return {
        fd
        for fd in (int(entry.name) for entry in Path("/proc/thread-self/fd").iterdir())
        if Path(f"/proc/thread-self/fd/{fd}").exists()
    }


def test_only_what_is_kept_stays_open_and_only_there() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, running(2, theirs.fileno()) as threads:
        assert threads.run(own_descriptors) == STANDARD_STREAMS | {theirs.fileno()}
        assert {ours.fileno(), theirs.fileno()} <= own_descriptors()


def test_a_socket_whose_owner_ends_is_at_its_end_while_a_revoker_sleeps() -> None:
    ours, theirs = socket.socketpair()
    asleep, wake = threading.Event(), threading.Event()

    def sleep() -> bool:
        asleep.set()
        return wake.wait(60)

    with ours, running(1) as threads:
        sleeping = threads.submit(sleep)
        assert asleep.wait(60)
        theirs.close()
        ours.settimeout(60)
        assert ours.recv(1) == b""
        wake.set()
        assert sleeping.result(60)


def test_who_may_sleep_calls_in_place_and_others_have_it_called() -> None:
    with running(1) as threads:
        assert not is_bare()
        assert threads.run(is_bare)
        # The only thread there is would wait for itself, if it asked another.
        assert threads.run(lambda: threads.run(threading.get_ident))


def test_an_error_goes_to_whoever_asked() -> None:
    with running(1) as threads, pytest.raises(ZeroDivisionError):
        threads.run(divmod, 1, 0)


async def test_the_loop_can_be_woken_from_there() -> None:
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    with running(1, wake_up_fd()) as threads:
        threads.submit(loop.call_soon_threadsafe, heard.set)
        await asyncio.wait_for(heard.wait(), 60)


def test_a_journal_in_memory_is_written_from_there() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "test.db"
        if not is_in_memory(path.parent):
            pytest.skip("needs a tmpfs at /dev/shm")
        journal = Journal(path, "test")
        # More than the WAL holds before its pages are moved into the file.
        rows = {f"rows/{number}": ["x" * 500] for number in range(3000)}
        with running(1, *journal.fds) as threads:
            for key, row in rows.items():
                threads.run(journal.record, {key: row})
        assert journal.commits == len(rows)
        journal.close()
        again = Journal(path, "test")
        assert again.rows == rows
        again.close()
    assert not is_in_memory(Path("/proc"))


def test_after_the_end_nothing_is_revoked() -> None:
    with running(1) as threads:
        pass
    with pytest.raises(InUse, match="the views are ending"):
        threads.run(int)


def test_a_kernel_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_first: int, _last: int) -> None:
        raise PermissionError(1, "close_range: Operation not permitted")

    monkeypatch.setattr(revokers, "_close_range", refuse)
    with pytest.raises(InUse, match="close_range"):
        Revokers(2, ())
