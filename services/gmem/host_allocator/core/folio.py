"""The life of a huge folio between allocate and free, as one table.

    free --allocate--> whole --split--> split --reconstruct--> whole --free--> free

A memory error puts a folio on a parallel track that ends withheld instead of free;
UNPOISON, with the last error of the folio gone, leads back from it.
What the table does not name is illegal:

* No (SPLIT, FREE): HugeTLB takes back whole folios only; reconstruct comes first.
* No (SPLIT, SPLIT), no (WHOLE, RECONSTRUCT): the metadata is stashed once.
* Nothing leaves WITHHELD: what becomes of the frames is told in `memory_errors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gmem.host_allocator.core.values import Folio
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import format_size, page_size_of


class FolioState(Enum):
    """Where a huge folio is; only the four between allocate and free are kept."""

    FREE = "free"
    WHOLE = "whole"
    SPLIT = "split"
    POISONED = "whole and poisoned"
    POISONED_SPLIT = "split and poisoned"
    WITHHELD = "withheld"


class FolioEvent(Enum):
    """What the allocator calls do to one folio."""

    ALLOCATE = "allocate"
    SPLIT = "split"
    RECONSTRUCT = "reconstruct"
    FREE = "free"
    ERROR = "error"
    UNPOISON = "unpoison"


_S, _E = FolioState, FolioEvent
FOLIO_TRANSITIONS: Final = {
    (_S.FREE, _E.ALLOCATE): _S.WHOLE,
    (_S.WHOLE, _E.SPLIT): _S.SPLIT,
    (_S.WHOLE, _E.FREE): _S.FREE,
    (_S.WHOLE, _E.ERROR): _S.POISONED,
    (_S.SPLIT, _E.RECONSTRUCT): _S.WHOLE,
    (_S.SPLIT, _E.ERROR): _S.POISONED_SPLIT,
    # Poison and split together: no series says; the raw error survives both ways.
    (_S.POISONED, _E.SPLIT): _S.POISONED_SPLIT,
    (_S.POISONED, _E.FREE): _S.WITHHELD,
    (_S.POISONED, _E.ERROR): _S.POISONED,
    (_S.POISONED, _E.UNPOISON): _S.WHOLE,
    (_S.POISONED_SPLIT, _E.RECONSTRUCT): _S.POISONED,
    (_S.POISONED_SPLIT, _E.ERROR): _S.POISONED_SPLIT,
    (_S.POISONED_SPLIT, _E.UNPOISON): _S.SPLIT,
}
_WAY_OUT: Final = {
    _E.SPLIT: "reconstruct it first",
    _E.RECONSTRUCT: "there is nothing to do",
    _E.FREE: "reconstruct it first",
    _E.UNPOISON: "it has no memory error",
}


@dataclass(slots=True)
class LiveFolio:
    """A huge folio that an owner has: whose it is, and in which state."""

    folio: Folio
    handle: int
    state: FolioState = field(
        default=FOLIO_TRANSITIONS[FolioState.FREE, FolioEvent.ALLOCATE]
    )

    @property
    def is_split(self) -> bool:
        """Whether its pages are folios of their own now."""
        return self.state in (FolioState.SPLIT, FolioState.POISONED_SPLIT)

    def after(self, event: FolioEvent) -> FolioState:
        """Return the state after `event`; BadRequest FOLIO_STATE if it is illegal."""
        state = FOLIO_TRANSITIONS.get((self.state, event))
        if state is None:
            size = format_size(page_size_of(self.folio.order))
            raise BadRequest(
                Reason.FOLIO_STATE,
                f"cannot {event.value} the {size} folio at {self.folio}: "
                f"it is {self.state.value}; {_WAY_OUT[event]}",
                pfn=self.folio.pfn,
                state=self.state.value,
            )
        return state
