from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gmem.runtime import state_table
from gmem.runtime.state_table import COUNTED_MAX, StateTable
from gmem.uapi.errors import KernelError, Reason

PAGE = 4096
AGAIN = 1 << 63


@pytest.fixture
def table() -> Iterator[StateTable]:
    fd = state_table.create_fd(7, 3 << 21, 1 << 21)
    yield StateTable(fd)
    os.close(fd)


def test_two_processes_see_the_same_table(table: StateTable) -> None:
    other = StateTable(table.fd)
    assert (other.ino, other.i_size, other.page_size) == (7, 3 << 21, 1 << 21)
    table.states[1][5] = state_table.OPEN
    table.frames[1] = 101
    table.fresh[9] = 1
    table.count_open(0, 3)
    assert other.states[1][5] == state_table.OPEN
    assert other.pfn_of(512 + 3) == 103
    assert other.fresh[9] == 1
    assert (other.opens(0), other.opens(1)) == (1, 0)


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\0" * PAGE])
def test_a_file_that_is_no_table_is_refused(content: bytes) -> None:
    fd = os.memfd_create("none")
    os.write(fd, content)
    with pytest.raises(KernelError) as caught:
        StateTable(fd)
    assert caught.value.reason is Reason.DESCRIPTOR_TYPE
    os.close(fd)


def test_a_table_cut_short_is_refused(table: StateTable) -> None:
    os.ftruncate(table.fd, PAGE)
    with pytest.raises(KernelError):
        StateTable(table.fd)


def test_a_request_that_is_sent_again_is_counted_once(table: StateTable) -> None:
    assert table.count_open(0, 10) == 1
    assert table.count_open(0, 10 | AGAIN) == 1
    # One that the predecessor had read, but not counted.
    assert table.count_open(0, 12 | AGAIN) == 2
    assert table.count_release(0, 14) == 1
    assert table.count_release(0, 14 | AGAIN) == 1
    assert table.count_release(0, 16 | AGAIN) == 0


def test_a_count_never_falls_below_zero(table: StateTable) -> None:
    assert table.count_release(1, 2) == 0


def test_numbers_are_forgotten_in_the_order_they_came(table: StateTable) -> None:
    for unique in range(2, 2 * COUNTED_MAX + 4, 2):
        table.count_open(0, unique)
    assert table.count_open(0, 2 * COUNTED_MAX | AGAIN) == COUNTED_MAX + 1
    assert table.count_open(0, 2 | AGAIN) == COUNTED_MAX + 2
