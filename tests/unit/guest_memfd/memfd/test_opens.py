"""An open file is counted until its last descriptor and mapping are gone."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from gmem.guest_memfd.memfd import opens
from gmem.guest_memfd.memfd.opens import open_counted, open_numbers
from gmem.uapi.errors import Exhausted, Reason


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("counted")
    os.ftruncate(made, 4096)
    yield made
    os.close(made)


def test_each_open_file_counts_once_however_often_it_is_duplicated(fd: int) -> None:
    assert open_numbers(fd) == []
    files = [open_counted(fd, os.O_RDWR) for _ in range(5)]
    copy = os.dup(files[2])
    assert sorted(open_numbers(fd)) == [0, 1, 2, 3, 4]
    for opened in files:
        os.close(opened)
    assert open_numbers(fd) == [2]
    os.close(copy)
    assert open_numbers(fd) == []


def test_a_mapping_keeps_its_file_counted(fd: int) -> None:
    opened = open_counted(fd, os.O_RDWR)
    mapped = mmap.mmap(opened, 4096)
    os.close(opened)
    assert open_numbers(fd) == [0]
    mapped.close()
    assert open_numbers(fd) == []


def test_a_number_is_used_again_and_they_are_bounded(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opens, "OPENS_MAX", 3)
    files = [open_counted(fd, os.O_WRONLY) for _ in range(3)]
    with pytest.raises(Exhausted, match="close one") as refused:
        open_counted(fd, os.O_RDWR)
    assert refused.value.reason is Reason.LIMIT_REACHED
    os.close(files[1])
    files[1] = open_counted(fd, os.O_RDWR)
    assert sorted(open_numbers(fd)) == [0, 1, 2]
    for opened in files:
        os.close(opened)
