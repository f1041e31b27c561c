"""A folio that a shared page wants split, and that no vmemmap can be had for."""

from __future__ import annotations

from gmem.guest_memfd.core.effects import Split
from gmem.guest_memfd.core.values import Sigbus, ViewKind
from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.gmem_world import VM, GmemWorld, part


def test_a_folio_that_cannot_be_split_leaves_no_byte_to_the_next() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M, SIZE_2M)
    world.run(world.bind(inode, shared=False, slot=0, size=PAGE_SIZE))
    world.run(world.bind(inode, shared=False, slot=1, offset=PAGE_SIZE))
    world.run(world.get_pfn(inode, 5, slot=1))
    world.write(inode, ViewKind.GUEST, 5, "a secret")
    # A bind that makes a page shared leaves the split to the next fault.
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, shared=True, slot=0, size=PAGE_SIZE))

    world.fail_next(Split, Reason.VMEMMAP_RESTORE_FAILED)
    assert world.run(world.fault(inode, 0)) == Sigbus(Reason.VMEMMAP_RESTORE_FAILED)
    assert inode.statistics().st_blocks == 0
    world.check()

    # The frame goes round: what a guest finds there must not be what was left.
    world.run(world.convert(part(inode, 0), shared=False))
    world.run(world.get_pfn(inode, 5, slot=1))
    assert world.read(inode, ViewKind.GUEST, 5) == 0
