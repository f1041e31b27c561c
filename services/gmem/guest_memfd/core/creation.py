"""What the flags of KVM_CREATE_GUEST_MEMFD make of a new inode, by lineage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gmem.guest_memfd.core.inode import InodeOptions
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SIZE


class CreationPolicy(Protocol):
    """How a series reads the flags; called before anything is reserved."""

    def require(self, options: InodeOptions) -> None:
        """Raise BadRequest (FLAG_UNKNOWN, FLAG_COMBINATION) for flags it refuses."""

    def initial(self, options: InodeOptions) -> Faultability | None:
        """Return what every page starts with; None: nothing is shown before a bind."""

    def host_mmap(self, options: InodeOptions) -> bool:
        """Tell whether userspace may mmap the file."""

    def serves_shared(self, options: InodeOptions) -> bool:
        """Tell whether the guest's shared accesses come from the file too."""


class ByBind:
    """The 39-patch series: mmap always, and a bind says who may fault."""

    def require(self, options: InodeOptions) -> None:
        """Refuse the flags of later series."""
        _refuse_others(options, known=())

    def initial(self, options: InodeOptions) -> None:
        """Leave it to the first bind."""
        del options

    def host_mmap(self, options: InodeOptions) -> bool:
        """Let everybody map it."""
        del options
        return True

    def serves_shared(self, options: InodeOptions) -> bool:
        """Leave shared memory to the userspace side."""
        del options
        return False


class ByFlags:
    """The 51-patch series: SUPPORT_SHARED and INIT_PRIVATE say it, for good."""

    def require(self, options: InodeOptions) -> None:
        """INIT_PRIVATE has a meaning only where pages can be shared."""
        _refuse_others(options, known=("support_shared", "init_private"))
        if options.init_private and not options.support_shared:
            raise BadRequest(
                Reason.FLAG_COMBINATION,
                "init_private without support_shared: set both, or neither",
            )

    def initial(self, options: InodeOptions) -> Faultability:
        """Shared, unless the file cannot be or was told not to."""
        shared = options.support_shared and not options.init_private
        return Faultability.ALL if shared else Faultability.GUEST

    def host_mmap(self, options: InodeOptions) -> bool:
        """Only a file that supports shared pages has something to map."""
        return options.support_shared

    def serves_shared(self, options: InodeOptions) -> bool:
        """A file that supports shared pages has those of the guest."""
        return options.support_shared


@dataclass(frozen=True, slots=True)
class ByMmapFlags:
    """Mainline: MMAP and INIT_SHARED, each for itself; pages are private by default.

    `huge_pages`: the branch that has them, which never begins shared with them.
    """

    huge_pages: bool = False

    def require(self, options: InodeOptions) -> None:
        """Refuse huge pages where there are none, and shared ones everywhere."""
        _refuse_others(options, known=("mmap", "init_shared"))
        huge = options.page_size != PAGE_SIZE
        if huge and self.huge_pages and options.init_shared:
            raise BadRequest(
                Reason.FLAG_COMBINATION,
                "init_shared with huge pages: clear it, and convert what shall be "
                "shared",
            )
        if huge and not self.huge_pages:
            raise BadRequest(
                Reason.PAGE_SIZE_UNKNOWN,
                f"{options.lineage} has pages of 4K only, and none of "
                f"{options.page_size} bytes: use another lineage for huge pages",
                page_size=options.page_size,
            )

    def initial(self, options: InodeOptions) -> Faultability:
        """Private, unless it was told otherwise."""
        return Faultability.ALL if options.init_shared else Faultability.GUEST

    def host_mmap(self, options: InodeOptions) -> bool:
        """MMAP says it."""
        return options.mmap

    def serves_shared(self, options: InodeOptions) -> bool:
        """MMAP makes a memslot GMEM_ONLY: each fault of its guest is the file's."""
        return options.mmap


_FLAGS: Final = ("support_shared", "init_private", "mmap", "init_shared")


def _refuse_others(options: InodeOptions, *, known: Sequence[str]) -> None:
    """Refuse what other lineages have: FLAG_UNKNOWN."""
    for name in _FLAGS:
        if name not in known and getattr(options, name):
            offered = " and ".join(known) or "no such flag"
            raise BadRequest(
                Reason.FLAG_UNKNOWN,
                f"{options.lineage} does not know {name}: clear it; it has {offered}",
            )
