"""What is not heard of is looked for: touched holes, and files that were closed.

A data plane without faults (`Views.sees_faults`) lets a client touch a hole before the
core knows of it. Its folio is allocated afterwards: before an operation on the inode,
before its counters are shown, and at least every LOOK_SECONDS. An allocation that fails
leaves the bytes where they are, and is tried again; the client got no SIGBUS.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import structlog

from gmem.uapi.errors import OPERATION_ERRORS
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE
from gmem.uapi.pages import PgRange

if TYPE_CHECKING:
    from gmem.guest_memfd.service import GuestMemfdService

LOOK_SECONDS: Final = 0.1
LOOK_SHARE_MAX: Final = 0.1
"""Most of its time that the service spends looking."""
AGAIN_SECONDS: Final = 2.0
"""After an allocation of an inode failed, unless somebody asks for it."""

log = structlog.get_logger(__name__)


class Accounting:
    """Tells the core of `service` what clients did behind its back; on the loop."""

    def __init__(self, service: GuestMemfdService) -> None:
        self._service = service
        self._failed: dict[int, float] = {}

    async def settle(self, numbers: Iterable[int]) -> None:
        """Bring inodes up to date: who looks at them next sees what was touched."""
        if self._service.session.sees_faults:
            return
        self._tell_of_closed()
        for number in numbers:
            await self._allocate(number)

    async def look_for_ever(self) -> None:
        """Settle every inode again and again; for a task of its own."""
        while not self._service.session.sees_faults:
            before = time.monotonic()
            due = [n for n in self._service.core.numbers if self._is_due(n, before)]
            await self.settle(due)
            spent = time.monotonic() - before
            await asyncio.sleep(max(LOOK_SECONDS, spent / LOOK_SHARE_MAX))

    def _is_due(self, number: int, now: float) -> bool:
        return now - self._failed.get(number, -AGAIN_SECONDS) >= AGAIN_SECONDS

    def _tell_of_closed(self) -> None:
        for number, view in self._service.session.ended_opens():
            self._service.released(number, view, 0)

    async def _allocate(self, number: int) -> None:
        try:
            for pages in self._service.session.touched(number):
                await self._allocate_run(number, pages)
        except OPERATION_ERRORS as error:
            if self._is_due(number, time.monotonic()):
                log.warning("touched_without_folio", inode=number, why=str(error))
            self._failed[number] = time.monotonic()
        else:
            self._failed.pop(number, None)

    async def _allocate_run(self, number: int, pages: PgRange) -> None:
        service, keep = self._service, FALLOC_FL_KEEP_SIZE
        await service.run(
            service.core.fallocate(number, keep, pages.offset, pages.size)
        )
