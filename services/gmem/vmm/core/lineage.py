"""What the kernel series disagree on in KVM itself, as one row of rules per lineage.

No core compares lineages: a VM is given its row when it is created. How a file decodes
its flags stands in `create`, which levels stage 2 may use in `mmu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    IN_PLACE_HUGE_PAGES,
    VmType,
)
from gmem.uapi.lineage import Lineage


@dataclass(frozen=True, slots=True)
class VmRules:
    """How one series does what all of them do.

    `attributes_convert`: KVM_SET_MEMORY_ATTRIBUTES converts the files of the range.
    `files_say_private`: types of VM in which a GMEM_ONLY memslot's file says what is
    private (kvm_mem_is_private() asks the file), and its conversion is the file's own
    affair. In others the attributes of the VM say it. `every_file_says`: the files of
    other memslots as well.
    `vm_attributes`: KVM_SET_MEMORY_ATTRIBUTES of the VM takes PRIVATE.
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
    every_file_says: bool = False
    vm_attributes: bool = True


NO_TYPE: Final[frozenset[VmType]] = frozenset()
_MMAP: Final = GUEST_MEMFD_FLAG_MMAP
_MMAP_AND_INIT_SHARED: Final = _MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
# kvm_arch_supports_gmem_init_shared(): x86 has it without private memory only.
_MAINLINE_FLAGS: Final = {
    VmType.DEFAULT: _MMAP_AND_INIT_SHARED,
    VmType.SW_PROTECTED: _MMAP,
}

_IN_PLACE: Final = VmRules(
    attributes_convert=False,
    files_say_private=frozenset({VmType.SW_PROTECTED}),
    gmem_for_every_type=True,
    looks_at_userspace=False,
    flags_capability=dict.fromkeys(VmType, _MMAP_AND_INIT_SHARED | IN_PLACE_HUGE_PAGES),
    every_file_says=True,
    vm_attributes=False,
)

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
        flags_capability=_MAINLINE_FLAGS,
    ),
    Lineage.IN_PLACE: _IN_PLACE,
}

_CONVERSION_OFF: Final[Mapping[Lineage, VmRules]] = {
    **VM_RULES,
    Lineage.IN_PLACE: replace(
        _IN_PLACE,
        files_say_private=NO_TYPE,
        flags_capability={
            vm_type: flags | IN_PLACE_HUGE_PAGES
            for vm_type, flags in _MAINLINE_FLAGS.items()
        },
        every_file_says=False,
        vm_attributes=True,
    ),
}


def vm_rules_of(*, in_place_conversion: bool) -> Mapping[Lineage, VmRules]:
    """Return the rules of a host by its module parameter gmem_in_place_conversion."""
    return VM_RULES if in_place_conversion else _CONVERSION_OFF
