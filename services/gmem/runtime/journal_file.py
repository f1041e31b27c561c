"""The file behind a journal: rows by key in SQLite, and proof that all are there.

    rows   key, value, seq (the transaction that wrote it), sum (over the three)
    meta   one row: schema, service, journal id, seq, revision, how many rows, digest

WAL with synchronous=FULL: what `write` has returned from survives kill -9 and a power
cut. SQLite itself notices little damage: it takes a flipped bit inside a value for the
value, and drops a damaged end of its WAL without a word. So each row has a sum, meta
has the exclusive or of all sums, and `<file>-acked` has the number of the last
transaction that anybody was told of: a file that knows fewer has lost some. Whatever
does not agree is refused with one sentence; nothing is guessed.

The file is held by one process (locking_mode=EXCLUSIVE, hence no shared memory beside
it): who can open it knows that the process before has ended.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1
# How long a process that was just killed may take to let go of the file.
LOCKED_SECONDS_MAX: Final = 5.0
_ACKED: Final = struct.Struct("<8sQI")
_MAGIC: Final = b"gmemackd"
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
_TABLES: Final = (
    """CREATE TABLE rows (key TEXT PRIMARY KEY, value BLOB NOT NULL,
    seq INTEGER NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0),
    body TEXT NOT NULL, sum INTEGER NOT NULL)""",
)


class JournalRefusedError(Exception):
    """The journal cannot be used; the text is one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What is true of a journal as a whole; `id` is drawn when it is made."""

    schema: int
    service: str
    id: str
    seq: int = 0
    revision: int = 0
    rows: int = 0
    digest: int = 0

    @property
    def body(self) -> str:
        """The text of the row."""
        # Written at every commit: asdict() would copy each number deeply.
        return json.dumps({name: getattr(self, name) for name in self.__slots__})


class _Transaction:
    """Changes that are written and not committed yet, and what they come to.

    `sums` has the sum of each row that is changed, None for one that is gone; rows
    and digest are those of the whole file with them.
    """

    __slots__ = ("_before", "_db", "digest", "rows", "seq", "sums")

    def __init__(
        self, db: sqlite3.Connection, before: Mapping[str, int], meta: Meta
    ) -> None:
        self._db = db
        self._before = before
        self.seq = meta.seq + 1
        self.rows, self.digest = meta.rows, meta.digest
        self.sums: dict[str, int | None] = {}

    def change(self, key: str, value: object) -> None:
        """Write one row; None removes it, and with a "/" at the end all below it."""
        if key.endswith("/"):
            self._remove_below(key)
        if value is None:
            self._remove(key)
        else:
            self._put(key, _encode(value))

    def _put(self, key: str, data: bytes) -> None:
        total = _row_sum(key, data, self.seq)
        row = (key, data, self.seq, total)
        self._db.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", row)
        self._count(key, total)

    def _remove(self, key: str) -> None:
        # Most rows that a core says are gone never were there.
        if self._known(key) is not None:
            self._db.execute("DELETE FROM rows WHERE key = ?", (key,))
            self._count(key, None)

    def _remove_below(self, prefix: str) -> None:
        # "0" is the character after "/".
        bounds = (prefix, prefix[:-1] + "0")
        where = "FROM rows WHERE key >= ? AND key < ?"
        gone = self._db.execute(f"SELECT key {where}", bounds).fetchall()
        self._db.execute(f"DELETE {where}", bounds)
        for (key,) in gone:
            self._count(key, None)

    def _known(self, key: str) -> int | None:
        return self.sums[key] if key in self.sums else self._before.get(key)

    def _count(self, key: str, total: int | None) -> None:
        before = self._known(key)
        self.rows += (total is not None) - (before is not None)
        self.digest ^= (total or 0) ^ (before or 0)
        self.sums[key] = total


class JournalFile:
    """One open file; not safe for two threads at once."""

    def __init__(self, path: Path, service: str) -> None:
        """Open the journal of `service`, or make it. JournalRefusedError."""
        self.path = path
        self._acked_fd = -1
        # The sum of each row: what it was before need not be read to be replaced.
        self._sums: dict[str, int] = {}
        try:
            self._db = sqlite3.connect(
                path,
                timeout=LOCKED_SECONDS_MAX,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._open(service)
            except BaseException:
                self._close()
                raise
        except sqlite3.OperationalError as error:
            raise JournalRefusedError(_unusable(path, error)) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _open(self, service: str) -> None:
        # In this order: in exclusive mode the WAL has no index in shared memory.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA temp_store = MEMORY")
        # A short one that also takes the lock.
        self._db.execute("BEGIN IMMEDIATE")
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            self._create(service)
        self._db.execute("COMMIT")
        self._require_sound(service, new=not tables)

    def _create(self, service: str) -> None:
        if self._acked_path.exists():
            raise self._damaged("it is empty, and was not")
        for table in _TABLES:
            self._db.execute(table)
        meta = Meta(SCHEMA, service, secrets.token_hex(8))
        values = (meta.body, _sum(meta.body.encode()))
        self._db.execute("INSERT INTO meta VALUES (0, ?, ?)", values)

    # Reading.

    def read(self) -> dict[str, Any]:
        """Return all rows by key, in the order of their transactions."""
        found = self._db.execute("SELECT key, value FROM rows ORDER BY seq, key")
        return {key: _decode(value) for key, value in found}

    def _require_sound(self, service: str, *, new: bool) -> None:
        (verdict,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        self.meta = self._read_meta()
        if self.meta.schema != SCHEMA or self.meta.service != service:
            raise JournalRefusedError(
                f"{self.path} is the journal of {self.meta.service} in version "
                f"{self.meta.schema}, wanted is {service} in version {SCHEMA}: use "
                "another --run-dir, or move the file away to begin anew"
            )
        self._require_all_rows()
        self._require_acked(new=new)

    def _read_meta(self) -> Meta:
        found = self._db.execute("SELECT body, sum FROM meta").fetchone()
        if found is None or _sum(found[0].encode()) != found[1]:
            raise self._damaged("its head has another sum")
        return Meta(**json.loads(found[0]))

    def _require_all_rows(self) -> None:
        digest = 0
        for key, value, seq, total in self._db.execute("SELECT * FROM rows"):
            if _row_sum(key, value, seq) != total:
                raise self._damaged(f"row {key!r} has another sum")
            self._sums[key] = total
            digest ^= total
        number = len(self._sums)
        if (number, digest) != (self.meta.rows, self.meta.digest):
            raise self._damaged(f"{self.meta.rows} rows were written, {number} found")

    def _require_acked(self, *, new: bool) -> None:
        """Refuse a file that lacks what was acknowledged; keep the counter open."""
        exists = self._acked_path.exists()
        if not exists and not new and self.meta.seq > 0:
            raise self._damaged(f"{self._acked_path.name} is missing")
        self._acked_fd = os.open(self._acked_path, os.O_RDWR | os.O_CREAT, 0o600)
        if exists:
            acked = self._read_acked()
            if acked > self.meta.seq:
                raise self._damaged(
                    f"{acked - self.meta.seq} acknowledged transactions are lost"
                )
        self._write_acked()

    def _read_acked(self) -> int:
        data = os.pread(self._acked_fd, _ACKED.size, 0)
        if not data:
            # Killed before its first write.
            return 0
        if len(data) == _ACKED.size:
            magic, seq, crc = _ACKED.unpack(data)
            if magic == _MAGIC and crc == zlib.crc32(data[:-4]):
                return int(seq)
        raise self._damaged(f"{self._acked_path.name} has another sum")

    # Writing.

    def write(self, batches: Iterable[Mapping[str, Any]], revision: int) -> None:
        """Write changes in one transaction: a value by its key, None removes.

        A key that ends in "/" with None removes everything below it. When this returns
        it is on the disk. sqlite3.Error leaves the file as it was.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            transaction = _Transaction(self._db, self._sums, self.meta)
            for changes in batches:
                for key, value in changes.items():
                    transaction.change(key, value)
            meta = self._write_meta(transaction, revision)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._committed(transaction, meta)
        self._write_acked()

    def _write_meta(self, transaction: _Transaction, revision: int) -> Meta:
        meta = Meta(
            self.meta.schema,
            self.meta.service,
            self.meta.id,
            transaction.seq,
            revision,
            transaction.rows,
            transaction.digest,
        )
        body = meta.body
        values = (body, _sum(body.encode()))
        self._db.execute("UPDATE meta SET body = ?, sum = ?", values)
        return meta

    def _committed(self, transaction: _Transaction, meta: Meta) -> None:
        self.meta = meta
        for key, total in transaction.sums.items():
            if total is None:
                self._sums.pop(key, None)
            else:
                self._sums[key] = total

    @property
    def fds(self) -> frozenset[int]:
        """The descriptors that writing needs: of the file, its WAL and its counter."""
        file = str(self.path.resolve())
        fds = {self._acked_fd}
        for entry in Path("/proc/self/fd").iterdir():
            # Names only, and no fstat: that of a view waits for who serves it. Others
            # open and close theirs meanwhile.
            with suppress(OSError):
                if str(entry.readlink()) in {file, f"{file}-wal"}:
                    fds.add(int(entry.name))
        return frozenset(fds)

    def _write_acked(self) -> None:
        # Not synced: after a power cut it may be too low, which proves nothing less.
        head = struct.pack("<8sQ", _MAGIC, self.meta.seq)
        os.pwrite(self._acked_fd, head + struct.pack("<I", zlib.crc32(head)), 0)

    def close(self) -> None:
        """Move everything out of the WAL if the disk has room; let go of the file."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._close()

    def _close(self) -> None:
        self._db.close()
        if self._acked_fd >= 0:
            os.close(self._acked_fd)
            self._acked_fd = -1

    @property
    def _acked_path(self) -> Path:
        return self.path.with_name(self.path.name + "-acked")

    def _damaged(self, what: str) -> JournalRefusedError:
        what = " ".join(what.split())
        return JournalRefusedError(
            f"{self.path} is damaged ({what}) and what it says cannot be trusted: "
            f"move {self.path}* away to begin anew, without its state"
        )


def _unusable(path: Path, error: sqlite3.OperationalError) -> str:
    if "locked" in str(error):
        return f"{path} is used by another process: stop it, or use another --run-dir"
    return f"{path} cannot be used ({error}): see that its directory can be written"


def _encode(value: object) -> bytes:
    if isinstance(value, bytes):
        return b"b" + value
    return b"j" + _ENCODER.encode(value).encode()


def _decode(data: bytes) -> Any:
    return data[1:] if data[:1] == b"b" else json.loads(data[1:])


def _row_sum(key: str, value: bytes, seq: int) -> int:
    return _sum(b"%d %d " % (seq, len(key)) + key.encode() + value)


def _sum(data: bytes) -> int:
    """Return 63 bits, which both SQLite and JSON keep as they are."""
    return int.from_bytes(blake2b(data, digest_size=8).digest()) >> 1
