"""What an exit says of an access by attribute whose page the file could not give."""

from __future__ import annotations

import pytest

from gmem.uapi.errors import KernelError, Reason, make_error
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE
from gmem.vmm.core.effects import GetPfn
from gmem.vmm.core.exits import Access, MemoryFault
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.set_region import set_user_memory_region2
from tests.support.gmem_world import GmemWorld
from tests.support.vmm_world import World, new_vm

GMEM = 4
REGION = Region(0, GMEM, 0, PAGE_SIZE, Userspace("descriptors/1", 0), "1")


@pytest.mark.parametrize("shared", [True, False])
def test_the_file_says_which_kind_of_page_it_could_not_give(*, shared: bool) -> None:
    gmem = GmemWorld()
    inode = gmem.created_v2(PAGE_SIZE, shared=shared)
    hog = gmem.memory.reserve(PAGE_SIZE, 1, owner="hog")
    while gmem.memory.base.statistics()[0].free_base_pages:
        gmem.memory.allocate(hog, nr_folios=1 << 16)

    with pytest.raises(KernelError) as refused:
        gmem.run(gmem.get_pfn(inode, 0))
    assert refused.value.reason is Reason.BASE_MEMORY_EMPTY
    assert refused.value.numbers["private"] == int(not shared)


@pytest.mark.parametrize("private", [0, 1])
def test_an_exit_without_memory_says_what_the_access_was(private: int) -> None:
    vm = new_vm(lineage=Lineage.RFC_V2)
    World(in_place=True).run(set_user_memory_region2(vm, REGION))
    refusal = make_error(Reason.BASE_MEMORY_EMPTY, "none left")
    refusal.numbers["private"] = private

    world = World(refuse={GetPfn: refusal})
    found = world.run(fault(vm, Fault(0, 1, Access.BY_ATTRIBUTE, write=False)))
    assert isinstance(found, MemoryFault)
    assert (found.errno, found.private) == (12, bool(private))
