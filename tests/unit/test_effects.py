"""Locks as plain data: readers and one writer, first come first served."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmem.effects import (
    Acquire,
    Effect,
    Lock,
    Mode,
    Op,
    Release,
    Ticket,
    holding,
    perform,
)

SHARED, EXCLUSIVE = Mode.SHARED, Mode.EXCLUSIVE


@dataclass(frozen=True, slots=True)
class Ask(Effect[int]):
    number: int


def test_perform_suspends_until_the_reply_is_sent() -> None:
    def op() -> Op[int]:
        return (yield from perform(Ask(1))) + 1

    running = op()
    assert running.send(None) == Ask(1)
    with pytest.raises(StopIteration) as stop:
        running.send(41)
    assert stop.value.value == 42


def test_an_effect_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Ask(1).number = 2  # type: ignore[misc]  # the test


def test_readers_share_and_a_writer_is_alone() -> None:
    lock = Lock("inode")
    first, second = lock.request(SHARED), lock.request(SHARED)
    writer = lock.request(EXCLUSIVE)
    assert (first.granted, second.granted, writer.granted) == (True, True, False)
    assert lock.release(first) == []
    assert lock.release(second) == [writer]
    assert not lock.request(EXCLUSIVE).granted
    assert not lock.request(SHARED).granted


def test_a_reader_after_a_waiting_writer_waits_behind_it() -> None:
    lock = Lock("inode")
    reader, writer = lock.request(SHARED), lock.request(EXCLUSIVE)
    late = lock.request(SHARED)
    assert not late.granted
    assert lock.release(reader) == [writer]
    assert lock.release(writer) == [late]


def test_abandoning_a_waiting_writer_lets_the_readers_behind_it_in() -> None:
    lock = Lock("inode")
    holder, writer = lock.request(SHARED), lock.request(EXCLUSIVE)
    late = lock.request(SHARED)
    assert lock.abandon(writer) == [late]
    lock.release(holder)
    lock.release(late)
    assert lock.idle


def test_a_ticket_is_released_once_and_abandoned_only_while_it_waits() -> None:
    lock = Lock("inode")
    ticket = lock.request(EXCLUSIVE)
    waiting = lock.request(EXCLUSIVE)
    with pytest.raises(AssertionError):
        lock.abandon(ticket)
    with pytest.raises(AssertionError):
        lock.release(waiting)
    lock.release(ticket)
    with pytest.raises(ValueError, match="not in list"):
        lock.release(ticket)


@pytest.mark.parametrize("fails", [False, True])
def test_holding_releases_however_the_body_ends(fails: bool) -> None:
    lock = Lock("inode")

    def body() -> Op[str]:
        yield from perform(Ask(1))
        if fails:
            raise OSError("refused")
        return "done"

    running = holding(lock, EXCLUSIVE, body())
    assert running.send(None) == Acquire(lock, EXCLUSIVE)
    ticket = lock.request(EXCLUSIVE)
    assert running.send(ticket) == Ask(1)
    assert running.send(None) == Release(lock, ticket)
    with pytest.raises(OSError if fails else StopIteration):
        running.send(None)


Steps = st.lists(
    st.tuples(st.sampled_from(["shared", "exclusive", "end"]), st.integers(0, 9))
)


@given(Steps)
def test_no_history_breaks_the_lock(steps: list[tuple[str, int]]) -> None:
    """Writers are alone, tickets are granted in the order of asking, none is lost."""
    lock = Lock("inode")
    live: list[Ticket] = []
    order: list[Ticket] = []
    for word, number in steps:
        if word != "end":
            ticket = lock.request(Mode(word))
            live.append(ticket)
            order.append(ticket)
        elif live:
            ticket = live.pop(number % len(live))
            (lock.release if ticket.granted else lock.abandon)(ticket)
            order.remove(ticket)
        held = [ticket for ticket in order if ticket.granted]
        assert order[: len(held)] == held
        assert len(held) == len(lock.holders)
        if any(ticket.mode is EXCLUSIVE for ticket in held):
            assert len(held) == 1
        assert bool(held) == bool(order)
        # Whoever waits has a reason to.
        if len(held) < len(order):
            assert EXCLUSIVE in {held[0].mode, order[len(held)].mode}
    assert lock.idle == (not live)
