"""Races that a series is known for, as one schedule each, played in every lineage."""

from __future__ import annotations

from typing import Any

import pytest

from gmem.effects import Op
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.values import GuestPage, Mapped
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, Gfn, PgOff
from tests.sim.host import VMM_TARGET, Host
from tests.sim.options import Options
from tests.sim.world import Answer, Outcome, World

VM = "hosts/h/vms/a"
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
RACES = {Lineage.RFC_V1}
"""Where kvm_gmem_get_pfn() takes no lock, so that it meets a folio being truncated."""


class Schedule:
    """A host without faults; its VMM answers an invalidation when it is told to."""

    def __init__(self, lineage: Lineage, *, shared: bool = False) -> None:
        self.world = World(0, Options())
        self.host = Host(self.world, HostMemory([512]))
        self.held: list[Answer] = []
        self.told: list[fx.InvalidateBegin] = []
        self.world.performers.remote[fx.InvalidateBegin] = self._silent
        core = self.host.guest_memfd
        options = InodeOptions(
            size=4 * PAGE_SIZE,
            page_size=PAGE_SIZE,
            lineage=lineage,
            vm=VM,
            support_shared=shared and lineage is Lineage.RFC_V2,
        )
        number = self.finished(core.create(options))
        self.inode: Inode = core.inode(number)
        bind = core.bind(
            number,
            VM,
            0,
            base_gfn=Gfn(0),
            offset=0,
            size=4 * PAGE_SIZE,
            host_faultable=shared,
            vmm_target=VMM_TARGET,
        )
        self.finished(bind)

    def _silent(self, effect: fx.InvalidateBegin, answer: Answer) -> None:
        self.told.append(effect)
        self.held.append(answer)

    def started(self, op: Op[Any]) -> list[Outcome]:
        """Begin an operation and let everything happen that can; its end, if any."""
        ends: list[Outcome] = []
        self.world.start("scheduled", op, ends.append)
        self.settle()
        return ends

    def finished(self, op: Op[Any]) -> Any:
        (end,) = self.started(op)
        assert end.error is None, end.error
        return end.value

    def settle(self) -> None:
        while self.world.step():
            pass

    def vmm_answers(self) -> None:
        while self.held:
            self.held.pop(0)(Outcome())
            self.settle()

    def get_pfn(self) -> Op[Any]:
        return self.host.guest_memfd.get_pfn(self.inode.number, VM, 0, Gfn(1))

    def host_fault(self) -> Op[Any]:
        return self.host.guest_memfd.host_fault(self.inode.number, PgOff(1))

    def punch(self) -> Op[None]:
        size = self.inode.i_size
        return self.host.guest_memfd.fallocate(self.inode.number, PUNCH, 0, size)


@pytest.mark.parametrize("lineage", Lineage)
def test_a_guest_fault_meets_a_folio_that_is_being_truncated(lineage: Lineage) -> None:
    """In the first series it is handed the folio; since then it waits for the lock."""
    play = Schedule(lineage)
    page = play.finished(play.get_pfn())
    assert isinstance(page, GuestPage)

    punched = play.started(play.punch())
    assert (punched, len(play.held)) == ([], 1)
    assert not play.inode.invalidate_lock.idle
    fault = play.started(play.get_pfn())
    if lineage in RACES:
        # Handed out behind the back of the invalidation that has begun.
        assert fault == [Outcome(page)]
        assert play.inode.bindings.handed_out_in(play.inode.whole)
    else:
        assert fault == []

    play.vmm_answers()
    # The series frees the folio under the guest. Here its VM is told once more before.
    (end,) = punched
    assert end.error is None
    assert len(play.told) == (2 if lineage in RACES else 1)
    (end,) = fault
    assert isinstance(end.value, GuestPage)
    index = play.inode.filemap.get(1)
    is_there = index is not None and index.folio.pfn == end.value.pfn
    assert is_there is (lineage not in RACES)
    play.host.guest_memfd.check_all()


@pytest.mark.parametrize("lineage", [Lineage.RFC_V1, Lineage.RFC_V2])
def test_a_host_fault_waits_for_a_truncation_in_every_lineage(lineage: Lineage) -> None:
    play = Schedule(lineage, shared=True)
    play.finished(play.get_pfn())
    punched = play.started(play.punch())
    fault = play.started(play.host_fault())
    assert (punched, fault) == ([], [])
    play.vmm_answers()
    assert isinstance(fault[0].value, Mapped)
    assert punched[0].error is None


@pytest.mark.parametrize("lineage", Lineage)
def test_a_fault_that_began_first_is_told_of_the_truncation(lineage: Lineage) -> None:
    """Whoever wins: no VM keeps what was freed."""
    play = Schedule(lineage)
    asked: list[Answer] = []
    allocate = play.world.performers.remote[fx.Allocate]

    def slow(effect: fx.Allocate, answer: Answer) -> None:
        allocate(effect, lambda outcome: asked.append(lambda _: answer(outcome)))

    play.world.performers.remote[fx.Allocate] = slow
    fault = play.started(play.get_pfn())
    punched = play.started(play.punch())
    # The hole that the fault is about to fill is none of the punch's business where
    # nothing is locked; else it comes after the fault.
    assert bool(punched) is (lineage in RACES)
    asked.pop()(Outcome())
    play.settle()
    play.vmm_answers()
    assert isinstance(fault[0].value, GuestPage)
    assert punched[0].error is None
    present = play.inode.filemap.is_present(1)
    handed = bool(play.inode.bindings.handed_out_in(play.inode.whole))
    assert present is handed is (lineage in RACES)
    play.host.guest_memfd.check_all()
