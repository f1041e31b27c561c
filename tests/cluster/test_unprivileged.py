"""Services as an ordinary user without a capability: the keeper alone is privileged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gmem.uapi.errors import Contended
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import SIGBUS, Host, new_inode, running_host, wait_until
from tests.support.ordinary_user import NOBODY, status_of

pytestmark = pytest.mark.fuse


@pytest.fixture
def nobodys_host(reachable_python: None) -> Iterator[Host]:
    with running_host(nr_vmms=1, user=NOBODY) as host:
        yield host


async def test_services_without_privileges_do_all_that_services_do(
    nobodys_host: Host,
) -> None:
    host = nobodys_host
    for service in ("host_allocator", "guest_memfd", "vmm-0"):
        status = status_of(host.pid(service))
        assert status["Uid"].split() == ["65534"] * 4
        assert int(status["CapEff"], 16) == 0
    async with host.clients() as (_, gmem):
        # The keeper looks into page tables for it.
        assert (await gmem.get_capabilities()).mapped_source == "pagemap"
        inode = await new_inode(host, gmem, pages=2)
        client = await inode.mapped_by("loader")
        await client.asked("raw_store", 0, 7)
        with pytest.raises(Contended, match=f"pid {client.pid} .loader."):
            await inode.convert(0, SIZE_2M, private=True)
        await client.asked("dont_need")
        await inode.convert(0, PAGE_SIZE, private=True)

        first = host.pid("guest_memfd")
        host.kill("guest_memfd")
        assert await client.asked("raw_load", SIZE_2M) == 0
        wait_until(lambda: host.pid("guest_memfd") != first, "a successor")
        assert status_of(host.pid("guest_memfd"))["Uid"].split() == ["65534"] * 4
        assert client.dies_of("raw_load", 0) == SIGBUS
