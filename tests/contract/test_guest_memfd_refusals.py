"""Every row of the error tables of guest_memfd.proto: refused, and nothing moved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

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


@pytest.fixture(scope="module")
def words(module_host: Host) -> Iterator[dict[str, Any]]:
    """One scene for all cases: none of them changes it."""
    yield asyncio.run(build_scene(module_host))
    module_host.end_programs()


@pytest.fixture
async def clients(
    module_host: Host, words: dict[str, Any]
) -> AsyncIterator[tuple[HostAllocatorClient, Scene]]:
    module_host.rearm()
    async with module_host.clients() as (allocator, gmem):
        yield allocator, Scene(gmem, words)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
async def test_a_bad_call_is_refused_and_changes_nothing(
    clients: tuple[HostAllocatorClient, Scene], case: Case
) -> None:
    allocator, scene = clients
    async with AsyncExitStack() as stack:
        if case.drained:
            await stack.enter_async_context(no_base_memory(allocator))
        before = await everything(scene.gmem, allocator)
        with refused(case.reason, *case.words, errno=case.errno) as caught:
            await scene.call(case.rpc, case.body, with_id=case.with_id)
        assert type(caught[0]) is ERROR_TABLE[case.reason].error_class
        after = await everything(scene.gmem, allocator)
        assert changes(before, after) == []


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
