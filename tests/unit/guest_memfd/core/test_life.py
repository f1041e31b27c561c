"""Create, bind, close, evict: a reservation lives exactly as long as its inode."""

from __future__ import annotations

import dataclasses

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import InodeOptions
from gmem.guest_memfd.core.references import HOLDS_MAX
from gmem.guest_memfd.core.values import Binding, HoldKind, ViewKind
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, Gfn, PgRange
from tests.support.gmem_world import EIO, VM, GmemWorld, part, refused, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIZES = pytest.mark.parametrize(
    "page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G], ids=["4K", "2M", "1G"]
)


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
def test_reporting_rows_g0_to_g4(page_size: int) -> None:
    world = GmemWorld()
    base = world.snapshot()

    def pool() -> tuple[int, int]:
        now = world.memory.statistics().pool(page_size)
        then = base.memory.pool(page_size)
        free = now.free_huge_pages - then.free_huge_pages
        return free, now.resv_huge_pages - then.resv_huge_pages

    inode = world.create(page_size, page_size)
    assert pool() == (0, 1)
    world.run(world.core.fallocate(inode.number, 1, 0, page_size))
    assert pool() == (-1, 0)
    assert inode.statistics().st_blocks == page_size // 512
    assert inode.statistics().st_blksize == page_size
    world.run(world.core.fallocate(inode.number, 3, 0, page_size))
    assert pool() == (0, 1)
    world.run(world.core.close(inode.number))
    assert world.snapshot() == base
    world.check()


@SIZES
def test_teardown_of_a_used_inode_leaves_no_trace(page_size: int) -> None:
    world = GmemWorld()
    base = world.snapshot()
    inode = world.bound(2 * page_size, page_size)
    world.write(inode, HOST, 0, "payload")
    world.check()

    world.run(world.core.close(inode.number))

    assert world.snapshot() == base
    assert world.asked(fx.RemoveInode) == [fx.RemoveInode(inode.number)]
    with refused(world, Reason.INODE_UNKNOWN):
        world.run(world.core.close(inode.number))


def test_two_inodes_have_numbers_of_their_own() -> None:
    world = GmemWorld()
    one, two = world.create(PAGE_SIZE), world.create(2 * PAGE_SIZE)
    assert (one.number, two.number) == (1, 2)
    assert [s.i_size for s in world.core.statistics()] == [PAGE_SIZE, 2 * PAGE_SIZE]
    world.run(world.core.close(1))
    assert world.create(PAGE_SIZE).number == 3


def test_create_takes_the_reservation_back_when_there_is_no_table() -> None:
    world = GmemWorld()
    world.fail_next(fx.AddInode, Reason.FDS_EXHAUSTED)
    with refused(world, Reason.FDS_EXHAUSTED):
        world.run(world.core.create(InodeOptions(size=SIZE_1G, page_size=SIZE_1G)))


def test_an_open_view_keeps_the_inode() -> None:
    world = GmemWorld()
    base = world.snapshot()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.core.check_open_view(inode.number, HOST, "")
    world.core.view_opened(inode.number, HOST)
    world.write(inode, HOST, 0, "a")

    world.run(world.core.close(inode.number))

    assert inode.statistics().host_views_open == 1
    assert inode.statistics().bindings == ()
    assert world.read(inode, HOST, 0) == "a"
    with refused(world, Reason.FD_UNKNOWN):
        world.core.check_open_view(inode.number, HOST, "")
    with refused(world, Reason.INODE_UNKNOWN):
        world.run(world.core.close(inode.number))
    with refused(world, Reason.FD_UNKNOWN):
        world.run(world.bind(inode))

    world.run(world.core.view_released(inode.number, HOST))
    assert world.snapshot() == base


def test_guest_views_are_for_bound_vms() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M)
    for vm in ("", VM):
        with refused(world, Reason.TOKEN_DENIED):
            world.core.check_open_view(inode.number, GUEST, vm)
    world.run(world.bind(inode))
    world.core.check_open_view(inode.number, GUEST, VM)
    with refused(world, Reason.FD_UNKNOWN):
        world.core.check_open_view(9, HOST, "")


def test_folios_outlive_the_file_until_the_last_hold_goes() -> None:
    world = GmemWorld()
    base = world.snapshot()
    inode = world.bound(SIZE_2M, SIZE_2M)
    pin = world.core.pin(part(inode, 3), HoldKind.PIN, holder="nic", client="dev")
    hold = world.run(pin)
    world.run(world.core.close(inode.number))
    assert inode.statistics().split_folios == 1

    world.run(world.core.unpin(hold))

    assert world.snapshot() == base
    with refused(world, Reason.HOLDER_UNKNOWN):
        world.run(world.core.unpin(hold))


def test_a_client_that_dies_gives_everything_back() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M)
    for client in ("dev", "dev", "other"):
        kind = HoldKind.PLAIN
        world.run(world.core.pin(part(inode, 3), kind, holder="nic", client=client))

    world.run(world.core.client_gone("dev"))

    assert [hold.client for hold in inode.statistics().holds] == ["other"]
    world.run(world.core.client_gone("dev"))


def test_two_ends_of_one_hold_are_one() -> None:
    """UnpinPages and the end of the client's connection may meet."""
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    for page in (0, 512):
        pin = world.core.pin(part(inode, page), HoldKind.PIN, holder="n", client="dev")
        world.run(pin)
    world.run(world.core.fallocate(inode.number, 3, 0, 2 * SIZE_2M))
    going = world.task(world.core.client_gone("dev"))
    going.run_until(fx.Free)
    world.run(world.core.unpin(2))
    going.finish()
    assert inode.statistics().holds == ()
    assert inode.statistics().orphaned_folios == 0
    world.check()


def test_holds_are_limited() -> None:
    world = GmemWorld()
    inode = world.bound(PAGE_SIZE)
    for _ in range(HOLDS_MAX):
        world.run(world.core.pin(whole(inode), HoldKind.PIN, holder="n", client="c"))
    with refused(world, Reason.LIMIT_REACHED):
        world.run(world.core.pin(whole(inode), HoldKind.PIN, holder="n", client="c"))


def test_evict_finishes_what_it_can_and_says_what_failed() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_2M))
    world.fail_next(fx.InvalidateView, Reason.OBJECT_IN_USE)
    with pytest.raises(KernelError) as caught:
        world.run(world.core.close(inode.number))
    assert caught.value.reason is Reason.OBJECT_IN_USE
    assert world.core.numbers == []
    assert world.memory.reservations() == ()
    assert world.memory.statistics().pool(SIZE_2M).free_huge_pages == 16


def test_close_zaps_what_was_handed_out_and_only_that() -> None:
    world = GmemWorld()
    inode = world.create(4 * SIZE_2M, SIZE_2M)
    for slot in range(2):
        offset = 2 * slot * SIZE_2M
        bind = world.bind(
            inode, slot=slot, offset=offset, size=2 * SIZE_2M, shared=False
        )
        world.run(bind)
    world.run(world.get_pfn(inode, 1024 + 7, slot=1))

    world.run(world.core.close(inode.number))

    gfns = PgRange(0x100000 + 1024, 0x100000 + 1536)
    assert world.asked(fx.InvalidateBegin) == [
        fx.InvalidateBegin(VM, f"unix:{VM}", gfns)
    ]
    assert world.asked(fx.InvalidateEnd) == [fx.InvalidateEnd(VM, f"unix:{VM}", gfns)]


def test_a_guest_fault_during_close_is_handed_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.get_pfn(inode, 0))
    fault = world.task(world.get_pfn(inode, 512))
    fault.run_until(fx.Allocate)
    closing = world.task(world.core.close(inode.number))
    closing.run_until(fx.InvalidateBegin)

    with pytest.raises(KernelError) as caught:
        fault.finish()
    assert caught.value.reason is Reason.BINDING_MISSING
    closing.finish()
    assert world.core.numbers == []
    assert world.memory.reservations() == ()


def test_the_last_user_evicts() -> None:
    world = GmemWorld()
    base = world.snapshot()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    fault = world.task(world.get_pfn(inode, 0))
    fault.run_until(fx.Allocate)
    world.run(world.core.close(inode.number))
    assert world.core.numbers == [inode.number]
    with pytest.raises(KernelError):
        fault.finish()
    assert world.snapshot() == base


# Binding.


def test_nothing_is_faultable_before_the_first_bind() -> None:
    world = GmemWorld()
    inode = world.create(SIZE_2M)
    assert world.read(inode, HOST, 0) == EIO
    assert inode.statistics().shared_pages == 0


@SIZES
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_rebinding_resets_faultability(page_size: int, shared: bool) -> None:
    world = GmemWorld()
    inode = world.bound(2 * page_size, page_size, shared=shared)
    world.run(world.convert(part(inode, 0), shared=not shared))
    world.run(world.core.unbind(inode.number, VM, 0))
    assert inode.statistics().nr_fragments > 1

    world.run(world.bind(inode, shared=shared))

    pages = 2 * page_size // PAGE_SIZE
    assert inode.statistics().shared_pages == (pages if shared else 0)
    assert inode.statistics().nr_fragments == 1
    world.check()


def test_bind_keeps_contents_and_reset_views() -> None:
    world = GmemWorld()
    inode = world.bound(2 * PAGE_SIZE)
    world.write(inode, HOST, 0, "kept")
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, shared=False))
    assert world.read(inode, HOST, 0) == EIO
    assert world.read(inode, GUEST, 0) == "kept"


def test_sharing_by_bind_splits_at_the_next_fault() -> None:
    world = GmemWorld()
    inode = world.bound(2 * SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, 2 * SIZE_2M))
    world.run(world.core.unbind(inode.number, VM, 0))

    world.run(world.bind(inode, size=PAGE_SIZE))
    assert inode.statistics().split_folios == 0
    world.check()

    assert world.read(inode, HOST, 0) == 0
    assert inode.statistics().split_folios == 1
    assert inode.statistics().whole_folios == 1
    world.check()


def test_a_folio_that_a_fault_cannot_split_leaves_the_inode() -> None:
    """kvm_gmem_maybe_split_folio() removes it from the filemap."""
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, size=PAGE_SIZE))
    world.fail_next(fx.Split, Reason.VMEMMAP_RESTORE_FAILED)

    assert world.read(inode, HOST, 0) == EIO

    assert inode.statistics().st_blocks == 0
    world.check()
    assert world.read(inode, HOST, 0) == 0
    world.check()


def test_a_conversion_splits_what_bind_left_whole() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, size=PAGE_SIZE))
    world.run(world.convert(part(inode, 9), shared=True))
    assert inode.statistics().split_folios == 1
    world.check()
    assert world.read(inode, HOST, 9) == 0
    assert len(world.asked(fx.Split)) == 1
    world.check()


def test_what_bind_left_whole_may_become_private_again_as_it_is() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE_2M))
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, size=PAGE_SIZE))
    world.run(world.convert(whole(inode), shared=False))
    world.check()
    assert world.run(world.get_pfn(inode, 0)).order == 9
    assert world.asked(fx.Split) == []
    world.check()


def test_a_series_whose_bind_leaves_faultability_alone() -> None:
    world = GmemWorld()
    inode = world.create(PAGE_SIZE)
    inode.rules = dataclasses.replace(inode.rules, bind_sets_faultability=False)
    world.run(world.bind(inode))
    assert inode.statistics().shared_pages == 0
    world.check()


def test_a_bind_that_waited_until_the_file_was_closed() -> None:
    world = GmemWorld()
    inode = world.bound(SIZE_2M, SIZE_2M)
    world.core.view_opened(inode.number, HOST)
    world.write(inode, HOST, 0, "a")
    world.run(world.core.unbind(inode.number, VM, 0))
    punch = world.task(world.core.fallocate(inode.number, 3, 0, SIZE_2M))
    punch.run_until(fx.Free)
    bind = world.task(world.bind(inode))
    bind.run_until_blocked()
    close = world.task(world.core.close(inode.number))
    punch.finish()
    with pytest.raises(KernelError) as caught:
        bind.finish()
    assert caught.value.reason is Reason.FD_UNKNOWN
    close.finish()
    world.check()


def test_bind_checks_in_the_kernels_order_and_changes_nothing() -> None:
    world = GmemWorld()
    inode = world.bound(4 * PAGE_SIZE, shared=False)
    with refused(world, Reason.BINDING_FOREIGN_VM):
        world.run(world.bind(inode, vm="hosts/h/vms/b", slot=0))
    with refused(world, Reason.BINDING_OVERLAP):
        world.run(world.bind(inode, slot=1, offset=3 * PAGE_SIZE))
    world.run(world.core.unbind(inode.number, VM, 0))
    world.run(world.bind(inode, size=PAGE_SIZE))
    with refused(world, Reason.BINDING_OVERLAP):
        world.run(world.bind(inode, offset=PAGE_SIZE))
    with refused(world, Reason.BINDING_MISSING):
        world.run(world.core.unbind(inode.number, VM, 1))
    with refused(world, Reason.FD_UNKNOWN):
        op = world.core.bind(
            9,
            VM,
            0,
            base_gfn=Gfn(0),
            offset=0,
            size=PAGE_SIZE,
            host_faultable=True,
            vmm_target="",
        )
        world.run(op)


def test_the_first_vm_to_bind_owns_an_inode_without_one() -> None:
    world = GmemWorld()
    inode = world.create(2 * PAGE_SIZE, vm="")
    world.run(world.bind(inode, size=PAGE_SIZE))
    assert inode.statistics().vm == VM
    with refused(world, Reason.BINDING_FOREIGN_VM):
        op = world.bind(inode, vm="hosts/h/vms/b", slot=1, offset=PAGE_SIZE)
        world.run(op)


def test_a_bind_that_cannot_close_the_view_is_undone() -> None:
    world = GmemWorld()
    inode = world.create(PAGE_SIZE, vm="")
    world.run(world.bind(inode, vm=VM))
    world.run(world.core.unbind(inode.number, VM, 0))
    world.fail_next(fx.InvalidateView, Reason.OBJECT_IN_USE)
    with refused(world, Reason.OBJECT_IN_USE):
        world.run(world.bind(inode, shared=False))


def test_a_binding_translates_both_ways() -> None:
    binding = Binding(
        VM, 0, Gfn(100), PgRange(4, 8), host_faultable=True, vmm_target=""
    )
    assert [binding.pgoff_of(Gfn(gfn)) for gfn in binding.gfns] == [4, 5, 6, 7]
    assert binding.gfns_of(PgRange(5, 7)) == PgRange(101, 103)
    with pytest.raises(AssertionError):
        binding.pgoff_of(Gfn(104))
