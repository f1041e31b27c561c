"""The seven calls that a guest_memfd wishes for, whoever provides the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from gmem.host_allocator.core.values import (
    MPOL_DEFAULT,
    UNCHARGED,
    Charging,
    Folio,
    MemPolicy,
    ReservationStatistics,
)
from gmem.uapi.pages import PAGE_SIZE

# Bounds one reply: about 700 KiB of folios on the wire.
FOLIOS_PER_CALL_MAX: Final = 1 << 16

StatisticsT_co = TypeVar("StatisticsT_co", covariant=True)


class Allocator(Protocol[StatisticsT_co]):
    """Who owns which frame of a host; counts, never bytes.

    Each call changes the counters in one step or, raising a KernelError, not at all
    (one exception: vmemmap's count of refused restores). Errors common to all calls
    with a handle: NoSuchObject HANDLE_UNKNOWN, FOLIO_UNKNOWN.
    """

    def reserve(
        self,
        page_size: int,
        num_pages: int,
        node: int | None = None,
        owner: str = "",
        *,
        use_surplus: bool = False,
        charging: Charging = UNCHARGED,
    ) -> int:
        """Promise `num_pages` pages to `owner`; return the handle of the promise.

        The reservation is global over nodes; `node` is the only one allowed for its
        pages, as a cpuset would say. With `use_surplus` surplus folios are made where
        the pool is too small, up to nr_overcommit_huge_pages: what every tenant but
        guest_memfd is given (hugepage_new_subpool, patch 10 of the 39). `charging`
        names the HugeTLB cgroup that is charged. BadRequest PAGE_SIZE_UNKNOWN,
        SIZE_INVALID, NODE_UNKNOWN; NoSuchObject CGROUP_UNKNOWN; Exhausted CGROUP_LIMIT,
        POOL_EMPTY, NODE_EMPTY.
        """
        ...

    def allocate(
        self,
        handle: int,
        mempolicy: MemPolicy = MPOL_DEFAULT,
        page_size: int = PAGE_SIZE,
        nr_folios: int = 1,
    ) -> tuple[Folio, ...]:
        """Take at least one and at most `nr_folios` folios of the reservation.

        Never more than FOLIOS_PER_CALL_MAX. BadRequest PAGE_SIZE_UNKNOWN,
        MEMPOLICY_INVALID; Exhausted SUBPOOL_EMPTY, CGROUP_LIMIT, POOL_EMPTY,
        BASE_MEMORY_EMPTY.
        """
        ...

    def split(
        self, handle: int, folio: Folio, target_page_size: int = PAGE_SIZE
    ) -> int:
        """Make folios of `target_page_size` of a whole folio.

        Returns the vmemmap pages taken from base memory for it. Unsupported
        TARGET_UNSUPPORTED; BadRequest FOLIO_STATE; Exhausted VMEMMAP_RESTORE_FAILED,
        which leaves the folio whole and optimised.
        """
        ...

    def reconstruct(
        self, handle: int, first_folio: Folio, nr_pages: int
    ) -> tuple[Folio, int]:
        """Make one folio of the `nr_pages` that begin with `first_folio` again.

        Returns it and the vmemmap pages given back: 0 where HVO is off. BadRequest
        SIZE_INVALID, FOLIO_STATE; Unsupported TARGET_UNSUPPORTED.
        """
        ...

    def free(self, handle: int, folios: Sequence[Folio]) -> None:
        """Give whole folios back to their reservation; BadRequest FOLIO_STATE."""
        ...

    def error(self, handle: int, folio: Folio) -> None:
        """Report a memory error: the folio is not given out again after its free."""
        ...

    def unreserve(self, handle: int) -> None:
        """End a reservation; folios that are out keep it until the last is back."""
        ...

    def statistics(self) -> StatisticsT_co:
        """Return what can be watched."""
        ...

    def reservations(self) -> tuple[ReservationStatistics, ...]:
        """Return the claims in the order of their handles."""
        ...
