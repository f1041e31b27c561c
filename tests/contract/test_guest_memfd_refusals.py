"""Every row of the error tables of guest_memfd.proto: refused, and nothing moved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import pytest_asyncio
from google.protobuf.message import Message

from gmem.client import HostAllocatorClient
from gmem.runtime.config import HostShape
from gmem.uapi.errors import ERROR_TABLE, Reason
from tests.contract import guest_memfd_cases, guest_memfd_error_cases
from tests.contract.guest_memfd_byte_cases import BYTE_CASES, BYTES_ELSEWHERE
from tests.contract.guest_memfd_cases import Case
from tests.contract.guest_memfd_lineage_cases import CASES as LINEAGE_CASES
from tests.contract.guest_memfd_scene import (
    MUTATIONS,
    SCENE_SHAPE,
    Scene,
    build_scene,
    everything,
    no_base_memory,
)
from tests.support.backends import BOTH
from tests.support.hosts import Host, changes, refused
from tests.support.sources import REPOSITORY
from tests.tidy.test_error_tables import rpcs

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

CASES = [
    *(*guest_memfd_cases.CASES, *LINEAGE_CASES, *BYTE_CASES),
    *(*guest_memfd_error_cases.ERROR_CASES, *guest_memfd_error_cases.CGROUP_CASES),
]
ELSEWHERE = (
    guest_memfd_cases.ELSEWHERE | BYTES_ELSEWHERE | guest_memfd_error_cases.ELSEWHERE
)


@pytest.fixture(scope="module")
def host_shape() -> HostShape:
    return SCENE_SHAPE


class Still:
    """A host that no case changes: what is seen after one is what the next begins with.

    `scene` is there for all of them.
    """

    def __init__(self, allocator: HostAllocatorClient, scene: Scene) -> None:
        self.allocator, self.scene = allocator, scene
        self._seen: list[Message] | None = None

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Assert that what happens inside changes nothing."""
        before, self._seen = self._seen or await self._everything(), None
        yield
        after = await self._everything()
        assert changes(before, after) == []
        self._seen = after

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Have no page of base memory free inside."""
        self._seen = None
        async with no_base_memory(self.allocator):
            yield
        self._seen = None

    async def _everything(self) -> list[Message]:
        return await everything(self.scene.gmem, self.allocator)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_still(module_host: Host) -> AsyncIterator[Still]:
    words = await build_scene(module_host)
    async with module_host.clients() as (allocator, gmem):
        yield Still(allocator, Scene(gmem, words))
    module_host.end_programs()


@pytest.fixture
def still(module_host: Host, module_still: Still) -> Still:
    module_host.rearm()
    return module_still


# One loop for all cases, and with it one pair of clients.
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
async def test_a_bad_call_is_refused_and_changes_nothing(
    still: Still, case: Case
) -> None:
    async with AsyncExitStack() as stack:
        if case.drained:
            await stack.enter_async_context(still.drained())
        await stack.enter_async_context(still.unchanged())
        with refused(case.reason, *case.words, errno=case.errno) as caught:
            await still.scene.call(case.rpc, case.body, with_id=case.with_id)
        assert type(caught[0]) is ERROR_TABLE[case.reason].error_class


def test_every_row_of_the_tables_has_a_case() -> None:
    rows = {
        (name.partition(".")[2], Reason[row[1]])
        for name, rpc in rpcs().items()
        if name.startswith("GuestMemfdService.")
        for row in rpc.table()[1:]
    }
    tried = {(case.rpc, case.reason) for case in CASES}
    # test_guest_memfd.py has one for each mutation.
    reused = {(rpc, Reason.REQUEST_ID_REUSED) for rpc in MUTATIONS}
    assert sorted(rows - tried - reused - set(ELSEWHERE)) == []
    # And nothing is refused that no table tells.
    assert sorted(tried - rows) == []


def test_rows_without_a_case_are_tested_where_it_says() -> None:
    for (_rpc, reason), path in ELSEWHERE.items():
        assert reason.value in (REPOSITORY / path).read_text(), (reason, path)
