"""What the vmm's core asks of the world: of guest_memfd, and of its guest process."""

from __future__ import annotations

from dataclasses import dataclass

from gmem.effects import Effect
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.invalidate import Notice


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes `[offset, offset + size)` of the guest_memfd `name`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What kvm_gmem_get_pfn returns: the page's frame and its folio's order.

    `shared` is what the file says of the page, and of the `npages` from it on. Where it
    is not what was meant, `matches` is False and there is no frame.
    """

    pfn: int
    order: int
    shared: bool = False
    npages: int = 1
    matches: bool = True


@dataclass(frozen=True, slots=True)
class CreateFile(Effect[str]):
    """Make a guest_memfd that `vm` alone may bind; the reply is its name."""

    vm: str
    size: int
    page_size: int
    lineage: Lineage
    support_shared: bool = False
    init_private: bool = False
    mmap: bool = False
    init_shared: bool = False
    private_memory: bool = True
    cgroup: str = ""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What fstat says a descriptor is, and the byte in it that is meant."""

    st_dev: int
    st_ino: int
    offset: int


@dataclass(frozen=True, slots=True)
class IdentifyDescriptor(Effect[FileIdentity]):
    """Look at a descriptor that our broker was given; DESCRIPTOR_UNKNOWN."""

    descriptor: str
    offset: int


@dataclass(frozen=True, slots=True)
class BindSlot(Effect[bool]):
    """kvm_gmem_bind: sizes and offsets in bytes.

    The reply is kvm_gmem_memslot_supports_shared(): whether the guest's shared accesses
    come from the file too.
    """

    name: str
    vm: str
    slot: int
    base_gfn: int
    offset: int
    size: int
    host_faultable: bool
    userspace: FileIdentity | None = None


@dataclass(frozen=True, slots=True)
class UnbindSlot(Effect[None]):
    """kvm_gmem_unbind; the memory stays."""

    name: str
    vm: str
    slot: int


@dataclass(frozen=True, slots=True)
class GetPfn(Effect[Frame]):
    """kvm_gmem_get_pfn: allocates on first touch.

    `meant_shared` is the kind of page that the access is for, where the file decides;
    None takes either. `npages` shared ones are wanted.
    """

    name: str
    vm: str
    slot: int
    gfn: int
    meant_shared: bool | None = None
    npages: int = 1


@dataclass(frozen=True, slots=True)
class Convert(Effect[None]):
    """Convert ranges of one or more files, with the series' rollback over all."""

    ranges: tuple[FileRange, ...]
    to_shared: bool
    validate_only: bool = False
    undone: bool = True
    """Whether pages in use are refused as the series does (PAGE_IN_USE), rollback and
    all; else such a refusal changes nothing, and is called DEADLINE."""


@dataclass(frozen=True, slots=True)
class StartWait(Effect[int]):
    """Reply: the instant that lies `milliseconds` ahead on the world's clock. Local."""

    milliseconds: int


@dataclass(frozen=True, slots=True)
class Pause(Effect[None]):
    """Let time pass, for who looks again."""

    milliseconds: int


@dataclass(frozen=True, slots=True)
class WaitConvertible(Effect[None]):
    """Wait until nobody holds pages of the ranges; DEADLINE when `instant` has come."""

    ranges: tuple[FileRange, ...]
    to_shared: bool
    instant: int


@dataclass(frozen=True, slots=True)
class Populate(Effect[None]):
    """kvm_gmem_populate from a descriptor that guest_memfd's broker was given."""

    target: FileRange
    descriptor: str
    source_offset: int


@dataclass(frozen=True, slots=True)
class RequireDescriptor(Effect[None]):
    """Refuse (DESCRIPTOR_UNKNOWN) a name that our broker did not give out. Local."""

    descriptor: str


@dataclass(frozen=True, slots=True)
class StartGuest(Effect[int]):
    """Spawn the VM's guest process; the reply is its pid."""

    vm: str


@dataclass(frozen=True, slots=True)
class EndGuest(Effect[None]):
    """End the VM's guest process and wait until it is gone."""

    vm: str


@dataclass(frozen=True, slots=True)
class MapUserspace(Effect[None]):
    """Let the guest process map `size` bytes of a descriptor as window `window`."""

    vm: str
    window: int
    base_gfn: int
    size: int
    descriptor: str
    offset: int


@dataclass(frozen=True, slots=True)
class MapGuestView(Effect[None]):
    """Let the guest process take and map the guest view of a guest_memfd."""

    vm: str
    window: int
    base_gfn: int
    size: int
    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class MapHostView(Effect[None]):
    """Let the guest process take and map the host view, for its shared accesses."""

    vm: str
    window: int
    base_gfn: int
    size: int
    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class UnmapWindow(Effect[None]):
    """Tell the guest process to drop a window; never waits, never fails. Local."""

    vm: str
    window: int


@dataclass(frozen=True, slots=True)
class NotifyGuest(Effect[None]):
    """Publish a notice to the guest process; never waits, never fails. Local."""

    vm: str
    notice: Notice
