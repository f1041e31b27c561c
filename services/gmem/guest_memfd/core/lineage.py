"""What the kernel series disagree on, as one row of rules per lineage.

No core compares lineages: an inode is given its row when it is created.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from gmem.effects import Mode
from gmem.guest_memfd.core.conversion import ConvertPolicy, convert
from gmem.guest_memfd.core.conversion_exact import convert_exactly
from gmem.guest_memfd.core.conversion_in_place import convert_in_place
from gmem.guest_memfd.core.conversion_none import refuse_conversion
from gmem.guest_memfd.core.creation import (
    ByBind,
    ByFlags,
    ByMmapFlags,
    CreationPolicy,
)
from gmem.guest_memfd.core.eviction import (
    EvictPolicy,
    free_at_once,
    free_page_by_page,
    merge_then_free_page_by_page,
)
from gmem.guest_memfd.core.in_use import (
    FreeableTest,
    anything_is_freeable,
    require_unreferenced_if_huge,
    require_unreferenced_if_split,
)
from gmem.guest_memfd.core.memory_failure import (
    MemoryFailurePolicy,
    delayed_is_failed,
)
from gmem.guest_memfd.core.restructure import Eager, RestructurePolicy
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_SET_MEMORY_ATTRIBUTES2,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE


class Operation(Enum):
    """What may need an inode's invalidate_lock."""

    ALLOCATE = "allocate"
    PUNCH = "punch"
    BIND = "bind"
    UNBIND = "unbind"
    CLOSE = "close"
    HOST_FAULT = "host_fault"
    GET_PFN = "get_pfn"
    PIN = "pin"
    POPULATE = "populate"
    READ = "read"
    WRITE = "write"
    CONVERT = "convert"
    EVICT = "evict"
    SET_MEMPOLICY = "set_mempolicy"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LineageRules:
    """How one series does what all of them do.

    `lock_modes` says how each operation takes the invalidate_lock (None: not at all);
    `bind_sets_faultability` whether a bind overwrites the range with the default of
    the VM's type; `convert_ioctls` which ioctls of the file convert;
    `fallocates_folios` whether fallocate takes whole folios alone;
    `holds_keep_inode` whether a page that is held keeps its inode alive;
    `require_punchable` looks at all that a punch is to free before any of it goes, and
    `require_freeable` at each huge unit of it in turn;
    `mempolicy_by_range` whether the file has memory policies of its own (mbind);
    `counts_base_pages` whether st_blocks counts pages of 4K, too; `charges_rsvd`
    whether a cgroup pays for reservations. The others are
    policies.
    """

    lock_modes: Mapping[Operation, Mode | None]
    creation: CreationPolicy
    bind_sets_faultability: bool
    convert: ConvertPolicy
    convert_ioctls: frozenset[int]
    fallocates_folios: bool
    restructure: RestructurePolicy
    require_punchable: FreeableTest
    require_freeable: FreeableTest
    holds_keep_inode: bool
    evict_folios: EvictPolicy
    mempolicy_by_range: bool
    memory_failure: MemoryFailurePolicy
    charges_rsvd: bool
    counts_base_pages: bool = True

    def counts_blocks(self, page_size: int) -> bool:
        """Whether st_blocks of a file with such pages counts its folios."""
        return self.counts_base_pages or page_size > PAGE_SIZE


_RFC_V1_MODES: Final[Mapping[Operation, Mode | None]] = {
    Operation.ALLOCATE: Mode.SHARED,
    Operation.PUNCH: Mode.EXCLUSIVE,
    Operation.BIND: Mode.EXCLUSIVE,
    Operation.UNBIND: Mode.EXCLUSIVE,
    Operation.CLOSE: Mode.EXCLUSIVE,
    Operation.HOST_FAULT: Mode.SHARED,
    # kvm_gmem_get_pfn() takes no lock in this series: it can meet a folio that is
    # being truncated. The mmu_invalidate sequence of the VM catches it.
    Operation.GET_PFN: None,
    Operation.PIN: Mode.SHARED,
    Operation.POPULATE: Mode.EXCLUSIVE,
    # No series has them: a read is as a host fault, a write quiesces the host view.
    Operation.READ: Mode.SHARED,
    Operation.WRITE: Mode.EXCLUSIVE,
    Operation.CONVERT: Mode.EXCLUSIVE,
    Operation.EVICT: Mode.EXCLUSIVE,
    Operation.SET_MEMPOLICY: None,
    Operation.ERROR: Mode.EXCLUSIVE,
}

_RFC_V2_IOCTLS: Final = frozenset((KVM_GMEM_CONVERT_SHARED, KVM_GMEM_CONVERT_PRIVATE))
_NO_IOCTLS: Final[frozenset[int]] = frozenset()

_IN_PLACE: Final = LineageRules(
    lock_modes={**_RFC_V1_MODES, Operation.GET_PFN: Mode.SHARED},
    creation=ByMmapFlags(huge_pages=True),
    bind_sets_faultability=False,
    convert=convert_in_place,
    convert_ioctls=frozenset((KVM_SET_MEMORY_ATTRIBUTES2,)),
    fallocates_folios=True,
    restructure=Eager(rounds_out=True, keeps_content=True),
    require_punchable=require_unreferenced_if_huge,
    require_freeable=anything_is_freeable,
    holds_keep_inode=False,
    evict_folios=merge_then_free_page_by_page,
    mempolicy_by_range=True,
    memory_failure=delayed_is_failed,
    charges_rsvd=True,
)

RULES: Final[Mapping[Lineage, LineageRules]] = {
    Lineage.RFC_V1: LineageRules(
        lock_modes=_RFC_V1_MODES,
        creation=ByBind(),
        bind_sets_faultability=True,
        convert=convert,
        convert_ioctls=_NO_IOCTLS,
        fallocates_folios=False,
        restructure=Eager(rounds_out=False, keeps_content=False),
        require_punchable=anything_is_freeable,
        require_freeable=anything_is_freeable,
        holds_keep_inode=True,
        evict_folios=free_at_once,
        mempolicy_by_range=False,
        memory_failure=delayed_is_failed,
        charges_rsvd=False,
    ),
    Lineage.RFC_V2: LineageRules(
        lock_modes={**_RFC_V1_MODES, Operation.GET_PFN: Mode.SHARED},
        creation=ByFlags(),
        bind_sets_faultability=False,
        convert=convert_exactly,
        convert_ioctls=_RFC_V2_IOCTLS,
        fallocates_folios=False,
        restructure=Eager(rounds_out=True, keeps_content=True),
        require_punchable=anything_is_freeable,
        require_freeable=require_unreferenced_if_split,
        holds_keep_inode=False,
        evict_folios=free_page_by_page,
        mempolicy_by_range=False,
        counts_base_pages=False,
        memory_failure=delayed_is_failed,
        charges_rsvd=True,
    ),
    Lineage.IN_PLACE: _IN_PLACE,
    Lineage.MAINLINE: LineageRules(
        lock_modes={**_RFC_V1_MODES, Operation.GET_PFN: Mode.SHARED},
        creation=ByMmapFlags(),
        bind_sets_faultability=False,
        convert=refuse_conversion,
        convert_ioctls=_NO_IOCTLS,
        fallocates_folios=False,
        restructure=Eager(rounds_out=True, keeps_content=True),
        require_punchable=anything_is_freeable,
        require_freeable=anything_is_freeable,
        holds_keep_inode=False,
        evict_folios=free_page_by_page,
        mempolicy_by_range=True,
        counts_base_pages=False,
        memory_failure=delayed_is_failed,
        charges_rsvd=True,
    ),
}

_CONVERSION_OFF: Final[Mapping[Lineage, LineageRules]] = {
    **RULES,
    Lineage.IN_PLACE: replace(
        _IN_PLACE,
        convert=refuse_conversion,
        convert_ioctls=_NO_IOCTLS,
    ),
}


def rules_of(*, in_place_conversion: bool) -> Mapping[Lineage, LineageRules]:
    """Return the rules of a host by its module parameter gmem_in_place_conversion."""
    return RULES if in_place_conversion else _CONVERSION_OFF
