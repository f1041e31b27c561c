"""Accesses of a vCPU, in this process: memfds, no FUSE, a vmm played by the test."""

from __future__ import annotations

import array
import os
from collections.abc import Iterator

import pytest

from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.exits import Access, Exit, MemoryFault
from gmem.vmm.guest import memory as memory_module
from gmem.vmm.guest.memory import Memory, VcpuMemory
from gmem.vmm.guest.messages import Message, Resume
from gmem.vmm.guest.tlb import Tlb, Translation
from gmem.vmm.guest.windows import Window

PAGES = 4
ALL = PgRange(0, PAGES)


class Vmm:
    """Maps frames to window `window`; `exits` are answered with 0."""

    def __init__(self) -> None:
        self.page = memoryview(array.array("Q", [0]))
        self.memory = Memory(Tlb(self.page))
        self.files = [os.memfd_create("window") for _ in range(2)]
        for number, fd in enumerate(self.files):
            os.ftruncate(fd, PAGES * PAGE_SIZE)
            size = PAGES * PAGE_SIZE
            self.memory.windows[number] = Window(fd, base_gfn=0, size=size, offset=0)
        self.window = 0
        self.asked = 0
        self.exits: list[Exit] = []

    def check(self) -> None:
        pass

    def ask(self, gfn: int, npages: int, access: Access, *, write: bool) -> Message:
        self.asked += 1
        found = Translation(self.window, private=bool(self.window), writable=True)
        self.memory.tlb.insert(ALL, found)
        return Resume(0, 0, 0)

    def leave(self, reached: Exit) -> int:
        self.exits.append(reached)
        for fd in self.files:
            os.ftruncate(fd, PAGES * PAGE_SIZE)
        return 0

    def invalidate(self, gfns: PgRange) -> None:
        self.page[0] += 1
        self.memory.tlb.invalidated(self.page[0], 0, gfns)


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    made = Vmm()
    yield made
    made.memory.windows.clear()
    for fd in made.files:
        os.close(fd)


@pytest.fixture
def guest(vmm: Vmm) -> Iterator[VcpuMemory]:
    made = VcpuMemory(vmm.memory, vmm)
    yield made
    made.close()


def read(guest: VcpuMemory, gpa: int, size: int) -> bytes:
    data = bytearray()
    guest.read(gpa, size, Access.BY_ATTRIBUTE, data.extend)
    return bytes(data)


@pytest.mark.parametrize(
    ("dropped", "seen"),
    [(PgRange(1, 2), b"new"), (PgRange(3, 4), b"old")],
)
def test_access_is_repeated_when_its_page_went_away_under_it(
    vmm: Vmm,
    guest: VcpuMemory,
    monkeypatch: pytest.MonkeyPatch,
    dropped: PgRange,
    seen: bytes,
) -> None:
    os.pwrite(vmm.files[0], b"old", PAGE_SIZE)
    os.pwrite(vmm.files[1], b"new", PAGE_SIZE)
    vmm.memory.tlb.insert(PgRange(0, 3), Translation(0, private=False, writable=True))
    fetch = guest._scratch.fetch

    def fetch_and_convert(source: memoryview) -> int:
        copied = fetch(source)
        if vmm.window == 0:
            vmm.window = 1
            vmm.invalidate(dropped)
        return copied

    monkeypatch.setattr(guest._scratch, "fetch", fetch_and_convert)
    assert read(guest, PAGE_SIZE, 3) == seen


def test_store_goes_on_where_a_refused_page_stopped_it(
    vmm: Vmm, guest: VcpuMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "REFUSED_SECONDS", 0.0)
    data = os.urandom(2 * PAGE_SIZE)
    os.ftruncate(vmm.files[0], PAGE_SIZE)
    pieces: list[int] = []

    def produce(target: memoryview) -> None:
        pieces.append(len(target))
        target[:] = data

    guest.write(100, len(data), Access.BY_ATTRIBUTE, produce)

    assert vmm.exits == [MemoryFault(0, PAGE_SIZE)]
    assert pieces == [len(data)]
    assert os.pread(vmm.files[0], len(data), 100) == data


def test_one_kind_of_access_does_not_use_the_other_kinds_mapping(
    vmm: Vmm, guest: VcpuMemory
) -> None:
    read(guest, 0, 1)
    read(guest, 1, 1)
    assert vmm.asked == 1
    vmm.window = 1
    guest.read(0, 1, Access.PRIVATE, lambda piece: None)
    assert vmm.asked == 2
    guest.read(0, 1, Access.PRIVATE, lambda piece: None)
    assert vmm.asked == 2


def test_window_that_was_unmapped_is_asked_for_again(
    vmm: Vmm, guest: VcpuMemory
) -> None:
    os.pwrite(vmm.files[1], b"x", 0)
    read(guest, 0, 1)
    del vmm.memory.windows[0]
    vmm.window = 1
    assert read(guest, 0, 1) == b"x"


def test_access_that_never_succeeds_is_bounded_in_time(
    vmm: Vmm, guest: VcpuMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "INVALIDATION_SECONDS_MAX", 0.05)
    os.ftruncate(vmm.files[0], 0)
    vmm.page[0] = 1
    vmm.memory.tlb.invalidated(1, 1, PgRange(3, 4))
    assert read(guest, 0, 1) == b"\0"
    assert vmm.exits == [MemoryFault(0, 0)]
