"""The life of a huge folio: what the table allows, and that the rest is refused."""

from __future__ import annotations

import itertools

import pytest

from gmem.host_allocator.core.folio import (
    FOLIO_TRANSITIONS,
    FolioEvent,
    FolioState,
    LiveFolio,
)
from gmem.host_allocator.core.values import Folio
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import NodeId, Pfn

LIVE = [
    FolioState.WHOLE,
    FolioState.SPLIT,
    FolioState.POISONED,
    FolioState.POISONED_SPLIT,
]
EVENTS = [event for event in FolioEvent if event is not FolioEvent.ALLOCATE]


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(LIVE, EVENTS)), ids=str
)
def test_what_the_table_leaves_out_is_refused_with_a_way_out(
    state: FolioState, event: FolioEvent
) -> None:
    live = LiveFolio(Folio(Pfn(512), 9, NodeId(0)), handle=1, state=state)
    expected = FOLIO_TRANSITIONS.get((state, event))
    if expected is not None:
        assert live.after(event) is expected
        return
    with pytest.raises(
        BadRequest, match=f"cannot {event.value} the 2M folio"
    ) as caught:
        live.after(event)
    assert caught.value.reason is Reason.FOLIO_STATE
    assert live.state is state


def test_a_new_folio_is_whole() -> None:
    assert LiveFolio(Folio(Pfn(0), 9, NodeId(0)), 1).state is FolioState.WHOLE


def test_no_split_folio_is_freed_and_nothing_returns_from_withheld() -> None:
    assert (FolioState.SPLIT, FolioEvent.FREE) not in FOLIO_TRANSITIONS
    assert (FolioState.POISONED_SPLIT, FolioEvent.FREE) not in FOLIO_TRANSITIONS
    assert all(state is not FolioState.WITHHELD for state, _ in FOLIO_TRANSITIONS)
