"""`python -m gmem.guest_memfd`: the inodes of one emulated host, as a process.

It maps the page store, serves the views over the fuse connection that the keeper made,
and maps no view itself; with the backend memfd it hands memfds out instead. Exit
status: that of `gmem.runtime.server.run_service`, or EXIT_NO_KEEPER where nobody handed
the descriptors over, or EXIT_USAGE where the host's shape cannot be.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from gmem.client import HostAllocatorClient, Patience
from gmem.guest_memfd import memory_errors, restart, servicer, takeover
from gmem.guest_memfd.core.effects import Record, ScheduleMerge
from gmem.guest_memfd.core.lineage import LineageRules, rules_of
from gmem.guest_memfd.memfd.session import MemfdSession
from gmem.guest_memfd.memory_ports import MemoryPorts
from gmem.guest_memfd.page_store import PageStore
from gmem.guest_memfd.remote_ports import RemotePorts
from gmem.guest_memfd.service import GuestMemfdService
from gmem.guest_memfd.store_contents import StoreContents
from gmem.guest_memfd.view import handover
from gmem.guest_memfd.view.handover import Handover
from gmem.guest_memfd.view.session import ViewSession
from gmem.guest_memfd.views import Contents, Views
from gmem.guest_memfd.wait_ports import WaitPorts
from gmem.runtime.backend import Backend
from gmem.runtime.broker import Broker
from gmem.runtime.config import HostShape, ServiceConfig
from gmem.runtime.drive import wake_up_fd
from gmem.runtime.log import logger
from gmem.runtime.performer import Performer
from gmem.runtime.server import Runtime, open_journal, run_service, wait_for_start
from gmem.uapi.errors import TransportError
from gmem.uapi.lineage import Lineage

EXIT_NO_KEEPER = 69
EXIT_USAGE = 2
BROKER_NAME = "guest_memfd.broker"
# A restart of the allocator is waited for; what lasts longer fails the operation.
ALLOCATOR_PATIENCE = Patience(attempts=20, total=5.0, longest_pause=0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the descriptors over and serve; return the exit status."""
    config = ServiceConfig.load("guest_memfd", argv)
    if not wait_for_start(config):
        return 0
    try:
        shape = HostShape.load(config)
    except (OSError, ValueError) as error:
        logger.critical("cannot boot", error=str(error))
        return EXIT_USAGE
    rules = rules_of(in_place_conversion=shape.gmem_in_place_conversion)
    try:
        kept = handover.connect(config.run_dir)
    except TransportError as error:
        logger.critical("no keeper", error=str(error))
        return EXIT_NO_KEEPER
    if kept.backend is not config.backend:
        logger.critical("another backend", error=_mismatch(kept, config))
        return EXIT_NO_KEEPER
    return run_service(config, partial(start, kept=kept, rules=rules))


async def start(
    runtime: Runtime, *, kept: Handover, rules: Mapping[Lineage, LineageRules]
) -> None:
    """Put the service together on the loop of `runtime` and have it served."""
    config = runtime.config
    broker = Broker(config.run_dir / BROKER_NAME)
    journal = runtime.use(open_journal(config))
    service = GuestMemfdService(config.host, broker, runtime.events, journal, rules)
    session, contents = _data_plane(kept, service)
    service.kept = kept
    allocator = _allocator(runtime)
    performer = Performer()
    remote = RemotePorts(allocator, config.name)
    remote.register(performer)
    mapped = await asyncio.to_thread(takeover.mapped_source, kept, service)
    memory = MemoryPorts(
        session,
        contents,
        broker,
        kept,
        mapped=mapped,
        file_of=service.names.of,
    )
    memory.register(performer)
    _register_waits(runtime, service, performer)
    performer.register_local(ScheduleMerge, service.schedule_merge)
    service.session = session
    service.runner = runtime.runner(performer)
    performer.register_local(Record, lambda effect: runtime.record(effect.changes))
    left = await restart.restore(service.journal, service, allocator, kept)
    await takeover.take_over(kept, service, memory)
    await service.run(service.core.resume_leases())
    await broker.start()
    await asyncio.to_thread(kept.serving)
    service.expect_clients_again()
    await restart.finish(service, left)
    returning = restart.return_orphans(service, allocator, left, remote.lost)
    hearing = memory_errors.follow(service, allocator)
    looking = service.accounting.look_for_ever()
    beside = [asyncio.create_task(op) for op in (returning, hearing, looking)]
    servicer.serve(runtime, service, mapped.word)

    # Last given comes first: clients are told, then the views end, then the rest.
    runtime.on_stop(allocator.close)
    runtime.on_stop(remote.close)
    runtime.on_stop(partial(asyncio.to_thread, partial(_end, kept, session, memory)))
    runtime.on_stop(broker.stop)
    runtime.on_stop(partial(_cancelled, beside))
    takeover.watch_keeper(kept, runtime)


def _data_plane(kept: Handover, service: GuestMemfdService) -> tuple[Views, Contents]:
    if kept.backend is Backend.MEMFD:
        memfds = MemfdSession(service)
        return memfds, memfds
    store = PageStore.from_fd(kept.store_fd, kept.nr_pages)
    fds = kept.fuse_fd, kept.mount_fd
    keep = [wake_up_fd(), *service.journal.fds]
    session = ViewSession(*fds, store, service, keep=keep)
    return session, StoreContents(store)


def _mismatch(kept: Handover, config: ServiceConfig) -> str:
    return (
        f"the keeper has the backend {kept.backend}, and this service was told "
        f"{config.backend}: start both with the same --backend"
    )


def _register_waits(
    runtime: Runtime, service: GuestMemfdService, performer: Performer
) -> None:
    waits = WaitPorts(service.parked_clients, service.lease_expired)
    waits.register(performer)
    runtime.before_stop(waits.stop)


def _allocator(runtime: Runtime) -> HostAllocatorClient:
    return HostAllocatorClient(
        runtime.config.host_allocator_target,
        client=runtime.config.name,
        incarnation=runtime.incarnation,
        patience=ALLOCATOR_PATIENCE,
    )


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _end(kept: Handover, session: Views, memory: MemoryPorts) -> None:
    kept.stopping()
    session.stop()
    memory.close()
    kept.close()


if __name__ == "__main__":
    sys.exit(main())
