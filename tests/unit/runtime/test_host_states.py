"""What a client without faults reads of the page states."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from gmem.runtime import state_table
from gmem.runtime.state_table import CLOSED, OPEN, QUIESCED, HostStates, StateTable
from gmem.uapi.errors import BadRequest

PAGES = 16


@pytest.fixture
def table() -> Iterator[StateTable]:
    made = StateTable(state_table.create_fd(3, PAGES * 4096, 4096))
    made.states[0][:] = bytes([OPEN]) * PAGES
    yield made
    os.close(made.fd)


def readers(table: StateTable) -> HostStates:
    fd = os.open(f"/proc/self/fd/{table.fd}", os.O_RDONLY)
    try:
        return HostStates(fd)
    finally:
        os.close(fd)


def test_the_first_page_that_is_not_shared_is_named(table: StateTable) -> None:
    states = readers(table)
    assert states.first_private(0, PAGES) is None
    table.states[0][5] = table.states[0][9] = CLOSED
    assert states.first_private(0, PAGES) == 5
    assert states.first_private(6, PAGES) == 9
    assert states.first_private(6, 9) is None
    # The guest's column is another.
    table.states[1][0] = CLOSED
    assert states.first_private(0, 5) is None


def test_a_page_that_opens_again_is_waited_for(table: StateTable) -> None:
    table.states[0][2] = QUIESCED

    def open_soon() -> None:
        time.sleep(0.05)
        table.states[0][2] = OPEN

    threading.Thread(target=open_soon).start()
    assert readers(table).first_private(0, PAGES) is None


def test_one_that_does_not_is_refused_in_the_end(
    table: StateTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_table, "QUIESCED_SECONDS_MAX", 0.01)
    table.states[0][2] = QUIESCED
    assert readers(table).first_private(0, PAGES) == 2


def test_another_file_is_no_table() -> None:
    fd = os.memfd_create("other")
    with pytest.raises(BadRequest, match="came with the view"):
        HostStates(fd)
    os.close(fd)
