"""The ring: driver and device over plain memory."""

from __future__ import annotations

import pytest

from gmem.device import (
    DATA_BYTES_MAX,
    MAGIC,
    MAGIC_AT,
    NR_SLOTS_AT,
    NR_SLOTS_MAX,
    RESPONSES_AT,
    Message,
    RingDevice,
    nr_slots_of,
    read_number,
    response_at,
    write_number,
)
from gmem.uapi.errors import BadRequest
from gmem.uapi.pages import PAGE_SIZE
from gmem.vmm.guest.ring import RingDriver

SIZE = PAGE_SIZE + 4 * 256


class Bytes:
    """A window over a bytearray."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.memory[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data


@pytest.mark.parametrize("requests", [0, 1, 4, 5, 100])
@pytest.mark.parametrize("offset", [0, 512])
def test_every_request_is_answered_once(requests: int, offset: int) -> None:
    window = Bytes(offset + SIZE)
    device = RingDevice(window, offset)
    driver = RingDriver(RingDevice(window, offset), SIZE)
    answered = []
    found = driver.exchange(requests, 5.0, lambda: answered.append(device.poll()))
    assert (found.received, found.wrong) == (requests, 0)
    assert sum(answered) == requests


def test_wrong_answers_are_counted() -> None:
    window = Bytes(SIZE)
    device = RingDevice(window)

    def poll_and_spoil() -> None:
        for number in range(device.poll()):
            window.write(response_at(number, 4) + 16, b"?")

    found = RingDriver(window, SIZE).exchange(3, 5.0, poll_and_spoil)
    assert (found.received, found.wrong) == (3, 3)


def test_ring_can_be_laid_out_again() -> None:
    window = Bytes(SIZE)
    device = RingDevice(window)
    for _ in range(2):
        found = RingDriver(window, SIZE).exchange(9, 5.0, lambda: void(device.poll()))
        assert (found.received, found.wrong) == (9, 0)


def test_device_that_is_restarted_goes_on() -> None:
    window = Bytes(SIZE)
    driver = RingDriver(window, SIZE)
    found = driver.exchange(50, 5.0, lambda: void(RingDevice(window).poll()))
    assert (found.received, found.wrong) == (50, 0)


def test_without_a_ring_there_is_nothing_to_answer() -> None:
    window = Bytes(SIZE)
    assert RingDevice(window).poll() == 0
    write_number(window, MAGIC_AT, MAGIC)
    write_number(window, NR_SLOTS_AT, NR_SLOTS_MAX + 1)
    assert RingDevice(window).poll() == 0


def test_device_stops_when_the_ring_changes_under_it() -> None:
    window = Bytes(SIZE)
    driver = RingDriver(window, SIZE)
    driver.exchange(3, 0.01, lambda: None)
    device = RingDevice(window)
    write = window.write

    def write_and_lay_out_again(offset: int, data: bytes) -> None:
        write(offset, data)
        window.write = write  # type: ignore[method-assign]
        RingDriver(window, SIZE)

    window.write = write_and_lay_out_again  # type: ignore[method-assign]
    assert device.poll() == 0
    assert read_number(window, RESPONSES_AT) == 0


def test_length_that_cannot_be_is_cut() -> None:
    half = b"\1" + bytes(7) + b"\xff" * 8 + b"x" * 112
    assert Message.decode(half) == Message(1, b"x" * DATA_BYTES_MAX)


@pytest.mark.parametrize("size", [0, PAGE_SIZE, PAGE_SIZE + 255])
def test_ring_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(BadRequest, match="hold no ring"):
        nr_slots_of(size)


def void(value: object) -> None:
    del value
