"""What a restarted service knows: from its journal, the allocator, the page states.

    journal        inodes, faultability, bindings, holds, after each finished operation
    allocator      which folios are out for an inode, which are split, and poisoned
    page states    which folio is where, what was filled (in the keeper's hands)

The journal is believed, but for folios, where the allocator knows more, and of a folio
that is out the table knows where it is. What is out and nowhere goes back at once: the
journal is held by one process, so whoever asked for it has ended. Reservations that no
inode has (a creation or an eviction was cut off) go back after ORPHAN_SECONDS: a
request that was on its way may still be carried out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import numpy as np

from gmem.client import HostAllocatorClient
from gmem.effects import Op, perform
from gmem.guest_memfd import codec
from gmem.guest_memfd.core.effects import Unreserve
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import believe_errors
from gmem.guest_memfd.core.restoring import (
    LiveFolio,
    give_back,
    reconcile,
    strays,
)
from gmem.guest_memfd.core.rows import inode_changes
from gmem.guest_memfd.core.values import Folio
from gmem.guest_memfd.memory_errors import errors_by_handle
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.service import GuestMemfdService
from gmem.guest_memfd.view.handover import Handover
from gmem.runtime.journal import Journal
from gmem.runtime.log import logger
from gmem.uapi.errors import KernelError, NoSuchObject, TransportError
from gmem.uapi.pages import NodeId, Pfn

ORPHAN_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.2
T = TypeVar("T")


@dataclass(slots=True)
class Leftovers:
    """Folios that are out and in no inode, by handle; reservations of no inode."""

    folios: dict[int, list[LiveFolio]] = field(default_factory=dict)
    reservations: frozenset[int] = frozenset()


async def restore(
    journal: Journal,
    service: GuestMemfdService,
    allocator: HostAllocatorClient,
    kept: Handover,
) -> Leftovers:
    """Put into the core what survived, and fit the page states in `kept` to it.

    Before the views are served. Waits for the allocator as long as it takes.
    """
    epoch = int(journal.rows.get("epoch", 0)) + 1
    core, left = service.core, Leftovers()
    core.restore(journal.rows, epoch)
    journal.loaded()
    errors = await _patiently(partial(errors_by_handle, allocator))
    journal.record({"epoch": epoch})
    for number in core.numbers:
        inode = core.inode(number)
        live = await _patiently(partial(_live_folios, allocator, inode.handle))
        if live is None:
            # All that was left to do for it was to say so.
            core.forget(number)
            journal.record({f"inode/{number}/": None})
            continue
        table = kept.tables.get(number)
        attached = {} if table is None else _attached(table)
        left.folios[inode.handle] = reconcile(inode, live, attached)
        believe_errors(inode, (errors or {}).get(inode.handle, {}))
        kept.tables[number] = fit(table or _new_table(inode, service, kept), inode)
        journal.record(inode_changes(inode, settled=True))
    _drop_unknown(service, kept)
    left.reservations = await _reserved(service, allocator) - core.handles
    await journal.committed()
    if core.numbers:
        logger.info("recovered", inodes=len(core.numbers), epoch=epoch)
    return left


def fit(table: InodeTable, inode: Inode) -> InodeTable:
    """Have the table show folios that the inode has and may show, and no others.

    What it does not show is attached by the next fault, and holds nobody's bytes.
    """
    for unit in np.flatnonzero(table.frame).tolist():
        index = unit << table.order
        entry = inode.filemap.get(index)
        is_here = entry is not None and entry.folio.pfn == table.pfn_of(index)
        if (
            entry is None
            or not is_here
            or (not entry.split and inode.wants_split(index))
        ):
            table.detach(index)
        else:
            inode.filemap.set_attached(index, attached=True)
    holes = np.repeat(table.frame == 0, 1 << table.order)[: table.nr_pages]
    table.uptodate[holes] = 0
    return table


async def finish(service: GuestMemfdService, left: Leftovers) -> None:
    """Give back what was left over, and end what was ending. The views are served."""
    core = service.core
    for handle, folios in left.folios.items():
        if folios:
            logger.info("folios_given_back", handle=handle, number=len(folios))
            await _patiently(partial(_run, service, partial(give_back, handle, folios)))
    for number in core.numbers:
        if core.inode(number).is_unused:
            op = partial(core.evict_if_unused, number)
            await _patiently(partial(_run, service, op))


async def return_orphans(
    service: GuestMemfdService,
    allocator: HostAllocatorClient,
    left: Leftovers,
    lost: asyncio.Event,
) -> None:
    """Give back reservations that no inode has, for ever.

    Those of the start, and again after a call to the allocator was `lost`: it may have
    been carried out, or an eviction was given up. What no living inode has now, and
    nobody at all has ORPHAN_SECONDS later, is nobody's.
    """
    core, suspects = service.core, left.reservations
    numbers: list[int] = []
    while True:
        while suspects or numbers:
            await asyncio.sleep(ORPHAN_SECONDS)
            numbers = [n for n in numbers if not await _compared(service, allocator, n)]
            suspects &= await _reserved(service, allocator)
            for handle in sorted(suspects - core.handles):
                await _give_reservation_back(service, allocator, handle)
            # An eviction may be under way still, and be given up later.
            suspects &= core.handles - _living(service) - core.deferred.handles
        await lost.wait()
        lost.clear()
        reserved = await _reserved(service, allocator)
        suspects = reserved - _living(service) - core.deferred.handles
        numbers = core.numbers


async def _compared(
    service: GuestMemfdService, allocator: HostAllocatorClient, number: int
) -> bool:
    """Give back what is out for an inode and not in it; False: it did not rest."""
    inode = service.core.find(number)
    if inode is None:
        return True
    uses = inode.uses
    live = await _patiently(partial(_live_folios, allocator, inode.handle))
    with service.mutex:
        # Nobody asked for a folio meanwhile, or waits for an answer now.
        if inode.users or inode.uses != uses:
            return False
        left = strays(inode, live or {})
    if left:
        logger.info("folios_given_back", handle=inode.handle, number=len(left))
        op = partial(give_back, inode.handle, left)
        await _patiently(partial(_run, service, op))
    return True


async def _give_reservation_back(
    service: GuestMemfdService, allocator: HostAllocatorClient, handle: int
) -> None:
    live = await _patiently(partial(_live_folios, allocator, handle))
    if live is None:
        return
    logger.info("reservation_given_back", handle=handle, folios=len(live))
    op = partial(_end_reservation, handle, list(live.values()))
    try:
        await _patiently(partial(_run, service, op))
    except KernelError as error:
        logger.error("reservation_stays", handle=handle, error=str(error))


async def _reserved(
    service: GuestMemfdService, allocator: HostAllocatorClient
) -> frozenset[int]:
    """Return the handles that were reserved in the name of inodes of this host."""
    claims = await _patiently(allocator.list_reservations)
    prefix = service.names.of(0).removesuffix("0")
    ours = [claim.handle for claim in claims or [] if claim.owner.startswith(prefix)]
    return frozenset(ours)


def _living(service: GuestMemfdService) -> frozenset[int]:
    core = service.core
    return frozenset(core.inode(number).handle for number in core.numbers)


def _end_reservation(handle: int, folios: list[LiveFolio]) -> Op[None]:
    yield from give_back(handle, folios)
    try:
        yield from perform(Unreserve(handle))
    except NoSuchObject:
        # It was ended before, and its last folio took it along.
        return


async def _run(service: GuestMemfdService, make: Callable[[], Op[None]]) -> None:
    await service.run(make())


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T | None:
    """Ask until somebody answers; None where there is no such object."""
    while True:
        try:
            return await ask()
        except NoSuchObject:
            return None
        except TransportError as error:
            logger.warning("recovery waits", error=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)


async def _live_folios(
    allocator: HostAllocatorClient, handle: int
) -> Mapping[int, LiveFolio]:
    live: dict[int, LiveFolio] = {}
    for run in await allocator.list_folios(handle):
        first = codec.folio_from_wire(run.first)
        for number in range(run.nr_folios):
            pfn = first.pfn + (number << first.order)
            folio = Folio(Pfn(pfn), first.order, NodeId(first.node))
            live[pfn] = LiveFolio(folio, run.split)
    return live


def _attached(table: InodeTable) -> dict[int, int]:
    units = np.flatnonzero(table.frame)
    pfns = table.frame[units] - 1
    indexes = units << table.order
    return dict(zip(indexes.tolist(), pfns.tolist(), strict=True))


def _new_table(inode: Inode, service: GuestMemfdService, kept: Handover) -> InodeTable:
    table = service.session.new_table(inode.number, inode.i_size, inode.page_size)
    kept.hold(table)
    return table


def _drop_unknown(service: GuestMemfdService, kept: Handover) -> None:
    """Forget page states of inodes that were never finished, or had ended."""
    for number in sorted(set(kept.tables) - set(service.core.numbers)):
        kept.drop(number)
        kept.tables.pop(number).close()
