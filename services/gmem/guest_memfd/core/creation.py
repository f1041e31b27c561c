"""What the flags of KVM_CREATE_GUEST_MEMFD make of a new inode, by lineage."""

from __future__ import annotations

from typing import Protocol

from gmem.guest_memfd.core.inode import InodeOptions
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import Faultability


class CreationPolicy(Protocol):
    """How a series reads the flags; called before anything is reserved."""

    def require(self, options: InodeOptions) -> None:
        """Raise BadRequest (FLAG_UNKNOWN, FLAG_COMBINATION) for flags it refuses."""

    def initial(self, options: InodeOptions) -> Faultability | None:
        """Return what every page starts with; None: nothing is shown before a bind."""

    def host_mmap(self, options: InodeOptions) -> bool:
        """Tell whether userspace may mmap the file."""


class ByBind:
    """The 39-patch series: mmap always, and a bind says who may fault."""

    def require(self, options: InodeOptions) -> None:
        """Refuse the flags of later series."""
        if options.support_shared or options.init_private:
            raise BadRequest(
                Reason.FLAG_UNKNOWN,
                f"{options.lineage} knows neither support_shared nor init_private: "
                "clear them, or use RFC_V2",
            )

    def initial(self, options: InodeOptions) -> None:
        """Leave it to the first bind."""
        del options

    def host_mmap(self, options: InodeOptions) -> bool:
        """Let everybody map it."""
        del options
        return True


class ByFlags:
    """The 51-patch series: SUPPORT_SHARED and INIT_PRIVATE say it, for good."""

    def require(self, options: InodeOptions) -> None:
        """INIT_PRIVATE has a meaning only where pages can be shared."""
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
