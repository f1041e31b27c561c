"""What the kernel series disagree on in KVM itself, as one row of rules per lineage.

No core compares lineages: a VM is given its row when it is created. How a file decodes
its flags stands in `create`, which levels stage 2 may use in `mmu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gmem.uapi.lineage import Lineage


@dataclass(frozen=True, slots=True)
class VmRules:
    """How one series does what all of them do.

    `attributes_convert`: KVM_SET_MEMORY_ATTRIBUTES converts the files of the range.
    Otherwise it is userspace that converts them, and the attributes of a memslot whose
    file supports shared pages mean nothing (kvm_mem_is_private() asks the file).
    `gmem_for_every_type`: VMs without private memory may have GUEST_MEMFD memslots.
    `looks_at_userspace`: a bind compares the userspace side with the file.
    """

    attributes_convert: bool
    gmem_for_every_type: bool
    looks_at_userspace: bool


VM_RULES: Final[Mapping[Lineage, VmRules]] = {
    Lineage.RFC_V1: VmRules(
        attributes_convert=True, gmem_for_every_type=False, looks_at_userspace=False
    ),
    Lineage.RFC_V2: VmRules(
        attributes_convert=False, gmem_for_every_type=True, looks_at_userspace=True
    ),
}
