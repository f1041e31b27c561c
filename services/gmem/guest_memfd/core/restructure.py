"""Splitting and reconstructing the folios of an inode; the policy that says when.

Split: every present folio that touches a newly shared range (rounded *out*).
Reconstruct: every folio of a newly private range with no shared page left.

The 39-patch series rounds that range *in*: one that is smaller than a folio, made
shared and private again, leaves it split, until a conversion covers the folio. And it
clears the folio's uptodate flag: the whole huge page is zeroed on next use, its private
neighbours too, so they are withdrawn from the guest meanwhile. A plain reference does
not stop a reconstruction.

A split folio with a memory error is not made whole: the guest would lose all of it. A
whole one that is split loses the bad page alone from then on (docs/adr/0021).

The 51-patch series rounds *out*, and keeps the flags and with them every byte. Frames
do not move, so nobody beside the range notices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gmem.effects import Effect, Op, perform
from gmem.guest_memfd.core.effects import ClearUptodate, Reconstruct, Split
from gmem.guest_memfd.core.exposure import show, with_withdrawn_guest
from gmem.guest_memfd.core.filemap import Entry
from gmem.guest_memfd.core.folios import detach
from gmem.guest_memfd.core.inode import Inode
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange


class RestructurePolicy(Protocol):
    """When folios are split and reconstructed after faultability was stored."""

    @property
    def keeps_content(self) -> bool:
        """Whether the bytes of a folio outlive a split and a reconstruction."""

    def match(self, inode: Inode, pages: PgRange, value: Faultability) -> Op[None]:
        """Give the folios of `pages` the structure that the new value asks for.

        Raises Exhausted (VMEMMAP_RESTORE_FAILED) at the first folio that cannot be
        split; that one and those behind it are whole.
        """


@dataclass(frozen=True, slots=True)
class Eager:
    """At once, inside the conversion.

    `rounds_out`: a conversion to private of a part of a folio can make it whole.
    """

    rounds_out: bool
    keeps_content: bool

    def match(self, inode: Inode, pages: PgRange, value: Faultability) -> Op[None]:
        """Split, or reconstruct, one unit after the other."""
        if inode.order == 0:
            return
        split = value is Faultability.ALL
        out = split or self.rounds_out
        touched = pages if out else pages.rounded_in(inode.order)
        for index in inode.filemap.present(touched):
            entry = inode.filemap.get(index)
            settled = entry is None or entry.split is split
            if not settled or inode.folio_locks.is_held(inode.unit_of(index)):
                yield from _match_unit(inode, index)


def retire_whole_folios(inode: Inode, pages: PgRange) -> Op[None]:
    """Detach whole folios that have a shared page: the next fault splits them.

    Where sharing did not split at once: a default set by bind, a failed rollback.
    """
    if inode.order == 0:
        return
    for index in inode.filemap.present(pages):
        held = yield from inode.folio_locks.take(inode.unit_of(index))
        try:
            entry = inode.filemap.get(index)
            if entry is not None and entry.attached and _is_overdue(inode, index):
                parts = inode.shown_private(inode.unit_of(index))
                yield from with_withdrawn_guest(inode, parts, detach(inode, [index]))
        finally:
            yield from inode.folio_locks.give(held)


def _is_overdue(inode: Inode, index: int) -> bool:
    entry = inode.filemap.get(index)
    return entry is not None and not entry.split and inode.wants_split(index)


def _match_unit(inode: Inode, index: int) -> Op[None]:
    held = yield from inode.folio_locks.take(inode.unit_of(index))
    try:
        # A guest fault may have been at work on the unit: look again.
        entry = inode.filemap.get(index)
        if entry is None or entry.split is inode.wants_split(index):
            return
        unit = inode.unit_of(index)
        is_bad = inode.poisoned.any_in(unit)
        if is_bad and entry.split:
            return
        yield from _restructure(inode, index, entry)
        if is_bad:
            # What was lost with the bad page is back.
            for part in inode.shown_private(unit):
                yield from show(inode, part)
    finally:
        yield from inode.folio_locks.give(held)


def _restructure(inode: Inode, index: int, entry: Entry) -> Op[None]:
    """Change the structure of a unit; where bytes are lost, unseen by neighbours."""
    unit = inode.unit_of(index)
    keeps_content = inode.rules.restructure.keeps_content
    effect: Effect[int] = (
        Reconstruct(inode.handle, entry.folio)
        if entry.split
        else Split(inode.handle, entry.folio)
    )

    def body() -> Op[None]:
        yield from perform(effect)
        inode.filemap.set_split(index, split=not entry.split)
        if not keeps_content:
            yield from perform(ClearUptodate(inode.number, unit))

    # Nothing of an unattached folio is mapped anywhere.
    seen = entry.attached and not keeps_content
    parts = inode.shown_private(unit) if seen else []
    yield from with_withdrawn_guest(inode, parts, body())
