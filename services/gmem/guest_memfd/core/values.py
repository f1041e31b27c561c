"""What crosses the boundary of the guest_memfd core: every value here is frozen.

Names are the kernel's. Ranges are PgRange (pages, half-open) inside, bytes (`offset`,
`size`) where a system call or a wire has bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TypeAlias

from gmem.uapi.errors import Reason
from gmem.uapi.flags import KVM_MEMORY_ATTRIBUTE_PRIVATE, Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import Gfn, NodeId, Pfn, PgOff, PgRange


class ViewKind(IntEnum):
    """Which of an inode's two files: the host's, or the guest's (its stage 2)."""

    HOST = 0
    GUEST = 1


class PageState(IntEnum):
    """The state of one page in one view (rule V4); zero is what a new page has."""

    CLOSED = 0
    CLOSING = 1
    OPEN = 2
    QUIESCED = 3


@dataclass(frozen=True, slots=True, order=True)
class Folio:
    """One allocation unit: 2^order pages that begin at frame `pfn` of `node`."""

    pfn: Pfn
    order: int
    node: NodeId


class MemPolicyMode(Enum):
    """How a policy picks nodes (MPOL_*)."""

    DEFAULT = "default"
    BIND = "bind"
    PREFERRED = "preferred"
    INTERLEAVE = "interleave"


@dataclass(frozen=True, slots=True)
class MemPolicy:
    """The NUMA memory policy that an inode's folios are allocated with."""

    mode: MemPolicyMode = MemPolicyMode.DEFAULT
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HostMapping:
    """Bytes `[offset, offset + size)` of a host view that a process has mapped.

    Mapped means present in its page tables, as folio_mapped() has it: a window that
    nobody touched, or that MADV_DONTNEED emptied, is none.
    """

    pid: int
    """0 for a process of another pid namespace, whose number here nobody knows."""
    comm: str
    offset: int
    size: int

    @property
    def holder(self) -> str:
        """The process, as errors name it."""
        if self.pid == 0:
            return f"{self.comm} in another pid namespace"
        return f"pid {self.pid} ({self.comm})"


class HoldKind(Enum):
    """What a hold on pages counts as."""

    PIN = "pin"
    """folio_maybe_dma_pinned(): refuses a conversion to private."""
    PLAIN = "plain"
    """A plain reference: the 39-patch series does not look at it, the next one does."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A named hold on pages of one inode; `hold` is unique in one core.

    `ttl_ms` is that of its lease; 0: it has none, and ends with its client.
    """

    hold: int
    kind: HoldKind
    holder: str
    client: str
    inode: int
    pages: PgRange
    ttl_ms: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """A memslot bound to pages of one inode (kvm_gmem_bind)."""

    vm: str
    slot: int
    base_gfn: Gfn
    pages: PgRange
    host_faultable: bool
    vmm_target: str

    def pgoff_of(self, gfn: Gfn) -> PgOff:
        """Translate a guest frame; the only place gfn and pgoff ever meet."""
        assert gfn in self.gfns, (gfn, self.gfns)
        return PgOff(gfn - self.base_gfn + self.pages.start)

    def gfns_of(self, pages: PgRange) -> PgRange:
        """Translate pages of the binding back to guest frames."""
        assert self.pages.covers(pages), (pages, self.pages)
        return pages.shifted(self.base_gfn - self.pages.start)

    @property
    def gfns(self) -> PgRange:
        """The guest frames of the memslot."""
        return PgRange(self.base_gfn, self.base_gfn + len(self.pages))


@dataclass(frozen=True, slots=True)
class AttributesCall:
    """struct kvm_memory_attributes2 as KVM_SET_MEMORY_ATTRIBUTES2 brings it."""

    offset: int
    size: int
    attributes: int
    flags: int = 0
    error_offset: int = 0
    reserved: tuple[int, ...] = (0,) * 11

    @property
    def to(self) -> Faultability:
        """What the pages are to become, if the attributes are any."""
        private = self.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE
        return Faultability.GUEST if private else Faultability.ALL


@dataclass(frozen=True, slots=True)
class UserspaceSide:
    """What a memslot's userspace_addr maps: a descriptor, from byte `offset` on.

    `inode` is the inode whose host view it is, None for any other file.
    """

    inode: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class Mapped:
    """Outcome of a host fault: the page is there, at frame `pfn`."""

    pfn: Pfn


@dataclass(frozen=True, slots=True)
class Sigbus:
    """Outcome of a host fault: the access dies by SIGBUS, because of `reason`."""

    reason: Reason


FaultOutcome: TypeAlias = Mapped | Sigbus


@dataclass(frozen=True, slots=True)
class GuestPage:
    """What kvm_gmem_get_pfn() returns: a frame, and the order it may be mapped with.

    `shared`: the page is reached through the host view. So are the `nr_pages` from it
    on, as far as they were asked for; each gets its folio when it is touched.
    """

    pfn: Pfn
    order: int
    shared: bool = False
    nr_pages: int = 1


@dataclass(frozen=True, slots=True)
class WrongAccess:
    """Outcome of a guest fault that meant the other kind of page: nothing was done."""


GuestFaultOutcome: TypeAlias = GuestPage | WrongAccess


@dataclass(frozen=True, slots=True)
class Fragment:
    """A maximal run of pages with one faultability."""

    pages: PgRange
    faultability: Faultability


@dataclass(frozen=True, slots=True)
class MergeStatus:
    """Split folios of a dead inode on their way back to the allocator.

    `pages_left` have not been put by everybody who holds them; `folios_left` have not
    been given back. `error` says why the work ended without that.
    """

    number: int
    inode: int
    pages_left: int
    folios_left: int
    done: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class InodeStatistics:
    """A snapshot of one inode: fstat's fields, its folios, who holds what.

    `fragments` lists the first FRAGMENTS_LISTED_MAX runs; `nr_fragments` counts all.
    `poisoned_offsets` are those of the first POISONED_LISTED_MAX pages with an error.
    `orphaned_folios` were punched while somebody held them. `rollback_warnings` counts
    what the series reports by WARN_ON: a rollback that could not be finished.
    """

    inode: int
    lineage: Lineage
    vm: str
    i_size: int
    page_size: int
    st_blocks: int
    st_blksize: int
    file_open: bool
    host_views_open: int
    guest_views_open: int
    whole_folios: int
    split_folios: int
    orphaned_folios: int
    shared_pages: int
    private_pages: int
    bindings: tuple[Binding, ...]
    holds: tuple[Hold, ...]
    fragments: tuple[Fragment, ...]
    nr_fragments: int
    rollback_warnings: int
    cgroup: str
    poisoned_pages: int
    poisoned_offsets: tuple[int, ...]
