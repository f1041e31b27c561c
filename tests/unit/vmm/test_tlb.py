"""The guest process's own memory of stage 2, and its socket's frames."""

from __future__ import annotations

import array
import threading
from typing import Any

import pytest

from gmem.uapi.pages import PgRange
from gmem.vmm.guest import tlb as tlb_module
from gmem.vmm.guest.messages import Decoder, Left, MapWindow, Message, RunProgram
from gmem.vmm.guest.tlb import HISTORY_MAX, Tlb, Translation

SHARED = Translation(window=1, private=False, writable=True)
PAGES = PgRange(10, 20)


class SequencePage:
    """The shared page, played by an array."""

    def __init__(self) -> None:
        self.memory = memoryview(array.array("Q", [0]))
        self.tlb = Tlb(self.memory)

    def invalidate(self, seq: int, gfns: PgRange, in_progress: int = 0) -> None:
        self.memory[0] = seq
        self.tlb.invalidated(seq, in_progress, gfns)


@pytest.fixture
def page() -> SequencePage:
    made = SequencePage()
    made.tlb.insert(PAGES, SHARED)
    return made


def test_lookup_tells_how_far_it_holds(page: SequencePage) -> None:
    hit = page.tlb.lookup(PgRange(12, 100))
    assert hit is not None
    assert (hit.gfns, hit.translation) == (PgRange(12, 20), SHARED)
    assert page.tlb.lookup(PgRange(20, 21)) is None
    page.tlb.drop(PgRange(12, 13))
    assert page.tlb.lookup(PgRange(12, 100)) is None


def test_neighbours_of_one_window_are_one_entry(page: SequencePage) -> None:
    page.tlb.insert(PgRange(20, 30), SHARED)
    hit = page.tlb.lookup(PgRange(10, 100))
    assert hit is not None
    assert hit.gfns == PgRange(10, 30)


@pytest.mark.parametrize(
    ("dropped", "stale"),
    [
        (PgRange(10, 11), True),
        (PgRange(19, 30), True),
        (PgRange(20, 30), False),
        (PgRange(12, 12), False),
    ],
)
def test_access_is_stale_when_its_frames_were_dropped_meanwhile(
    page: SequencePage, dropped: PgRange, stale: bool
) -> None:
    hit = page.tlb.lookup(PAGES)
    assert hit is not None
    assert not page.tlb.is_stale(hit)
    page.invalidate(1, dropped)
    assert page.tlb.is_stale(hit) is stale


def test_after_too_many_invalidations_nothing_is_trusted(page: SequencePage) -> None:
    hit = page.tlb.lookup(PAGES)
    assert hit is not None
    for seq in range(1, HISTORY_MAX + 2):
        page.invalidate(seq, PgRange(50, 51))
    assert page.tlb.is_stale(hit)


def test_lookup_waits_for_the_notice_that_the_page_tells_of(page: SequencePage) -> None:
    found: list[Any] = []
    page.memory[0] = 1
    looking = threading.Thread(target=lambda: found.append(page.tlb.lookup(PAGES)))
    looking.start()
    looking.join(0.1)
    assert looking.is_alive()
    page.invalidate(1, PAGES)
    looking.join(10)
    assert found == [None]


def test_notice_that_never_comes_is_a_bug(
    page: SequencePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tlb_module, "SYNC_SECONDS_MAX", 0.01)
    page.memory[0] = 1
    with pytest.raises(AssertionError, match="notice 1"):
        page.tlb.lookup(PAGES)


def test_wait_ends_with_the_invalidation(page: SequencePage) -> None:
    page.invalidate(1, PAGES, in_progress=1)
    assert not page.tlb.wait_past(1, 0.01)
    page.invalidate(2, PgRange(10, 10))
    assert page.tlb.wait_past(1, 0)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_frames_survive_any_cut(piece: int) -> None:
    said: list[Message] = [
        MapWindow(1, 2, 3, 4),
        RunProgram(0, 7, b"\0" * 1000),
        Left(
            0, 7, 3, "Mmio", {"gpa": 1 << 63, "size": 8, "is_write": True}, b"12345678"
        ),
        Left(0, 7, 4, "Hypercall", {"nr": 12, "args": (1, 2**64 - 1)}),
    ]
    stream = b"".join(message.encode() for message in said)
    heard: list[Message] = []
    decoder = Decoder()
    for start in range(0, len(stream), piece):
        heard += decoder.feed(stream[start : start + piece])
    assert [type(message) for message in heard] == [type(m) for m in said]
    assert heard[:3] == said[:3]
    last = heard[3]
    assert isinstance(last, Left)
    assert last.values["args"] == [1, 2**64 - 1]
