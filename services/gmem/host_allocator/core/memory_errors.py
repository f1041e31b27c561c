"""Memory errors: which frame has one, who has the frame, and where it goes.

    in use      the frame stays its owner's; the state of its huge folio says so
    freed       a 4K folio is withheld; a huge folio is taken apart: the bad frames are
                withheld, the others become base memory, and the pool is one smaller
    free        a frame of base memory is withheld at once

A huge folio is withheld as a whole where an error names the folio and not the page
(unreliable raw-page information, for which the kernel leaks it on purpose), or where
its vmemmap cannot be restored. Unpoisoning gives withheld frames to base memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from gmem.host_allocator.core.folio import FolioEvent
from gmem.host_allocator.core.hstate import HState
from gmem.host_allocator.core.nodes import NumaNode
from gmem.host_allocator.core.values import Folio, PoisonedFrame
from gmem.uapi.errors import InUse, NoSuchObject, Poisoned, Reason
from gmem.uapi.pages import Pfn, PgRange

if TYPE_CHECKING:
    from gmem.host_allocator.core.base import BaseAllocator
    from gmem.host_allocator.core.host_memory import HostMemory
    from gmem.host_allocator.core.hugetlb import HugetlbAllocator


def inject(memory: HostMemory, pfn: int) -> PoisonedFrame:
    """Give a frame a memory error; see HostMemory.inject."""
    node = _node_of(memory, pfn)
    if _backend_with(memory, pfn) is not None:
        raise Poisoned(
            Reason.PAGE_POISONED,
            f"frame {pfn:#x} has a memory error already: unpoison it, or take another",
            pfn=pfn,
        )
    for pool in memory.hugetlb.values():
        live = pool.live_at(pfn)
        if live is not None:
            live.state = live.after(FolioEvent.ERROR)
            pool.hwpoison[pfn] = 1
            memory.touch(pool, [live.folio])
            return PoisonedFrame(Pfn(pfn), 1, live.handle)
    claim = memory.base.claim_at(pfn)
    if claim is None:
        _require_base(node, pfn)
        node.withhold(PgRange(pfn, pfn + 1))
    memory.base.hwpoison[pfn] = 1
    return PoisonedFrame(Pfn(pfn), 1, 0 if claim is None else claim.handle)


def unpoison(memory: HostMemory, pfn: int) -> PoisonedFrame:
    """Forget the error of a frame; see HostMemory.unpoison."""
    node = _node_of(memory, pfn)
    backend = _backend_with(memory, pfn)
    if backend is None:
        raise NoSuchObject(
            Reason.FRAME_UNKNOWN,
            f"frame {pfn:#x} has no memory error: see ListMemoryErrors",
            pfn=pfn,
        )
    healed = _describe(memory, pfn, backend.hwpoison[pfn])
    del backend.hwpoison[pfn]
    for pool in memory.hugetlb.values():
        live = pool.live_at(pfn)
        # Frame 0 is a frame like any other, and false.
        if live is not None and not [*_errors_in(pool.hwpoison, live.folio.frames)]:
            live.state = live.after(FolioEvent.UNPOISON)
            memory.touch(pool, [live.folio])
    start = pfn & -healed.nr_pages
    for run in _between(PgRange(start, start + healed.nr_pages), _all_errors(memory)):
        for lost in node.withheld.runs_touching(run):
            node.release(lost.intersection(run))
    return healed


def poisoned_frames(memory: HostMemory) -> tuple[PoisonedFrame, ...]:
    """Return every frame with an error, rising."""
    errors = _all_errors(memory)
    return tuple(_describe(memory, pfn, errors[pfn]) for pfn in sorted(errors))


def take_apart(hstate: HState, folio: Folio, hwpoison: dict[int, int]) -> None:
    """Take a poisoned folio that is freed out of its pool."""
    bad = list(_errors_in(hwpoison, folio.frames))
    is_reliable = all(hwpoison[pfn] == 1 for pfn in bad)
    if is_reliable and hstate.dissolve(folio):
        for pfn in bad:
            hstate.nodes[folio.node].withhold(PgRange(pfn, pfn + 1))
    else:
        # Whoever unpoisons its first bad frame gives back what was lost with it.
        hwpoison[bad[0]] = 1 << folio.order
        hstate.withhold(folio)


def _errors_in(hwpoison: Iterable[int], frames: PgRange) -> Iterator[int]:
    return (pfn for pfn in hwpoison if pfn in frames)


def _all_errors(memory: HostMemory) -> dict[int, int]:
    errors = dict(memory.base.hwpoison)
    for pool in memory.hugetlb.values():
        errors |= pool.hwpoison
    return errors


def _backend_with(
    memory: HostMemory, pfn: int
) -> BaseAllocator | HugetlbAllocator | None:
    backends: list[BaseAllocator | HugetlbAllocator]
    backends = [memory.base, *memory.hugetlb.values()]
    return next((each for each in backends if pfn in each.hwpoison), None)


def _describe(memory: HostMemory, pfn: int, nr_pages: int) -> PoisonedFrame:
    lives = [pool.live_at(pfn) for pool in memory.hugetlb.values()]
    claims = [*filter(None, lives), memory.base.claim_at(pfn)]
    handle = next((claim.handle for claim in claims if claim is not None), 0)
    return PoisonedFrame(Pfn(pfn), nr_pages, handle)


def _node_of(memory: HostMemory, pfn: int) -> NumaNode:
    for node in memory.nodes:
        if pfn in node.frames:
            return node
    raise NoSuchObject(
        Reason.FRAME_UNKNOWN,
        f"frame {pfn:#x} is none of this host: its frames end at "
        f"{memory.nodes[-1].frames.stop:#x}",
        pfn=pfn,
    )


def _require_base(node: NumaNode, pfn: int) -> None:
    if not node.base.covers(PgRange(pfn, pfn + 1)):
        raise InUse(
            Reason.STATE_WRONG,
            f"frame {pfn:#x} is one of a free huge page or of the memmap, where an "
            "error is not emulated: take a frame of a folio in use, or a free one",
            pfn=pfn,
        )


def _between(frames: PgRange, errors: Mapping[int, int]) -> list[PgRange]:
    """Return `frames` without those that still have an error."""
    cuts = sorted(_errors_in(errors, frames))
    starts = [frames.start, *[pfn + 1 for pfn in cuts]]
    stops = [*cuts, frames.stop]
    return [PgRange(a, b) for a, b in zip(starts, stops, strict=True) if a < b]
