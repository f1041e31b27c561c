"""What a handle stands for: one owner's claim on a pool, and the numbering of handles.

A subpool has min_hpages == max_hpages == N: all its pages are reserved at the start,
and a freed one goes back to the reservation (`hugepage_new_subpool`, patch 10 of the
39). The pages in use and the reserved ones always add up to N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from gmem.host_allocator.core.cgroups import ROOT
from gmem.host_allocator.core.values import ReservationStatistics
from gmem.uapi.errors import BadRequest, NoSuchObject, Reason
from gmem.uapi.pages import NodeId, format_size


class Handles:
    """Handles, each given once."""

    def __init__(self, first: int) -> None:
        """Begin with `first`, which lies above all handles of earlier incarnations."""
        self.next = first

    def new(self) -> int:
        """Return a handle that was never given before."""
        handle = self.next
        self.next += 1
        return handle


@dataclass(slots=True)
class Subpool:
    """N pages of a pool: `used_hpages` allocated, `rsv_hpages` promised."""

    handle: int
    page_size: int
    owner: str
    allowed: tuple[NodeId, ...]
    max_hpages: int
    used_hpages: int
    rsv_hpages: int
    use_surplus: bool = False
    """Whether surplus folios may be made for it; guest_memfd's never."""
    turn: int = 0
    """Whose turn it is where its policy interleaves."""
    closing: bool = False
    cgroup: str = ROOT
    """Who is charged for its folios."""
    charge_rsvd: bool = False
    """Whether its reservation is charged as well."""

    def get_pages(self, nr: int) -> None:
        """Use `nr` pages of the reservation (hugepage_subpool_get_pages)."""
        self.used_hpages += nr
        self.rsv_hpages -= nr
        self.check()

    def put_pages(self, nr: int) -> None:
        """Return `nr` pages to the reservation (hugepage_subpool_put_pages)."""
        self.used_hpages -= nr
        self.rsv_hpages += nr
        self.check()

    @property
    def is_free(self) -> bool:
        """Whether the owner has gone and the last folio is back."""
        return self.closing and self.used_hpages == 0

    def statistics(self) -> ReservationStatistics:
        """Return the counts."""
        return ReservationStatistics(
            handle=self.handle,
            page_size=self.page_size,
            owner=self.owner,
            max_hpages=self.max_hpages,
            used_hpages=self.used_hpages,
            rsv_hpages=self.rsv_hpages,
            closing=self.closing,
            cgroup=self.cgroup,
        )

    def check(self) -> None:
        """Every page of the claim is used or reserved."""
        assert self.used_hpages >= 0
        assert self.rsv_hpages >= 0
        assert self.used_hpages + self.rsv_hpages == self.max_hpages


class Claim(Protocol):
    """What both backends keep per handle."""

    closing: bool


C = TypeVar("C", bound=Claim)


def require_handle(claims: dict[int, C], handle: int) -> C:
    """Return the claim of `handle`; NoSuchObject HANDLE_UNKNOWN if it is none."""
    claim = claims.get(handle)
    if claim is None:
        raise NoSuchObject(
            Reason.HANDLE_UNKNOWN,
            f"handle {handle} was never issued or is gone: reserve again",
            handle=handle,
        )
    return claim


def require_open(claims: dict[int, C], handle: int) -> C:
    """Return the claim of `handle`, which its owner still has; HANDLE_UNKNOWN."""
    claim = require_handle(claims, handle)
    if claim.closing:
        raise NoSuchObject(
            Reason.HANDLE_UNKNOWN,
            f"handle {handle} was given up and waits for its last folios: "
            "reserve again",
            handle=handle,
        )
    return claim


def require_num_pages(num_pages: int) -> None:
    """Refuse a reservation of nothing: BadRequest SIZE_INVALID."""
    if num_pages < 1:
        raise BadRequest(
            Reason.SIZE_INVALID,
            f"a reservation of {num_pages} pages is none: ask for 1 or more",
            num_pages=num_pages,
        )


def require_page_size(page_size: int, expected: int) -> None:
    """Refuse a page size other than the claim's: BadRequest PAGE_SIZE_UNKNOWN."""
    if page_size != expected:
        raise BadRequest(
            Reason.PAGE_SIZE_UNKNOWN,
            f"{format_size(page_size)} pages from a reservation of "
            f"{format_size(expected)} pages: use {expected}",
            page_size=page_size,
            expected=expected,
        )
