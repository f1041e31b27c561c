"""Leases on holds: kept alive, run out, overtaken by a renewal."""

from __future__ import annotations

import pytest

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.values import HoldKind
from gmem.uapi.errors import NoSuchObject, Reason
from gmem.uapi.pages import PAGE_SIZE
from tests.support.gmem_world import GmemWorld, part, refused, whole


def lease(world: GmemWorld, inode: Inode, page: int = 0, ttl_ms: int = 1000) -> int:
    pin = world.core.pin(
        part(inode, page), HoldKind.PIN, holder="nic", client="dev", ttl_ms=ttl_ms
    )
    return world.run(pin)


def two_pages() -> tuple[GmemWorld, Inode]:
    world = GmemWorld()
    return world, world.bound(2 * PAGE_SIZE)


def test_a_lease_begins_with_its_hold_and_ends_with_it() -> None:
    world, inode = two_pages()
    hold = lease(world, inode)
    assert world.clock.leases == {hold: fx.ArmLease(hold, "dev", 1000, 0)}
    assert [h.ttl_ms for h in inode.statistics().holds] == [1000]
    world.run(world.core.unpin(hold))
    assert world.clock.leases == {}


def test_a_hold_without_a_lease_never_runs_out() -> None:
    world, inode = two_pages()
    hold = lease(world, inode, ttl_ms=0)
    assert world.clock.leases == {}
    world.run(world.core.keep_alive([hold]))
    assert not world.run(world.core.lease_expired(hold, 0))
    assert inode.statistics().holds


def test_a_lease_that_runs_out_drops_the_hold() -> None:
    world, inode = two_pages()
    hold = lease(world, inode)
    assert world.run(world.core.lease_expired(hold, 0))
    assert inode.statistics().holds == ()
    world.run(world.convert(whole(inode), shared=False))
    with pytest.raises(NoSuchObject) as caught:
        world.run(world.core.keep_alive([hold]))
    assert caught.value.reason is Reason.HOLDER_UNKNOWN
    assert not world.run(world.core.lease_expired(hold, 0))
    world.check()


def test_a_renewal_overtakes_the_expiry() -> None:
    world, inode = two_pages()
    hold = lease(world, inode)
    world.run(world.core.keep_alive([hold]))
    assert world.clock.leases[hold].renewals == 1
    assert not world.run(world.core.lease_expired(hold, 0))
    assert inode.statistics().holds
    assert world.run(world.core.lease_expired(hold, 1))


def test_keep_alive_is_for_all_holds_or_none() -> None:
    world, inode = two_pages()
    holds = [lease(world, inode, page) for page in range(2)]
    with refused(world, Reason.HOLDER_UNKNOWN):
        world.run(world.core.keep_alive([*holds, 99]))
    assert [arm.renewals for arm in world.clock.leases.values()] == [0, 0]
    world.run(world.core.keep_alive(holds))
    assert [arm.renewals for arm in world.clock.leases.values()] == [1, 1]


def test_a_client_that_ends_ends_its_leases() -> None:
    world, inode = two_pages()
    lease(world, inode)
    world.run(world.core.client_gone("dev"))
    assert world.clock.leases == {}


def test_whoever_waits_is_woken_by_a_lease_that_runs_out() -> None:
    world, inode = two_pages()
    hold = lease(world, inode)
    task = world.task(world.convert(whole(inode), shared=False, wait_ms=5000))
    task.run_until(fx.WaitForRelease)
    assert not task.step()
    world.run(world.core.lease_expired(hold, 0))
    task.finish()


def test_the_lease_of_a_hold_on_a_dead_inode_runs_on() -> None:
    world = GmemWorld()
    inode = world.created_v2(PAGE_SIZE)
    hold = lease(world, inode)
    world.run(world.core.close(inode.number))
    assert world.core.numbers == []
    world.run(world.core.keep_alive([hold]))
    assert world.run(world.core.lease_expired(hold, 1))
    assert world.clock.leases == {}


@pytest.mark.parametrize("ttl_ms", [1, 499, 3_600_001, -1])
def test_a_lease_too_short_or_too_long_is_refused(ttl_ms: int) -> None:
    world, inode = two_pages()
    with refused(world, Reason.ARGUMENT_INVALID) as caught:
        lease(world, inode, ttl_ms=ttl_ms)
    assert str(ttl_ms) in caught.value.sentence


def test_leases_begin_anew_after_a_restart() -> None:
    world, inode = two_pages()
    kept = lease(world, inode)
    lease(world, inode, ttl_ms=0)
    world.clock.leases.clear()
    world.run(world.core.resume_leases())
    assert list(world.clock.leases) == [kept]
