"""What was committed is there after kill -9; what is damaged is refused in words."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from gmem.api.host_allocator.v1.host_allocator_pb2 import ReserveResponse
from gmem.api.types.v1.types_pb2 import RequestId
from gmem.runtime import replies as replies_module
from gmem.runtime.journal import Journal, JournalRefusedError, is_in_memory
from gmem.runtime.replies import Replies
from gmem.uapi.errors import BadRequest, Exhausted, Reason, TransportError
from gmem.uapi.lineage import Lineage

SEED = 7
REPOSITORY = Path(__file__).parents[3]
# Writes one row after the other, and says so of each after its commit.
WRITER = """
import asyncio, sys
from pathlib import Path
from gmem.runtime.journal import Journal

async def main():
    journal = Journal(Path(sys.argv[1]), "test")
    number = int(sys.argv[2])
    while True:
        number += 1
        journal.record({"last": number, f"rows/{number % 50}": [number] * 20})
        await journal.committed()
        print(number, flush=True)

asyncio.run(main())
"""


SHM = Path("/dev/shm")
WHERE = ("disk", "memory")
both = pytest.mark.parametrize("path", WHERE, indirect=True)
"""A thread writes on a disk; in memory whoever records does."""


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """In memory unless a test says otherwise: a disk's syncs take their time."""
    if getattr(request, "param", "memory") == "disk" or not is_in_memory(SHM):
        yield tmp_path / "test.db"
        return
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        yield Path(directory) / "test.db"


@pytest.fixture
def opened(path: Path) -> Iterator[list[Journal]]:
    """Journals to be closed."""
    journals: list[Journal] = []
    yield journals
    for journal in journals:
        journal.close()


def open_(path: Path, opened: list[Journal]) -> Journal:
    journal = Journal(path, "test")
    opened.append(journal)
    return journal


def wait(journal: Journal) -> None:
    journal._last.result(timeout=30)


def write(path: Path, *transactions: dict[str, Any]) -> None:
    journal = Journal(path, "test")
    for changes in transactions:
        journal.record(changes)
    wait(journal)
    journal.close()


def crashed(path: Path, into: Path, *transactions: dict[str, Any]) -> Path:
    """Write, and return a copy as kill -9 leaves it: with its WAL."""
    journal = Journal(path, "test")
    for changes in transactions:
        journal.record(changes)
        wait(journal)
    into.mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, into)
    journal.close()
    return into / path.name


@both
def test_rows_are_there_again_with_the_revision_and_the_name(
    path: Path, opened: list[Journal]
) -> None:
    first = Journal(path, "test")
    assert first.is_new
    assert first.rows == {}
    first.revision = lambda: 12
    first.record({"a": 1, "b/1": [1, "x", None], "b/2": {"k": True}})
    first.record({"a": None, "c": b"\0bytes"})
    first.close()
    again = open_(path, opened)
    assert again.rows == {"b/1": [1, "x", None], "b/2": {"k": True}, "c": b"\0bytes"}
    assert again.below("b/") == {"b/1": [1, "x", None], "b/2": {"k": True}}
    assert (again.id, again.first_revision, again.is_new) == (first.id, 12, False)
    again.loaded()
    assert again.rows == {}


@both
def test_a_key_with_a_slash_removes_all_below_it_and_nothing_else(
    path: Path, opened: list[Journal]
) -> None:
    write(path, {"a": 1, "a/": 2, "a/1": 3, "a/1/2": 4, "a0": 5, "a.": 6}, {"a/": None})
    assert open_(path, opened).rows == {"a": 1, "a0": 5, "a.": 6}


@both
def test_transactions_that_wait_are_one_commit(
    path: Path, opened: list[Journal]
) -> None:
    journal = open_(path, opened)
    with journal.request() as request:
        journal.record({"first": 1})
        for number in range(200):
            threading.Thread(target=journal.record, args=({f"n/{number}": 1},)).start()
        while len(journal._queue) < 201:
            time.sleep(0.001)
        assert not journal._last.done(), "the first one is held until its reply"
        commits = journal.commits
        journal.release(request.entry, {"reply": 1})
        request.ended = True
    wait(journal)
    assert journal.commits == commits + 1


@both
async def test_a_request_and_its_reply_are_one_transaction(path: Path) -> None:
    journal = Journal(path, "test")
    with journal.request() as request:
        journal.record({"state": 1})
        journal.record({"later": 1})
        await asyncio.sleep(0.02)
        assert journal.commits == 0, "nothing is written before the reply is known"
        await request.answer({"reply": 1})
        assert journal.commits == 1
    with journal.request():
        journal.record({"without": 1})
    await journal.committed()
    journal.close()
    with sqlite3.connect(path) as db:
        seqs = dict(db.execute("SELECT key, seq FROM rows").fetchall())
    db.close()
    assert seqs["state"] == seqs["reply"] <= seqs["later"] < seqs["without"]


@both
async def test_who_waits_for_a_commit_and_goes_away_does_not_take_it_along(
    path: Path,
) -> None:
    with closing(Journal(path, "test")) as journal:
        for number in range(20):
            with journal.request() as request:
                journal.record({"a": number})
                answer = asyncio.create_task(request.answer({"reply": number}))
                await asyncio.sleep(0)
                answer.cancel()
                with suppress(asyncio.CancelledError):
                    await answer
        await asyncio.wait_for(journal.committed(), 10)
    with closing(Journal(path, "test")) as journal:
        assert journal.rows == {"a": 19, "reply": 19}


@both
def test_listeners_hear_of_the_commit_of_what_was_before(
    path: Path, opened: list[Journal]
) -> None:
    journal, heard = open_(path, opened), threading.Event()
    journal.record({"a": 1})
    journal.when_committed(lambda error: heard.set() if error is None else None)
    assert heard.wait(30)
    assert journal.commits >= 1


def test_one_process_has_it_and_another_is_told(
    path: Path, opened: list[Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_(path, opened)
    monkeypatch.setattr("gmem.runtime.journal_file.LOCKED_SECONDS_MAX", 0.1)
    with pytest.raises(JournalRefusedError, match="used by another process"):
        Journal(path, "test")


def test_the_journal_of_another_service_is_refused(path: Path) -> None:
    write(path, {"a": 1})
    with pytest.raises(JournalRefusedError, match=r"of test in version 1.*wanted is v"):
        Journal(path, "vmm")


@both
def test_a_disk_without_room_fails_what_waits_and_tells_the_service(
    path: Path, opened: list[Journal]
) -> None:
    journal, failures = open_(path, opened), list[BaseException]()
    journal.on_failure = failures.append
    journal.record({"kept": 1})
    wait(journal)
    journal._file._db.execute("PRAGMA max_page_count = 1")
    journal.record({"big": "x" * 100_000})
    with pytest.raises(TransportError, match=r"cannot be written .*full"):
        wait(journal)
    journal.record({"later": 1})
    with pytest.raises(TransportError, match="make room"):
        asyncio.run(journal.committed())
    assert len(failures) == 1
    journal.close()
    assert open_(path, opened).rows == {"kept": 1}


def same_or_refused(path: Path, expected: dict[str, Any]) -> bool:
    """Open a damaged file; tell whether it was refused, else it is whole."""
    try:
        journal = Journal(path, "test")
    except JournalRefusedError as error:
        sentence = str(error)
    else:
        rows = journal.rows
        journal.close()
        assert rows == expected, "silently wrong"
        return False
    assert "\n" not in sentence
    assert str(path) in sentence
    return True


def damaged(source: Path, into: Path) -> Path:
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(source.parent, into)
    return into / source.name


TRANSACTIONS = [{f"k/{n}": [n] * 40, f"k/{n - 3}": None, "last": n} for n in range(30)]
EXPECTED: dict[str, Any] = {f"k/{n}": [n] * 40 for n in (27, 28, 29)} | {"last": 29}


@pytest.mark.parametrize("suffix", ["", "-wal", "-acked"])
def test_a_flipped_bit_is_harmless_or_refused(path: Path, suffix: str) -> None:
    chance = random.Random(SEED)
    source = crashed(path, path.parent / "crashed", *TRANSACTIONS)
    size = source.with_name(source.name + suffix).stat().st_size
    refusals = 0
    for _ in range(60):
        copy = damaged(source, path.parent / "damaged")
        file = copy.with_name(copy.name + suffix)
        data = bytearray(file.read_bytes())
        data[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        refusals += same_or_refused(copy, EXPECTED)
    assert refusals > (0 if suffix else -1)


@pytest.mark.parametrize("suffix", ["", "-wal", "-acked"])
def test_a_file_that_was_cut_short_is_refused(path: Path, suffix: str) -> None:
    chance = random.Random(SEED)
    write(path, *TRANSACTIONS)  # also in the main file
    source = crashed(path, path.parent / "crashed", {"last": 29})
    size = source.with_name(source.name + suffix).stat().st_size
    refusals = 0
    for length in [0, *(chance.randrange(size) for _ in range(20))]:
        copy = damaged(source, path.parent / "damaged")
        with copy.with_name(copy.name + suffix).open("r+b") as file:
            file.truncate(length)
        refusals += same_or_refused(copy, EXPECTED)
    assert refusals >= 10


def test_a_flipped_bit_of_a_closed_journal_is_harmless_or_refused(path: Path) -> None:
    chance = random.Random(SEED)
    (path.parent / "closed").mkdir()
    source = path.parent / "closed" / path.name
    write(source, *TRANSACTIONS)
    refusals = 0
    for _ in range(150):
        copy = damaged(source, path.parent / "damaged")
        data = bytearray(copy.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        copy.write_bytes(data)
        refusals += same_or_refused(copy, EXPECTED)
    assert refusals >= 5


@pytest.mark.parametrize("suffix", ["-wal", "-acked"])
def test_a_file_that_is_missing_is_refused(path: Path, suffix: str) -> None:
    source = crashed(path, path.parent / "crashed", *TRANSACTIONS)
    source.with_name(source.name + suffix).unlink()
    with pytest.raises(JournalRefusedError, match=r"lost|missing|was not"):
        Journal(source, "test")


@both
def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    chance = random.Random(SEED)
    last = 0
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(last)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        said = [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        journal = Journal(path, "test")
        assert journal.rows["last"] in range(max(said, default=0), 1 << 30)
        last = journal.rows["last"]
        assert journal.rows[f"rows/{last % 50}"] == [last] * 20
        journal.close()


@pytest.mark.parametrize("path", ["disk"], indirect=True)
def test_what_a_commit_costs(path: Path, opened: list[Journal]) -> None:
    journal = open_(path, opened)
    started, number = time.perf_counter(), 300
    for n in range(number):
        journal.record({f"live/{n}": [0, n, "whole"], "pool": n})
        wait(journal)
    alone = (time.perf_counter() - started) / number
    started = time.perf_counter()
    for n in range(number * 10):
        journal.record({f"live/{n}": [0, n, "whole"], "pool": n})
    wait(journal)
    together = (time.perf_counter() - started) / number / 10
    print(
        f"journal: {alone * 1e6:.0f} us a transaction alone, {together * 1e6:.0f} us "
        f"in groups ({journal.commits - number} commits for {number * 10})"
    )
    assert journal.commits < number + number * 10 / 5, "no group was made"
    assert alone < 0.1


# Replies.


def request_id(number: object = 1) -> RequestId:
    return RequestId(client="a/b", incarnation="%", id=str(number))


async def never() -> ReserveResponse:
    raise AssertionError("carried out a second time")


@both
async def test_replies_and_refusals_survive_a_restart(path: Path) -> None:
    journal = Journal(path, "test")
    replies = Replies(journal)

    async def answered() -> ReserveResponse:
        journal.record({"state": 1})
        return ReserveResponse(handle=5, revision=3)

    async def refused() -> ReserveResponse:
        raise Exhausted(
            Reason.POOL_EMPTY, "no page", lineage=Lineage.RFC_V1, free=0, who="x"
        )

    async def unknown() -> ReserveResponse:
        raise TransportError("gone", service="host_allocator")

    await replies.once(request_id(1), b"body", answered)
    with pytest.raises(Exhausted):
        await replies.once(request_id(2), b"body", refused)
    with pytest.raises(TransportError):
        await replies.once(request_id(3), b"body", unknown)
    journal.close()

    journal = Journal(path, "test")
    replies = Replies(journal)
    for _time in range(2):
        reply = await replies.once(request_id(1), b"body", never)
        assert reply == ReserveResponse(handle=5, revision=3)
        with pytest.raises(Exhausted) as caught:
            await replies.once(request_id(2), b"body", never)
        assert caught.value.numbers == {"free": 0, "who": "x"}
        assert caught.value.lineage is Lineage.RFC_V1
    with pytest.raises(BadRequest) as reused:
        await replies.once(request_id(1), b"other", never)
    assert reused.value.reason is Reason.REQUEST_ID_REUSED
    assert (await replies.once(request_id(3), b"body", answered)).handle == 5
    journal.close()


async def test_stored_replies_are_bounded_as_those_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies_module, "REPLIES_PER_CLIENT_MAX", 4)
    monkeypatch.setattr(replies_module, "CLIENTS_MAX", 2)

    async def answer() -> ReserveResponse:
        return ReserveResponse(handle=1)

    journal = Journal(path, "test")
    replies = Replies(journal)
    for client in ("a", "a/b", "c"):
        for number in range(9):
            name = RequestId(client=client, incarnation="i", id=str(number))
            await replies.once(name, b"", answer)
    journal.close()
    journal = Journal(path, "test")
    names = sorted((row["client"], row["id"]) for row in journal.rows.values())
    kept = [str(number) for number in range(5, 9)]
    assert names == [(c, n) for c in ("a/b", "c") for n in kept]
    journal.close()
