"""The ioctls of a host view: numbers of the kernel, and the struct both ways."""

from __future__ import annotations

import struct

import pytest

from gmem.guest_memfd.core.values import AttributesCall
from gmem.guest_memfd.ioctls import Attributes2Call, ConvertCall, decode
from gmem.uapi.errors import Reason, TransportError, make_error
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_SET_MEMORY_ATTRIBUTES2,
    Faultability,
)

READ, WRITE = 2, 1
STRUCT = struct.Struct("=QQQ")
STRUCT2 = struct.Struct("=16Q")


@pytest.mark.parametrize(
    ("number", "request_number"),
    [(0x41, KVM_GMEM_CONVERT_SHARED), (0x42, KVM_GMEM_CONVERT_PRIVATE)],
)
def test_numbers_are_those_of_iowr(number: int, request_number: int) -> None:
    made = (READ | WRITE) << 30 | STRUCT.size << 16 | 0xAF << 8 | number
    assert request_number == made


def test_the_number_of_the_attributes_is_that_of_iowr() -> None:
    made = (READ | WRITE) << 30 | 128 << 16 | 0xAE << 8 | 0xD2
    assert made == KVM_SET_MEMORY_ATTRIBUTES2
    assert STRUCT2.size == 128


def test_the_attributes_are_decoded_word_by_word_and_answered() -> None:
    words = list(range(4096, 4112))
    call = Attributes2Call.decode(KVM_SET_MEMORY_ATTRIBUTES2, STRUCT2.pack(*words))
    assert call is not None
    assert call.call == AttributesCall(4096, 4097, 4098, 4099, 4100, tuple(words[5:]))
    assert (call.offset, call.size) == (4096, 4097)
    assert call.answer(None) == STRUCT2.pack(*words)
    busy = make_error(Reason.PAGE_IN_USE, "held", error_offset=8192)
    words[4] = 8192
    assert call.answer(busy) == STRUCT2.pack(*words)


@pytest.mark.parametrize(
    ("attributes", "to"), [(0, Faultability.ALL), (8, Faultability.GUEST)]
)
def test_the_private_bit_says_what_pages_become(
    attributes: int, to: Faultability
) -> None:
    data = STRUCT2.pack(0, 4096, attributes, *[0] * 13)
    call = decode(KVM_SET_MEMORY_ATTRIBUTES2, data)
    assert isinstance(call, Attributes2Call)
    assert call.to is to


def test_a_call_is_decoded_and_answered() -> None:
    call = ConvertCall.decode(KVM_GMEM_CONVERT_PRIVATE, STRUCT.pack(4096, 8192, 0))
    assert call == ConvertCall(Faultability.GUEST, 4096, 8192, 0)
    assert call.to is Faultability.GUEST
    assert call.answer(None) == STRUCT.pack(4096, 8192, 0)
    busy = make_error(Reason.PAGE_IN_USE, "held", error_offset=4096)
    assert call.answer(busy) == STRUCT.pack(4096, 8192, 4096)
    for error in (TransportError("silence"), make_error(Reason.POOL_EMPTY, "none")):
        assert call.answer(error) == STRUCT.pack(4096, 8192, 0)


def test_shared_is_the_other_one() -> None:
    call = ConvertCall.decode(KVM_GMEM_CONVERT_SHARED, STRUCT.pack(0, 0, 7))
    assert call is not None
    assert call.to is Faultability.ALL
    assert call.error_offset == 7


@pytest.mark.parametrize(
    ("cmd", "data"),
    [
        (0, b""),
        (KVM_GMEM_CONVERT_PRIVATE + 1, STRUCT.pack(0, 0, 0)),
        (KVM_GMEM_CONVERT_PRIVATE, b"short"),
        (KVM_SET_MEMORY_ATTRIBUTES2, STRUCT.pack(0, 0, 0)),
        (KVM_SET_MEMORY_ATTRIBUTES2 - 1, STRUCT2.pack(*[0] * 16)),
    ],
)
def test_other_requests_are_none_of_ours(cmd: int, data: bytes) -> None:
    assert decode(cmd, data) is None
