"""The ioctls of a host view: numbers of the kernel, and the struct both ways."""

from __future__ import annotations

import struct

import pytest

from gmem.guest_memfd.ioctls import ConvertCall
from gmem.uapi.errors import Reason, TransportError, make_error
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    Faultability,
)

READ, WRITE = 2, 1
STRUCT = struct.Struct("=QQQ")


@pytest.mark.parametrize(
    ("number", "request_number"),
    [(0x41, KVM_GMEM_CONVERT_SHARED), (0x42, KVM_GMEM_CONVERT_PRIVATE)],
)
def test_numbers_are_those_of_iowr(number: int, request_number: int) -> None:
    made = (READ | WRITE) << 30 | STRUCT.size << 16 | 0xAF << 8 | number
    assert request_number == made


def test_a_call_is_decoded_and_answered() -> None:
    call = ConvertCall.decode(KVM_GMEM_CONVERT_PRIVATE, STRUCT.pack(4096, 8192, 0))
    assert call == ConvertCall(Faultability.GUEST, 4096, 8192, 0)
    assert not call.to_shared
    assert call.answer(None) == STRUCT.pack(4096, 8192, 0)
    busy = make_error(Reason.PAGE_IN_USE, "held", error_offset=4096)
    assert call.answer(busy) == STRUCT.pack(4096, 8192, 4096)
    for error in (TransportError("silence"), make_error(Reason.POOL_EMPTY, "none")):
        assert call.answer(error) == STRUCT.pack(4096, 8192, 0)


def test_shared_is_the_other_one() -> None:
    call = ConvertCall.decode(KVM_GMEM_CONVERT_SHARED, STRUCT.pack(0, 0, 7))
    assert call is not None
    assert call.to_shared
    assert call.error_offset == 7


@pytest.mark.parametrize(
    ("cmd", "data"),
    [
        (0, b""),
        (KVM_GMEM_CONVERT_PRIVATE + 1, STRUCT.pack(0, 0, 0)),
        (KVM_GMEM_CONVERT_PRIVATE, b"short"),
    ],
)
def test_other_requests_are_none_of_ours(cmd: int, data: bytes) -> None:
    assert ConvertCall.decode(cmd, data) is None
