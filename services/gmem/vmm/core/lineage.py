"""What the kernel series disagree on in KVM itself, as one row of rules per lineage.

No core compares lineages: a VM is given its row when it is created. How a file decodes
its flags stands in `create`, which levels stage 2 may use in `mmu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    VmType,
)
from gmem.uapi.lineage import Lineage


@dataclass(frozen=True, slots=True)
class VmRules:
    """How one series does what all of them do.

    `attributes_convert`: KVM_SET_MEMORY_ATTRIBUTES converts the files of the range.
    `files_say_private`: types of VM in which a GMEM_ONLY memslot's file says what is
    private (kvm_mem_is_private() asks the file), and its conversion is the file's own
    affair. In others the attributes of the VM say it.
    `gmem_for_every_type`: VMs without private memory may have GUEST_MEMFD memslots.
    `looks_at_userspace`: a bind compares the userspace side with the file.
    `flags_capability`: what KVM_CAP_GUEST_MEMFD_FLAGS answers, by type of VM; None
    where there is no such capability.
    """

    attributes_convert: bool
    files_say_private: frozenset[VmType]
    gmem_for_every_type: bool
    looks_at_userspace: bool
    flags_capability: Mapping[VmType, int] | None = None


NO_TYPE: Final[frozenset[VmType]] = frozenset()
_MMAP: Final = GUEST_MEMFD_FLAG_MMAP
_MMAP_AND_INIT_SHARED: Final = _MMAP | GUEST_MEMFD_FLAG_INIT_SHARED

VM_RULES: Final[Mapping[Lineage, VmRules]] = {
    Lineage.RFC_V1: VmRules(
        attributes_convert=True,
        files_say_private=NO_TYPE,
        gmem_for_every_type=False,
        looks_at_userspace=False,
    ),
    Lineage.RFC_V2: VmRules(
        attributes_convert=False,
        files_say_private=frozenset(VmType),
        gmem_for_every_type=True,
        looks_at_userspace=True,
    ),
    Lineage.MAINLINE: VmRules(
        attributes_convert=False,
        files_say_private=NO_TYPE,
        gmem_for_every_type=True,
        looks_at_userspace=False,
        # kvm_arch_supports_gmem_init_shared(): x86 has it without private memory only.
        flags_capability={
            VmType.DEFAULT: _MMAP_AND_INIT_SHARED,
            VmType.SW_PROTECTED: _MMAP,
        },
    ),
}
