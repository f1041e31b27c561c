"""No conversion in place: who may fault a page is fixed when the file is made.

In mainline the attributes of the VM say how a guest accesses a page, and userspace
keeps shared and private memory apart: what becomes shared is taken from elsewhere, or
from a file that was shared from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

from gmem.effects import Op
from gmem.guest_memfd.core.conversion import ConvertItem
from gmem.uapi.errors import Reason, Unsupported
from gmem.uapi.flags import Faultability


def refuse_conversion(
    items: Sequence[ConvertItem],
    to: Faultability,
    *,
    validate_only: bool = False,
    waits: bool = False,
) -> Op[None]:
    """Raise Unsupported (IOCTL_UNKNOWN), whatever the pages have."""
    del to, validate_only, waits
    inode = items[0].inode
    yield from ()
    raise Unsupported(
        Reason.IOCTL_UNKNOWN,
        f"a file of {inode.options.lineage} is not converted in place: set the "
        "attributes of its VM (KVM_SET_MEMORY_ATTRIBUTES), which say how the guest "
        "accesses a page",
        inode=inode.number,
    )
