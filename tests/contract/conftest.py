"""What the contract suites run against: a core, or its service on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gmem.client import HostAllocatorClient
from tests.contract.allocators import Core, Subject, Wire, serving_memory, small_host
from tests.support.host_fixtures import (
    allocator,
    backend,
    clean_host,
    gmem,
    host_shape,
    module_host,
)

__all__ = ["allocator", "backend", "clean_host", "gmem", "host_shape", "module_host"]


@pytest.fixture(params=["core", "wire"])
async def subject(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Subject]:
    memory = small_host()
    if request.param == "core":
        yield Core(memory)
    else:
        async with (
            serving_memory(memory, tmp_path) as runtime,
            HostAllocatorClient(runtime.target, client="contract") as client,
        ):
            yield Wire(client)
    memory.check_frames()


@pytest.fixture
def client(subject: Wire) -> HostAllocatorClient:
    return subject.client
