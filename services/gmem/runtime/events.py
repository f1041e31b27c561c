"""What changed, in order: the revision of a service and its Watch streams.

Each change makes the revision one larger. The last HISTORY_MAX events are kept; a
watcher that asks for older ones, or falls behind them, is told to read the state anew.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncGenerator

from gmem.api.types.v1.types_pb2 import Event
from gmem.uapi.errors import InUse, Reason

HISTORY_MAX = 4096
# Events in one message of a Watch stream.
BATCH_MAX = 256
# A quiet stream says this often how far it is.
PROGRESS_SECONDS = 1.0


class EventLog:
    """The changes of one service; `record` is safe from any thread."""

    def __init__(self, *, progress_seconds: float = PROGRESS_SECONDS) -> None:
        """Start at revision 0 with nothing recorded."""
        self._progress_seconds = progress_seconds
        self._mutex = threading.Lock()
        self._revision = 0
        self._history: deque[Event] = deque(maxlen=HISTORY_MAX)
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._closed = False

    @property
    def revision(self) -> int:
        """The revision of the last change; 0 before the first."""
        return self._revision

    def record(self, kind: str, name: str, **details: object) -> int:
        """Add one change of the object `name`; return the revision it made."""
        assert kind, "an empty kind is a progress notification"
        words = {key: str(value) for key, value in details.items()}
        with self._mutex:
            self._revision += 1
            event = Event(revision=self._revision, kind=kind, name=name, details=words)
            self._history.append(event)
        self._wake()
        return event.revision

    def go_on_from(self, revision: int) -> None:
        """Begin above what an earlier life of the service may have told.

        It told changes before they were on the disk, and some may be undone: their
        revisions are not used again.
        """
        with self._mutex:
            assert not self._history, "changes were recorded already"
            self._revision = revision + HISTORY_MAX

    async def watch(self, start_revision: int = 0) -> AsyncGenerator[list[Event]]:
        """Yield lists of changes from `start_revision` on; 0 means from now on.

        The first list, and one each progress interval without a change, is a single
        event with an empty kind: the revision up to which all was told. Ends when the
        log is closed. REVISION_COMPACTED where a change is no longer kept.
        """
        following = start_revision or self._revision + 1
        self._require_kept(following)
        changed = asyncio.Event()
        self._watchers[changed] = asyncio.get_running_loop()
        try:
            yield [Event(revision=following - 1)]
            while not self._closed:
                changed.clear()
                batch = self._since(following)
                if batch:
                    following = batch[-1].revision + 1
                    yield batch
                elif not await self._waited(changed):
                    yield [Event(revision=following - 1)]
        finally:
            del self._watchers[changed]

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        self._wake()

    def _since(self, revision: int) -> list[Event]:
        with self._mutex:
            self._require_kept(revision)
            skip = len(self._history) - (self._revision + 1 - revision)
            return list(itertools.islice(self._history, skip, skip + BATCH_MAX))

    def _require_kept(self, revision: int) -> None:
        oldest = self._revision + 1 - len(self._history)
        if not oldest <= revision <= self._revision + 1:
            raise InUse(
                Reason.REVISION_COMPACTED,
                f"revision {revision} is not kept; read the state, watch from there",
                oldest=oldest,
                revision=self._revision,
            )

    async def _waited(self, changed: asyncio.Event) -> bool:
        try:
            await asyncio.wait_for(changed.wait(), self._progress_seconds)
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        for changed, loop in list(self._watchers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)
