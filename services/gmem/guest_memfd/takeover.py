"""Becoming the one who serves the views: after the keeper, and after a predecessor."""

from __future__ import annotations

import asyncio
from functools import partial

from gmem.guest_memfd import recovery
from gmem.guest_memfd.memory_ports import MappedSource, MemoryPorts
from gmem.guest_memfd.remote_finder import Finder, RemoteFinder
from gmem.guest_memfd.service import GuestMemfdService
from gmem.guest_memfd.view.handover import Handover
from gmem.runtime.log import logger
from gmem.runtime.mappings import MappingFinder, can_see_other_processes
from gmem.runtime.server import Runtime

GIVE_BACK_SECONDS = 0.2
"""Between two looks for a keeper that was started after one was killed."""


async def take_over(
    kept: Handover, service: GuestMemfdService, memory: MemoryPorts
) -> None:
    """Serve the views, those of a predecessor included.

    What the journal knows must be in the core already. Whoever stood in makes way
    first, then the kernel sends again what was not answered, then our readers start.
    """
    session = service.session
    misplaced = service.recover(kept.tables, memory)
    if kept.successor:
        await asyncio.to_thread(kept.take_over)
    await asyncio.to_thread(partial(session.start, resend=kept.successor))
    await asyncio.to_thread(
        recovery.finish, misplaced, session.invalidate, session.set_state
    )


def mapped_source(kept: Handover, service: GuestMemfdService) -> MappedSource:
    """Choose how "mapped" is known: by a look of our own, of the keeper's, or not."""
    finder: Finder | None = None
    if can_see_other_processes():
        # A fuse connection is called after the minor of its anonymous device.
        finder = MappingFinder((0, kept.connection_id), lambda: service.left_out)
    elif (control := kept.scanner()) is not None:
        finder = RemoteFinder(control, lambda: service.left_out)
        logger.info("mapped pages are looked up by the keeper: we lack CAP_SYS_PTRACE")
    else:
        logger.warning(
            "mapped pages are known from clients' reports only: "
            "CAP_SYS_PTRACE is missing here and in the keeper"
        )
    return MappedSource(finder)


def watch_keeper(kept: Handover, runtime: Runtime) -> None:
    """Notice the keeper's death; serve on, and give a new one everything back."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def readable() -> None:
        loop.remove_reader(control[0])
        logger.error(
            "the keeper is gone: a crash of this service ends the views, "
            "until gmemctl up --repair has started another"
        )
        tasks[:] = [loop.create_task(give_back())]

    async def give_back() -> None:
        while True:
            if await asyncio.to_thread(kept.give_back):
                break
            await asyncio.sleep(GIVE_BACK_SECONDS)
        logger.info("a new keeper has everything")
        control[0] = kept.control_socket
        loop.add_reader(control[0], readable)

    async def stop() -> None:
        loop.remove_reader(control[0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    control = [kept.control_socket]
    loop.add_reader(control[0], readable)
    runtime.on_stop(stop)
