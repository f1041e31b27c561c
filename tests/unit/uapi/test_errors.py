"""One table from which errno, status and class of every Reason follow."""

from __future__ import annotations

import copy
import errno
import pickle

import grpc
import pytest

from gmem.uapi.errors import (
    ERRNO_OVERRIDES,
    ERROR_TABLE,
    BadRequest,
    Contended,
    Errno,
    KernelError,
    Reason,
    errno_of,
    make_error,
)
from gmem.uapi.lineage import Lineage


def test_every_reason_has_one_row() -> None:
    assert set(ERROR_TABLE) == set(Reason)
    assert all(row.reason is reason for reason, row in ERROR_TABLE.items())


def test_statuses_are_those_of_grpc_and_none_is_the_transports() -> None:
    statuses = {row.status for row in ERROR_TABLE.values()}
    assert statuses <= set(grpc.StatusCode.__members__)
    assert statuses.isdisjoint(
        {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN"}
    )


def test_one_class_has_one_status_except_where_the_restart_is_meant() -> None:
    found: dict[type[KernelError], set[str]] = {}
    for row in ERROR_TABLE.values():
        found.setdefault(row.error_class, set()).add(row.status)
    assert {kind: len(statuses) for kind, statuses in found.items()} == dict.fromkeys(
        found, 1
    )


@pytest.mark.parametrize("number", list(Errno))
def test_errno_numbers_are_those_of_linux(number: Errno) -> None:
    # CPython 3.11 has no EHWPOISON; the kernel's header says 133.
    assert number == getattr(errno, number.name, 133)


def test_a_busy_page_is_einval_in_the_first_series_and_eagain_elsewhere() -> None:
    assert errno_of(Reason.PAGE_IN_USE) is Errno.EAGAIN
    assert errno_of(Reason.PAGE_IN_USE, Lineage.RFC_V1) is Errno.EINVAL
    assert all(
        ERROR_TABLE[reason].errno is not number
        for (reason, _lineage), number in ERRNO_OVERRIDES.items()
    )


def test_an_error_is_an_oserror_that_says_what_where_and_how_much() -> None:
    error = Contended(Reason.PAGE_IN_USE, "unsafe refcount", error_offset=0x3000, n=2)
    assert isinstance(error, OSError)
    assert type(error) is Contended  # and no BlockingIOError
    assert error.errno == errno.EAGAIN
    assert str(error) == "EAGAIN (page_in_use): unsafe refcount error_offset=0x3000 n=2"
    busy = Contended(Reason.PAGE_IN_USE, "mapped", lineage=Lineage.RFC_V1, by="pid 7")
    assert str(busy) == "EINVAL (page_in_use): mapped by='pid 7'"


def test_the_class_is_that_of_the_reason() -> None:
    with pytest.raises(AssertionError):
        BadRequest(Reason.PAGE_IN_USE, "wrong class")


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("lineage", [None, *Lineage])
def test_copies_say_the_same(reason: Reason, lineage: Lineage | None) -> None:
    error = make_error(reason, "a sentence", lineage=lineage, offset=4096, who="x")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert (twin.errno, twin.lineage) == (error.errno, error.lineage)
        assert twin.numbers == error.numbers
