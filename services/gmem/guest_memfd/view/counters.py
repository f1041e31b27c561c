"""What a view session has done, counted without a lock on the way of a request."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class ViewStatistics:
    """A snapshot; requests and answers since the session began.

    `parked` counts READs that had to wait, `parked_now` those that wait at this
    moment. `writes_to_hole` and `writes_to_closed` stay 0 unless a client uses
    write(2), or something is wrong.
    """

    requests: int = 0
    reads: int = 0
    pages_read: int = 0
    reads_refused: int = 0
    writes: int = 0
    pages_written: int = 0
    writes_refused: int = 0
    writes_to_hole: int = 0
    writes_to_closed: int = 0
    parked: int = 0
    parked_now: int = 0
    host_faults: int = 0
    timeouts: int = 0
    killed: int = 0
    opens: int = 0
    releases: int = 0
    opens_refused: int = 0
    fallocates: int = 0
    ioctls: int = 0
    invals: int = 0
    syncs: int = 0
    write_backs: int = 0
    quiesces: int = 0
    quiesce_rounds: int = 0
    faulty_handlers: int = 0


_NAMES = frozenset(field.name for field in fields(ViewStatistics))


class Counters:
    """A table of counts per thread; `total` adds them up.

    A count of another thread may be missed by a moment, none is ever lost: only its
    own thread changes a table.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._tables: list[Counter[str]] = []
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count `count` more of `name`, a field of ViewStatistics."""
        table: Counter[str] | None = getattr(self._own, "table", None)
        if table is None:
            table = self._own.table = Counter(dict.fromkeys(_NAMES, 0))
            with self._lock:
                self._tables.append(table)
        table[name] += count

    def total(self, *, parked_now: int = 0) -> ViewStatistics:
        """Return the sums over all threads."""
        with self._lock:
            tables = list(self._tables)
        sums = {name: sum(table[name] for table in tables) for name in _NAMES}
        sums["parked_now"] = parked_now
        return ViewStatistics(**sums)
