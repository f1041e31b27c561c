"""What the keeper holds of inodes whose files are memfds."""

from __future__ import annotations

import os

import pytest

from gmem.keeper.shelf import Shelf
from gmem.runtime import state_table
from gmem.uapi.errors import BadRequest


def files_of(ino: int) -> list[int]:
    table = state_table.create_fd(ino, 4096, 4096)
    return [table, *(os.memfd_create(name) for name in ("host", "guest"))]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_it_holds_all_files_of_an_inode_until_it_is_dropped() -> None:
    shelf = Shelf()
    one, two = files_of(1), files_of(2)
    shelf.hold(one)
    shelf.hold(two)
    assert shelf.inodes == {1: one, 2: two}
    shelf.drop(1)
    assert (list(shelf.inodes), [is_open(fd) for fd in one]) == ([2], [False] * 3)
    shelf.drop(1)
    again = files_of(2)
    shelf.hold(again)
    assert shelf.inodes == {2: again}
    assert not any(is_open(fd) for fd in two)
    shelf.drop(2)


def test_what_is_no_table_is_closed_and_refused() -> None:
    shelf = Shelf()
    fds = [os.memfd_create(name) for name in ("states", "host", "guest")]
    with pytest.raises(BadRequest, match="page-state table"):
        shelf.hold(fds)
    assert not any(is_open(fd) for fd in fds)
    assert shelf.inodes == {}
