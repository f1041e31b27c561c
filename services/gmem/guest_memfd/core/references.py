"""Who holds pages of an inode beside its filemap: named holds and open views.

A hold is on folios, not on offsets: when its pages are punched, the folio leaves the
filemap and lives on as an *orphan* until its last hold goes, as a page does whose
reference count is not yet zero. A new folio at the same offset is not held.

    pin      refuses a conversion to private (folio_maybe_dma_pinned())
    plain    does not in the 39-patch series, which looks at map and pin counts only;
             later series compare the reference count, where both are one reference
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from gmem.guest_memfd.core.values import Folio, Hold, HoldKind, ViewKind
from gmem.uapi.errors import Exhausted, NoSuchObject, Reason
from gmem.uapi.pages import PgRange

HOLDS_MAX: Final = 4096


@dataclass(slots=True)
class Orphan:
    """A folio that left the filemap while `holders` (hold numbers) held it."""

    folio: Folio
    split: bool
    holders: list[int]


@dataclass(slots=True)
class _Held:
    """A hold, and the parts of it whose folios are still in the filemap."""

    hold: Hold
    live: list[PgRange] = field(default_factory=list)


class References:
    """Holds, orphans and open views of one inode."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self.orphans: list[Orphan] = []
        self.views_open: dict[ViewKind, int] = dict.fromkeys(ViewKind, 0)
        # Holds that have changed, and whether orphans have, since the last `drain`.
        self._touched: dict[int, None] = {}
        self._orphans_changed = False
        # How many holds have ended: whoever waits for one compares.
        self.ended = 0

    def __contains__(self, hold: object) -> bool:
        """Tell whether a hold of this number is here."""
        return hold in self._held

    def require_room(self) -> None:
        """Raise Exhausted (LIMIT_REACHED) when no further hold can be kept."""
        if len(self._held) >= HOLDS_MAX:
            raise Exhausted(
                Reason.LIMIT_REACHED,
                f"the inode has {HOLDS_MAX} holds already: end one first",
                limit=HOLDS_MAX,
            )

    def take(self, hold: Hold, live: list[PgRange] | None = None) -> None:
        """Keep a hold; `live` are its pages that have a folio, all where None."""
        assert hold.hold not in self._held, hold
        self._held[hold.hold] = _Held(hold, [hold.pages] if live is None else live)
        self._touched[hold.hold] = None

    def put(self, hold: int) -> list[Orphan]:
        """End a hold that is here; return the orphans that nobody holds any more."""
        del self._held[hold]
        self._touched[hold] = None
        self.ended += 1
        for orphan in self.orphans:
            orphan.holders = [number for number in orphan.holders if number != hold]
        released = [orphan for orphan in self.orphans if not orphan.holders]
        self._orphans_changed |= bool(self.orphans)
        self.orphans = [orphan for orphan in self.orphans if orphan.holders]
        return released

    def of_client(self, client: str) -> list[int]:
        """Return the numbers of the holds that a client took."""
        return [n for n, held in self._held.items() if held.hold.client == client]

    def pins_in(self, pages: PgRange) -> list[tuple[int, Hold]]:
        """Return the pins on pages of `pages`, each with its first page there."""
        holds = self.holds_in(pages)
        return [(pgoff, hold) for pgoff, hold in holds if hold.kind is HoldKind.PIN]

    def holds_in(self, pages: PgRange) -> list[tuple[int, Hold]]:
        """Return the holds on pages of `pages`, each with its first page there."""
        found = []
        for held in self._held.values():
            parts = [part for part in held.live if part.overlaps(pages)]
            if parts:
                found.append((parts[0].intersection(pages).start, held.hold))
        return found

    def holds_any(self, pages: PgRange) -> bool:
        """Tell whether somebody holds a page of `pages` that is in the filemap."""
        return any(
            part.overlaps(pages) for held in self._held.values() for part in held.live
        )

    def orphan(self, unit: PgRange, folio: Folio, *, split: bool) -> bool:
        """Keep a folio that leaves the filemap if somebody holds it; tell whether."""
        holders = []
        for number, held in self._held.items():
            if any(part.overlaps(unit) for part in held.live):
                holders.append(number)
                held.live = [rest for part in held.live for rest in minus(part, unit)]
        if holders:
            self.orphans.append(Orphan(folio, split, holders))
            self._touched.update(dict.fromkeys(holders))
            self._orphans_changed = True
        return bool(holders)

    def held_pages(self) -> list[PgRange]:
        """Return the runs of pages in the filemap that are held, in no order."""
        return [part for held in self._held.values() for part in held.live]

    def leave(self) -> tuple[list[tuple[Hold, list[PgRange]]], list[Orphan]]:
        """Take every hold, with its pages in the filemap, and every orphan out.

        For an inode that goes while its pages are held.
        """
        held = [(entry.hold, entry.live) for entry in self._held.values()]
        orphans, self.orphans = self.orphans, []
        self._held.clear()
        self._orphans_changed = True
        return held, orphans

    def held(self) -> list[tuple[Hold, list[PgRange]]]:
        """Return every hold with its pages that are in the filemap."""
        return [(entry.hold, entry.live) for entry in self._held.values()]

    def drain(self) -> dict[int, tuple[Hold, list[PgRange]] | None]:
        """Return the holds that have changed since the last call; None: it is gone."""
        touched, self._touched = self._touched, {}
        now = {number: self._held.get(number) for number in touched}
        return {n: (held.hold, held.live) if held else None for n, held in now.items()}

    def drain_orphans(self) -> bool:
        """Tell whether the orphans have changed since the last call."""
        changed, self._orphans_changed = self._orphans_changed, False
        return changed

    def touch_orphans(self) -> None:
        """Have `drain_orphans` tell of a change that was made from outside."""
        self._orphans_changed = True

    @property
    def holds(self) -> tuple[Hold, ...]:
        """All holds, in the order in which they were taken."""
        return tuple(held.hold for held in self._held.values())

    @property
    def any_view_open(self) -> bool:
        """Whether some file of a view is open."""
        return any(self.views_open.values())

    def check(self) -> None:
        """Assert that views are counted, and that orphans have living holders."""
        assert all(count >= 0 for count in self.views_open.values()), self.views_open
        for orphan in self.orphans:
            assert orphan.holders, orphan
            assert all(number in self._held for number in orphan.holders), orphan


def minus(part: PgRange, unit: PgRange) -> list[PgRange]:
    """Return what is left of `part` outside `unit`."""
    if not part.overlaps(unit):
        return [part]
    before = PgRange(part.start, max(part.start, unit.start))
    after = PgRange(min(part.stop, unit.stop), part.stop)
    return [rest for rest in (before, after) if rest]


def no_such_hold(hold: int) -> NoSuchObject:
    """Make the refusal of a hold that is not there: HOLDER_UNKNOWN."""
    return NoSuchObject(
        Reason.HOLDER_UNKNOWN,
        f"hold {hold} was never issued, or is gone: there is nothing to end or keep",
        hold=hold,
    )
