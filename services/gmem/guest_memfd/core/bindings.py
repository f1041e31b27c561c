"""Which memslots an inode is bound to, and which pages each was handed.

A record of handed-out pages decides whether a VMM is told of a change (rule V8): no
record, no message. It is made before get_pfn returns and dropped when an invalidation
begins, so what is handed out while one is under way is recorded anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.values import Binding
from gmem.uapi.errors import BadRequest, InUse, Reason
from gmem.uapi.pages import Gfn, PgRange


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A binding, and the pages handed out through it since their last invalidation."""

    binding: Binding
    handed_out: PageSet


class Bindings:
    """The bindings of one gmem file, by VM and slot number."""

    def __init__(self, nr_pages: int) -> None:
        self._nr_pages = nr_pages
        self._bound: dict[tuple[str, int], Bound] = {}

    def require_free(self, vm: str, slot: int, pages: PgRange) -> None:
        """Raise BadRequest (BINDING_OVERLAP) if the slot or a page is bound already."""
        for bound in self._bound.values():
            binding = bound.binding
            same_slot = (binding.vm, binding.slot) == (vm, slot)
            if same_slot or binding.pages.overlaps(pages):
                raise BadRequest(
                    Reason.BINDING_OVERLAP,
                    f"pages at offset {binding.pages.offset:#x} are bound to slot "
                    f"{binding.slot} of {binding.vm}: unbind it first",
                    offset=binding.pages.offset,
                    size=binding.pages.size,
                    slot=binding.slot,
                )

    def bind(self, binding: Binding) -> None:
        """Keep a binding that overlaps no other."""
        key = (binding.vm, binding.slot)
        assert key not in self._bound, key
        self._bound[key] = Bound(binding, PageSet(self._nr_pages))

    def unbind(self, vm: str, slot: int) -> Bound:
        """Remove and return a binding; InUse (BINDING_MISSING) if there is none."""
        bound = self.require(vm, slot)
        del self._bound[vm, slot]
        return bound

    def require(self, vm: str, slot: int) -> Bound:
        """Return a binding; InUse (BINDING_MISSING) if there is none."""
        bound = self._bound.get((vm, slot))
        if bound is None:
            raise InUse(
                Reason.BINDING_MISSING,
                f"slot {slot} of {vm} is not bound to this inode: bind it first",
                slot=slot,
            )
        return bound

    def require_gfn(self, vm: str, slot: int, gfn: Gfn) -> Bound:
        """Return the binding of a guest frame; InUse (BINDING_BROKEN) if outside."""
        bound = self.require(vm, slot)
        if gfn not in bound.binding.gfns:
            raise InUse(
                Reason.BINDING_BROKEN,
                f"guest frame {gfn:#x} is not in slot {slot} of {vm}: bind it again",
                gfn=gfn,
                slot=slot,
            )
        return bound

    def has_vm(self, vm: str) -> bool:
        """Tell whether some memslot of a VM is bound."""
        return any(bound.binding.vm == vm for bound in self._bound.values())

    def handed_out_in(self, pages: PgRange) -> list[tuple[Bound, PgRange]]:
        """Return, per binding, the smallest range of handed-out pages in `pages`."""
        found = []
        for bound in self._bound.values():
            runs = bound.handed_out.members(pages)
            if runs:
                found.append((bound, PgRange(runs[0].start, runs[-1].stop)))
        return found

    def clear(self) -> None:
        """Remove every binding (kvm_gmem_release())."""
        self._bound.clear()

    @property
    def all(self) -> tuple[Binding, ...]:
        """The bindings, in the order in which they were made."""
        return tuple(bound.binding for bound in self._bound.values())

    def check(self) -> None:
        """Assert that bindings do not overlap, and that records lie inside them."""
        taken = PageSet(self._nr_pages)
        for bound in self._bound.values():
            pages = bound.binding.pages
            assert not taken.any_in(pages), pages
            taken.add(pages)
            bound.handed_out.check()
            outside = bound.handed_out.count - sum(
                len(run) for run in bound.handed_out.members(pages)
            )
            assert outside == 0, (bound.binding, outside)
