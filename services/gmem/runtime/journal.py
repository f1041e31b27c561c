"""The journal of a service: what must survive kill -9, one transaction per operation.

    journal.record(changes)          by the core's driver, in the step that changed it
    async with journal.request()     around what a request_id asks for: its changes and
                                     its reply become one transaction
    await journal.committed()        everything recorded so far is on the disk

Rows are JSON values by key; None removes a row, and a key that ends in "/" all below
it. Transactions are written in the order in which they were recorded, by one thread
that takes all that is waiting at once (group commit). The first changes of a request
are *held* until its reply is known: they and what was recorded after them wait for it.
It is given in the same or the next turn of the loop, so nobody waits long.

Acknowledge after commit: replies of RPCs, answers to faults and ioctls wait; the
operation itself does not. A journal that cannot be written ends the service: nothing is
acknowledged any more, and `on_failure` hears the sentence.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from gmem.runtime.journal_file import JournalFile, JournalRefusedError
from gmem.uapi.errors import TransportError

__all__ = ["Changes", "Journal", "JournalRefusedError", "Request"]

BATCH_MAX: Final = 256
"""Transactions in one commit."""

Changes: TypeAlias = Mapping[str, Any]

_TMPFS_MAGIC: Final = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True, eq=False)
class _Entry:
    """One transaction that waits for its commit."""

    changes: dict[str, Any]
    held: bool = False
    done: Future[None] = field(default_factory=lambda: _uncancellable(Future()))


class Request:
    """One request under way: the transaction that its first changes began."""

    def __init__(self, journal: Journal) -> None:
        """Begin with nothing recorded."""
        self.journal = journal
        self.entry: _Entry | None = None
        self.ended = False

    async def answer(self, rows: Changes) -> None:
        """Add the rows of its reply to its changes; return when both are committed."""
        self.ended = True
        rows = {**self.journal.collect(), **rows}
        await _ended(self.journal.release(self.entry, rows))


_REQUEST: ContextVar[Request | None] = ContextVar("gmem_journal_request", default=None)


class Journal:
    """An open journal and the thread that writes it; safe from any thread.

    `rows` is what was found at the start, until `loaded()`; `id` names the journal for
    as long as its file lives; `revision` is asked at each commit and stored with it.
    A core whose every call is one step sets `collect`: it is asked for changes when a
    request is answered, and records none itself.
    """

    def __init__(self, path: Path, service: str) -> None:
        """Open or make the file. JournalRefusedError."""
        self.path = path
        self._file = JournalFile(path, service)
        self.rows: dict[str, Any] = self._file.read()
        self.id = self._file.meta.id
        self.first_revision = self._file.meta.revision
        self.is_new = self._file.meta.seq == 0
        self.revision: Callable[[], int] = lambda: self.first_revision
        self.collect: Callable[[], Changes] = dict
        self.on_failure: Callable[[BaseException], None] = lambda _error: None
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: TransportError | None = None
        self._last = _finished()
        self.commits = 0
        self._in_memory = is_in_memory(path)
        self._writing = threading.Lock()
        self._thread = threading.Thread(
            target=self._write_all, name="journal", daemon=True
        )
        if not self._in_memory:
            self._thread.start()

    @property
    def fds(self) -> frozenset[int]:
        """The descriptors that a thread needs to record, beside those of a waker."""
        return self._file.fds if self._in_memory else frozenset()

    def below(self, prefix: str) -> dict[str, Any]:
        """Return the rows found at the start whose keys begin with `prefix`."""
        return {k: row for k, row in self.rows.items() if k.startswith(prefix)}

    def loaded(self) -> None:
        """Let go of what was found at the start: it has been made use of."""
        self.rows = {}

    # Recording.

    def record(self, changes: Changes) -> None:
        """Queue changes, as a part of the request that this context carries out."""
        if not changes:
            return
        request = _REQUEST.get()
        if request is None or request.journal is not self or request.ended:
            self._append(_Entry(dict(changes)))
        elif request.entry is None:
            request.entry = self._append(_Entry(dict(changes), held=True))
        else:
            self._append(_Entry(dict(changes)))

    @contextmanager
    def request(self) -> Iterator[Request]:
        """Hold the first changes recorded inside until `answer`, or the end."""
        request = Request(self)
        token = _REQUEST.set(request)
        try:
            yield request
        finally:
            _REQUEST.reset(token)
            if not request.ended:
                # No reply: what was changed is written all the same.
                request.ended = True
                self.release(request.entry, {})

    def release(self, entry: _Entry | None, rows: Changes) -> Future[None]:
        """Add `rows` to a held transaction, or make one of them; return its end."""
        if entry is None:
            if not rows:
                return _finished()
            return self._append(_Entry(dict(rows))).done
        with self._changed:
            entry.changes.update(rows)
            entry.held = False
            self._changed.notify()
        self._write_here()
        return entry.done

    def _append(self, entry: _Entry) -> _Entry:
        with self._changed:
            refusal = _stopped() if self._closing else self._failure
            if refusal is not None:
                entry.done.set_exception(refusal)
                return entry
            self._queue.append(entry)
            self._last = entry.done
            self._changed.notify()
        self._write_here()
        return entry

    # Waiting.

    async def committed(self) -> None:
        """Return when all that was recorded before is on the disk. TransportError."""
        await _ended(self._last)

    def when_committed(self, done: Callable[[BaseException | None], None]) -> None:
        """Call `done` when all that was recorded before is on the disk.

        At once where it is, else from the writing thread: it must not block.
        """
        self._last.add_done_callback(lambda future: done(future.exception()))

    # Writing.

    def _write_all(self) -> None:
        while batch := self._next_batch():
            if not self._write(batch):
                return

    def _next_batch(self) -> list[_Entry]:
        """Wait for transactions that may be written; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._is_ready())
            return self._taken()

    def _write_here(self) -> None:
        """Write what may be written, unless another thread is at it: then it does."""
        if not self._in_memory:
            return
        # Looked at again after each turn: what came too late for one found the lock
        # taken, and was left to us.
        while self._is_ready() and self._writing.acquire(blocking=False):
            try:
                with self._changed:
                    batch = self._taken()
                if batch:
                    self._write(batch)
            finally:
                self._writing.release()

    def _taken(self) -> list[_Entry]:
        batch: list[_Entry] = []
        while self._is_ready() and len(batch) < BATCH_MAX:
            batch.append(self._queue.popleft())
        return batch

    def _write(self, batch: list[_Entry]) -> bool:
        try:
            self._file.write([e.changes for e in batch], self.revision())
        except sqlite3.Error as error:
            self._fail(batch, error)
            return False
        self.commits += 1
        for entry in batch:
            entry.done.set_result(None)
        return True

    def _is_ready(self) -> bool:
        try:
            return not self._queue[0].held
        except IndexError:
            return False

    def _fail(self, batch: list[_Entry], error: sqlite3.Error) -> None:
        failure = TransportError(
            f"{self._file.path} cannot be written ({error}): the operation may or may "
            "not survive; make room on its disk, then start the service again",
            service="journal",
            target=str(self._file.path),
        )
        with self._changed:
            self._failure = failure
            left = [*batch, *self._queue]
            self._queue.clear()
        for entry in left:
            entry.done.set_exception(failure)
        self.on_failure(failure)

    def close(self) -> None:
        """Write what may be written, and close the file; blocks."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            for entry in self._queue:
                entry.held = False
            self._changed.notify()
        if not self._in_memory:
            self._thread.join()
        with self._writing:
            while batch := self._taken():
                self._write(batch)
            self._file.close()


def is_in_memory(path: Path) -> bool:
    """Tell whether a file lies on tmpfs, which a sync does not wait for."""
    # struct statfs begins with f_type, a word.
    found = (ctypes.c_long * 64)()
    if _libc.statfs(os.fsencode(path), found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(found[0]) == _TMPFS_MAGIC


async def _ended(future: Future[None]) -> None:
    """Return when a commit is over; without a turn of the loop where it is."""
    if future.done():
        future.result()
    else:
        await asyncio.wrap_future(future)


def _stopped() -> TransportError:
    return TransportError(
        "the service was told to stop: ask again when it runs", service="journal"
    )


def _uncancellable(future: Future[None]) -> Future[None]:
    """Mark as running: who waits and goes away must not take the commit along."""
    future.set_running_or_notify_cancel()
    return future


def _finished() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
