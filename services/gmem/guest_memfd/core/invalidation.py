"""The bracket around a change that a VM's stage 2 must not race.

As kvm_gmem_invalidate_begin() and _end(), for those VMs alone that were handed pages of
the range since its last invalidation (rule V8).
"""

from __future__ import annotations

from gmem.effects import Op, perform
from gmem.guest_memfd.core.bindings import Bound
from gmem.guest_memfd.core.effects import InvalidateBegin, InvalidateEnd
from gmem.guest_memfd.core.inode import Inode
from gmem.uapi.pages import PgRange


def invalidate_begin(
    inode: Inode, pages: PgRange, begun: list[InvalidateEnd]
) -> Op[None]:
    """Have every VM zap what it was handed of `pages`; note in `begun` what to end."""
    handed = inode.bindings.handed_out_in(pages)
    for bound, _ in handed:
        # Before the messages: what is handed out while they are on their way is news.
        bound.handed_out.discard(pages)
    yield from announce(handed, begun)


def announce(
    handed: list[tuple[Bound, PgRange]], begun: list[InvalidateEnd]
) -> Op[None]:
    """Tell the VM of each binding to zap pages that it was handed."""
    for bound, handed_out in handed:
        binding = bound.binding
        gfns = binding.gfns_of(handed_out)
        begun.append(InvalidateEnd(binding.vm, binding.vmm_target, gfns))
        yield from perform(InvalidateBegin(binding.vm, binding.vmm_target, gfns))


def invalidate_end(begun: list[InvalidateEnd]) -> Op[None]:
    """End what began, in the order in which it began."""
    for effect in begun:
        yield from perform(effect)
