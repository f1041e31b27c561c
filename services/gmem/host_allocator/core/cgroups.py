"""HugeTLB cgroups: who is charged for reservations (rsvd) and for folios (usage).

    hugetlb.<size>.rsvd    from reserve until the subpool is gone, where it is charged
    hugetlb.<size>         from allocate until free

A charge counts in the cgroup and in each of its ancestors up to the root `/`; it fails
where one of them would pass its limit (page_counter_try_charge()), and then nothing is
charged and an event is counted. Nothing of 4K is charged: that is memcg's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from gmem.uapi.errors import (
    BadRequest,
    Exhausted,
    InUse,
    NoSuchObject,
    ObjectExists,
    Reason,
)
from gmem.uapi.pages import HUGE_PAGE_SIZES, format_size

ROOT: Final = "/"
CGROUPS_MAX: Final = 4096
_NAME: Final = re.compile(r"(/[A-Za-z0-9_.-]{1,63}){1,8}")


@dataclass(slots=True)
class PageCounter:
    """struct page_counter, in pages; `max` None is no limit."""

    usage: int = 0
    max: int | None = None
    watermark: int = 0

    @property
    def room(self) -> int | None:
        """How much more may be charged; None: any number."""
        return None if self.max is None else max(0, self.max - self.usage)

    def charge(self, nr_pages: int) -> None:
        """Count pages; there is room."""
        self.usage += nr_pages
        self.watermark = max(self.watermark, self.usage)

    def uncharge(self, nr_pages: int) -> None:
        """Count pages no longer."""
        self.usage -= nr_pages


@dataclass(slots=True)
class SizeCounters:
    """The counters of one page size; events are of charges that failed."""

    usage: PageCounter = field(default_factory=PageCounter)
    rsvd: PageCounter = field(default_factory=PageCounter)
    events: int = 0
    events_local: int = 0

    def counter(self, *, rsvd: bool) -> PageCounter:
        """Return the one or the other."""
        return self.rsvd if rsvd else self.usage


@dataclass(slots=True)
class Cgroup:
    """One cgroup, by its path."""

    name: str
    sizes: dict[int, SizeCounters] = field(
        default_factory=lambda: {size: SizeCounters() for size in HUGE_PAGE_SIZES}
    )

    def row(self) -> dict[str, Any]:
        """Return it as a row of a journal."""
        sizes = {str(size): asdict(counters) for size, counters in self.sizes.items()}
        return {"name": self.name, "sizes": sizes}


class Cgroups:
    """The cgroups of one host; the root is always there."""

    def __init__(self) -> None:
        """Start with the root, which has no limit."""
        self._by_name: dict[str, Cgroup] = {ROOT: Cgroup(ROOT)}

    def __iter__(self) -> Iterator[Cgroup]:
        """Iterate over the cgroups by name."""
        return iter([self._by_name[name] for name in sorted(self._by_name)])

    def get(self, name: str) -> Cgroup:
        """Return a cgroup; the empty name is the root. NoSuchObject CGROUP_UNKNOWN."""
        cgroup = self._by_name.get(name or ROOT)
        if cgroup is None:
            raise NoSuchObject(
                Reason.CGROUP_UNKNOWN,
                f"there is no cgroup {name!r}: create it, or see ListCgroups",
                name=name,
            )
        return cgroup

    def create(self, name: str) -> Cgroup:
        """Make a cgroup without limits, whose parent is there (mkdir).

        BadRequest ARGUMENT_INVALID, ObjectExists CGROUP_EXISTS, NoSuchObject
        CGROUP_UNKNOWN, Exhausted LIMIT_REACHED.
        """
        if name != ROOT and not _NAME.fullmatch(name):
            raise BadRequest(
                Reason.ARGUMENT_INVALID,
                f"{name!r} is no path of a cgroup: write /tenant or /tenant/vm, of "
                "letters, digits, '_', '.' and '-'",
                name=name,
            )
        if name in self._by_name:
            raise ObjectExists(
                Reason.CGROUP_EXISTS, f"cgroup {name} exists: use another name"
            )
        self.get(parent_of(name))
        if len(self._by_name) >= CGROUPS_MAX:
            raise Exhausted(
                Reason.LIMIT_REACHED,
                f"{CGROUPS_MAX} cgroups are all a host has: delete one",
                limit=CGROUPS_MAX,
            )
        self._by_name[name] = Cgroup(name)
        return self._by_name[name]

    def delete(self, name: str) -> str:
        """Remove a cgroup (rmdir); return its parent, which has its charges already.

        NoSuchObject CGROUP_UNKNOWN; InUse OBJECT_IN_USE for the root, and where it
        has children.
        """
        cgroup = self.get(name)
        child = next((each for each in self._by_name if parent_of(each) == name), None)
        if cgroup.name == ROOT or child is not None:
            what = "is the root" if child is None else f"has the child {child}"
            raise InUse(
                Reason.OBJECT_IN_USE,
                f"cgroup {cgroup.name} {what}: delete children first, and no root",
                name=cgroup.name,
            )
        del self._by_name[name]
        return parent_of(name)

    def set_limit(
        self, name: str, page_size: int, limit: int | None, *, rsvd: bool
    ) -> None:
        """Write `max` or `rsvd.max` in bytes, rounded down to pages; None: no limit.

        What is charged stays, also above the limit. NoSuchObject CGROUP_UNKNOWN; InUse
        STATE_WRONG for the root, BadRequest PAGE_SIZE_UNKNOWN.
        """
        cgroup = self.get(name)
        if page_size not in cgroup.sizes:
            known = " or ".join(str(size) for size in HUGE_PAGE_SIZES)
            raise BadRequest(
                Reason.PAGE_SIZE_UNKNOWN,
                f"pages of {page_size} bytes are charged to no cgroup: use {known}",
                page_size=page_size,
            )
        if cgroup.name == ROOT:
            raise InUse(
                Reason.STATE_WRONG,
                "the root has no limits: create a cgroup, and limit that",
            )
        pages = None if limit is None else limit // page_size
        cgroup.sizes[page_size].counter(rsvd=rsvd).max = pages

    def charge(self, name: str, page_size: int, nr_pages: int, *, rsvd: bool) -> None:
        """Charge pages; Exhausted CGROUP_LIMIT, and only an event has been counted."""
        if self.room(name, page_size, nr_pages, rsvd=rsvd) < nr_pages:
            raise self.refusal(name, page_size, nr_pages, rsvd=rsvd)
        for cgroup in self._lineage(name):
            cgroup.sizes[page_size].counter(rsvd=rsvd).charge(nr_pages)

    def uncharge(self, name: str, page_size: int, nr_pages: int, *, rsvd: bool) -> None:
        """Take a charge back."""
        for cgroup in self._lineage(name):
            cgroup.sizes[page_size].counter(rsvd=rsvd).uncharge(nr_pages)

    def room(self, name: str, page_size: int, nr_pages: int, *, rsvd: bool) -> int:
        """Return how many of `nr_pages` could be charged."""
        counters = [
            cgroup.sizes[page_size].counter(rsvd=rsvd) for cgroup in self._lineage(name)
        ]
        rooms = [counter.room for counter in counters if counter.room is not None]
        return min([nr_pages, *rooms])

    def refusal(
        self, name: str, page_size: int, nr_pages: int, *, rsvd: bool
    ) -> Exhausted:
        """Count a charge that fails, and say which limit it would pass."""
        limiting = name or ROOT
        for cgroup in self._lineage(name):
            counters = cgroup.sizes[page_size]
            counters.events += 1
            room = counters.counter(rsvd=rsvd).room
            if room is not None and room < nr_pages:
                limiting = cgroup.name
        self.get(name).sizes[page_size].events_local += 1
        file = "rsvd.max" if rsvd else "max"
        return Exhausted(
            Reason.CGROUP_LIMIT,
            f"{nr_pages} {format_size(page_size)} pages more pass hugetlb."
            f"{_word(page_size)}.{file} of cgroup {limiting}: raise it, or free pages",
            cgroup=limiting,
            nr_pages=nr_pages,
        )

    def restore(self, row: Mapping[str, Any]) -> None:
        """Have a cgroup whose row was journalled."""
        sizes = {
            int(size): SizeCounters(
                PageCounter(**counters["usage"]),
                PageCounter(**counters["rsvd"]),
                counters["events"],
                counters["events_local"],
            )
            for size, counters in row["sizes"].items()
        }
        self._by_name[row["name"]] = Cgroup(row["name"], sizes)

    def check(self) -> None:
        """No counter is negative, none is above what it has been."""
        for cgroup in self._by_name.values():
            for counters in cgroup.sizes.values():
                for counter in (counters.usage, counters.rsvd):
                    assert 0 <= counter.usage <= counter.watermark, cgroup

    def _lineage(self, name: str) -> list[Cgroup]:
        """Return the cgroup and its ancestors."""
        found = [self.get(name)]
        while found[-1].name != ROOT:
            found.append(self._by_name[parent_of(found[-1].name)])
        return found


def parent_of(name: str) -> str:
    """Return the path of the parent; that of the root is nothing."""
    return "" if name == ROOT else name.rpartition("/")[0] or ROOT


def _word(page_size: int) -> str:
    return f"{format_size(page_size)}B"
