"""Small hosts for the allocator's tests, and what is asked of every refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import Folio
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M

PAGES_PER_1G = SIZE_1G // PAGE_SIZE
LITTLE = 8192
"""Base pages beside one huge page, its memmap among them: soon used up."""
HUGE = pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G], ids=["2M", "1G"])
# What one folio saves; written out, as the tests check the arithmetic.
SAVED = {SIZE_1G: 4095, SIZE_2M: 7}


@contextmanager
def refused(
    memory: HostMemory, reason: Reason
) -> Iterator[pytest.ExceptionInfo[KernelError]]:
    """Expect a refusal for `reason`, and that nothing moved."""
    before, claims = memory.statistics(), memory.reservations()
    with pytest.raises(KernelError) as caught:
        yield caught
    assert caught.value.reason is reason
    assert memory.statistics() == before
    assert memory.reservations() == claims
    memory.check_frames()


def take_base_memory(memory: HostMemory, *, leave: int = 0) -> tuple[int, list[Folio]]:
    """Allocate all base pages but `leave`; return the handle and its folios."""
    handle = memory.reserve(PAGE_SIZE, 1, owner="hog")
    folios: list[Folio] = []
    while (left := sum(n.free_base_pages for n in memory.statistics().nodes)) > leave:
        folios += memory.allocate(handle, nr_folios=left - leave)
    return handle, folios


def one_folio(memory: HostMemory, page_size: int) -> tuple[int, Folio]:
    """Reserve and allocate one page; return handle and folio."""
    handle = memory.reserve(page_size, 1)
    (folio,) = memory.allocate(handle, page_size=page_size)
    return handle, folio
