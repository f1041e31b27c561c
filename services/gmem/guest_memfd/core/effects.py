"""What the guest_memfd core asks of the world, as values typed by their reply.

Three kinds, by who answers them:

* REMOTE: another service. A port makes one request_id for each effect instance and
  repeats it until it is answered. Allocator errors come back as KernelErrors;
  InvalidateBegin and InvalidateEnd never fail: a dead VMM counts as acknowledged.
* BLOCKING: this service, but not in the thread that steps the core: it may take long,
  or wait for the kernel.
* LOCAL: the page-state table and the page store; at once, never failing but AddInode.

The state of a page's views follows from its faultability: the host view of a shared
page and the guest view of a private page are OPEN, whether a folio is present or not
(a hole of the host view asks the core, one of the guest view is refused at once). Only
operations that hold the invalidate_lock exclusively change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from gmem.effects import Effect
from gmem.guest_memfd.core.references import References
from gmem.guest_memfd.core.values import (
    Folio,
    HostMapping,
    MemPolicy,
    PageState,
    ViewKind,
)
from gmem.uapi.pages import Pfn, PgRange

# Folios in one Allocate, Free or AttachFolio: bounds a message and a step.
FOLIO_BATCH_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class Reserve(Effect[int]):
    """Reserve `num_pages` folios of `page_size` bytes for `owner`; reply: the handle.

    `cgroup` is charged for folios, with `charge_rsvd` for the reservation as well.
    NoSuchObject (CGROUP_UNKNOWN); Exhausted (CGROUP_LIMIT, POOL_EMPTY, NODE_EMPTY) when
    they cannot be promised.
    """

    page_size: int
    num_pages: int
    owner: str
    cgroup: str = ""
    charge_rsvd: bool = False


@dataclass(frozen=True, slots=True)
class CountNodes(Effect[int]):
    """Ask how many NUMA nodes the host has."""


@dataclass(frozen=True, slots=True)
class Allocate(Effect[tuple[Folio, ...]]):
    """Take folios of a reservation; the reply has at least one, at most `nr_folios`.

    Exhausted (SUBPOOL_EMPTY, CGROUP_LIMIT, POOL_EMPTY, BASE_MEMORY_EMPTY) when there is
    none.
    """

    handle: int
    page_size: int
    mempolicy: MemPolicy
    nr_folios: int = 1


@dataclass(frozen=True, slots=True)
class Split(Effect[int]):
    """Split a whole folio to PAGE_SIZE; reply: vmemmap pages restored.

    Exhausted (VMEMMAP_RESTORE_FAILED): the folio is whole as before.
    """

    handle: int
    folio: Folio


@dataclass(frozen=True, slots=True)
class Reconstruct(Effect[int]):
    """Make a split folio whole; `folio` is the huge one. Reply: vmemmap pages saved."""

    handle: int
    folio: Folio


@dataclass(frozen=True, slots=True)
class Free(Effect[None]):
    """Give whole folios back to their reservation."""

    handle: int
    folios: tuple[Folio, ...]


@dataclass(frozen=True, slots=True)
class Unreserve(Effect[None]):
    """End a reservation."""

    handle: int


@dataclass(frozen=True, slots=True)
class PoisonFrame(Effect[None]):
    """Give a frame a memory error; Poisoned (PAGE_POISONED) where it has one."""

    pfn: Pfn


@dataclass(frozen=True, slots=True)
class UnpoisonFrame(Effect[None]):
    """Forget the memory error of a frame; NoSuchObject (FRAME_UNKNOWN)."""

    pfn: Pfn


@dataclass(frozen=True, slots=True)
class ListErrors(Effect[Mapping[int, int]]):
    """Say which frames of a reservation have errors, in how many pages from each."""

    handle: int


@dataclass(frozen=True, slots=True)
class InvalidateBegin(Effect[None]):
    """Have the VMM at `target` zap `gfns` of `vm` and hold its vCPUs off them."""

    vm: str
    target: str
    gfns: PgRange


@dataclass(frozen=True, slots=True)
class InvalidateEnd(Effect[None]):
    """Tell the VMM at `target` that what began is over."""

    vm: str
    target: str
    gfns: PgRange


@dataclass(frozen=True, slots=True)
class InvalidateView(Effect[bool]):
    """Unmap pages of a view from every process, dirty bytes stored first.

    Exactly `pages`; they are CLOSING (or nobody can reach them any more). Reply:
    whether there were dirty bytes.
    """

    inode: int
    view: ViewKind
    pages: PgRange


@dataclass(frozen=True, slots=True)
class QuiesceView(Effect[None]):
    """Unmap pages of the host view, and have the next touch of an OPEN one wait.

    Pages that were OPEN are QUIESCED afterwards; the core sets them OPEN again soon.
    Pages in another state are left alone. Contended: nothing was changed.
    """

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class DrainLru(Effect[None]):
    """Let references go that somebody holds for a moment (lru_add_drain_all())."""

    inode: int


@dataclass(frozen=True, slots=True)
class RemoveInode(Effect[None]):
    """Serve the views of an inode no longer; they are closed and invalidated."""

    inode: int


@dataclass(frozen=True, slots=True)
class FindMappings(Effect[tuple[HostMapping, ...]]):
    """Find who has pages of the host view mapped; guest processes are left out."""

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class ReadDescriptor(Effect[None]):
    """Copy bytes of a given descriptor, from `offset` on, into `pages`.

    DESCRIPTOR_UNKNOWN, DESCRIPTOR_TYPE, PAGE_UNREADABLE: pages are not uptodate, so
    what was copied already is never seen.
    """

    descriptor: str
    offset: int
    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class AddInode(Effect[None]):
    """Make the page-state table of a new inode: all pages CLOSED, all holes.

    Without `host_mmap` the host view can be opened, and mmap of it is ENODEV. Without
    `counts_blocks` its st_blocks stays 0.
    """

    inode: int
    i_size: int
    page_size: int
    host_mmap: bool = True
    counts_blocks: bool = True


@dataclass(frozen=True, slots=True)
class SetViewState(Effect[None]):
    """Give pages of a view a state; CLOSING and CLOSED refuse what is parked there."""

    inode: int
    view: ViewKind
    pages: PgRange
    state: PageState


@dataclass(frozen=True, slots=True)
class AttachFolio(Effect[None]):
    """Put folios behind `nr_folios` units from page `index` on.

    The first begins at frame `pfn`, each next one where the one before it ends.
    """

    inode: int
    index: int
    pfn: Pfn
    nr_folios: int = 1


@dataclass(frozen=True, slots=True)
class DetachFolio(Effect[None]):
    """Make `nr_folios` units from page `index` on holes again."""

    inode: int
    index: int
    nr_folios: int = 1


@dataclass(frozen=True, slots=True)
class ClearUptodate(Effect[None]):
    """Have pages zeroed on their next use."""

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class SetUptodate(Effect[None]):
    """Mark pages as filled: their bytes may be seen."""

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class IsUptodate(Effect[bool]):
    """Reply whether any of the pages is uptodate."""

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class Prepare(Effect[None]):
    """Zero and mark uptodate what is not (kvm_gmem_prepare_folio()).

    Pages without a folio are left out: another operation may have taken it.
    """

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class ZeroPages(Effect[None]):
    """Write zeros over pages that have a folio; what was uptodate stays so."""

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class WriteBackView(Effect[None]):
    """Have the store hold every byte that the host view's page cache has.

    Nothing is unmapped. InUse (BINDING_BROKEN) when the views have ended.
    """

    inode: int
    pages: PgRange


@dataclass(frozen=True, slots=True)
class LoadBytes(Effect[bytes]):
    """Reply: bytes of pages that have a folio; what nobody filled is zeroed first."""

    inode: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class StoreBytes(Effect[None]):
    """Store bytes in pages that have a folio and that no view has cached.

    They count as filled from then on; what nobody filled around them is zeroed first.
    """

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ScheduleMerge(Effect[None]):
    """Have `GuestMemfdCore.merge(number)` driven soon, as an operation of its own.

    As schedule_work(): whoever asks does not wait for it.
    """

    number: int


@dataclass(frozen=True, slots=True)
class DisarmLease(Effect[None]):
    """Forget the lease of a hold that has ended."""

    hold: int


class Waited(Enum):
    """How a wait ended: look again, the instant has come, or the service stops."""

    AGAIN = "again"
    DEADLINE = "deadline"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class StartWait(Effect[int]):
    """Reply: the instant that lies `milliseconds` ahead on the world's clock."""

    milliseconds: int


@dataclass(frozen=True, slots=True)
class WaitForRelease(Effect[Waited]):
    """Wait until `references.ended` is not `ended` any more, or `instant` has come.

    Nobody tells of a mapping that goes: with `mapped` AGAIN is also answered after an
    interval that the port names.
    """

    inode: int
    references: References
    ended: int
    mapped: bool
    instant: int


@dataclass(frozen=True, slots=True)
class TellReleased(Effect[None]):
    """Wake whoever waits for a hold on the inode to end; it has ended."""

    inode: int


@dataclass(frozen=True, slots=True)
class ArmLease(Effect[None]):
    """Have lease_expired() called for a hold in `ttl_ms`, unless renewed before.

    The time does not run while a READ of the client is parked (rule V6). `renewals`
    counts the renewals so far: an expiry that was overtaken by one is void.
    """

    hold: int
    client: str
    ttl_ms: int
    renewals: int


@dataclass(frozen=True, slots=True)
class Record(Effect[None]):
    """Have changes journalled: a row by its key, None removes (see `rows`).

    It does not wait; whoever acknowledges the operation does. What a view is about to
    show is recorded first.
    """

    changes: Mapping[str, Any]


REMOTE: Final = (
    Reserve,
    CountNodes,
    Allocate,
    Split,
    Reconstruct,
    Free,
    Unreserve,
    PoisonFrame,
    UnpoisonFrame,
    ListErrors,
    InvalidateBegin,
    InvalidateEnd,
)
BLOCKING: Final = (
    InvalidateView,
    QuiesceView,
    DrainLru,
    RemoveInode,
    FindMappings,
    ReadDescriptor,
    WriteBackView,
    LoadBytes,
    StoreBytes,
    WaitForRelease,
)
LOCAL: Final = (
    AddInode,
    Record,
    SetViewState,
    AttachFolio,
    DetachFolio,
    ClearUptodate,
    SetUptodate,
    IsUptodate,
    Prepare,
    ZeroPages,
    ScheduleMerge,
    StartWait,
    TellReleased,
    ArmLease,
    DisarmLease,
)
