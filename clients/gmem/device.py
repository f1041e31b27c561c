"""A request ring in shared guest memory: its layout, and the device's side of it.

The guest is the driver: it lays the ring out and posts requests. A device process maps
the same pages and answers. Numbers are 64-bit little-endian; each has one writer.

    byte 0     MAGIC        the driver writes it last: before it there is no ring
    byte 8     nr_slots     driver
    byte 16    generation   driver; one more for each time the ring is laid out
    byte 24    requests     driver; how many it has posted
    byte 32    responses    device; how many it has answered
    page 1     slots of SLOT_BYTES: request and response of REQUEST_BYTES each
               id, length, then at most DATA_BYTES_MAX bytes

Request n lies in slot n modulo nr_slots. A count is written after what it counts, so
that whoever sees the count sees the slot. The device here answers with the SHA-256 of
the request's data, so that the driver can tell a wrong answer from a right one.

This file is pure: a window is any object with `read(offset, size)` and
`write(offset, data)`, such as `gmem.memory.MappedWindow`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE

MAGIC: Final = 0x676D656D72696E67
"""`gmemring` in ASCII."""
HEADER: Final = struct.Struct("<QQQQQ")
MAGIC_AT: Final = 0
NR_SLOTS_AT: Final = 8
GENERATION_AT: Final = 16
REQUESTS_AT: Final = 24
RESPONSES_AT: Final = 32
SLOTS_AT: Final = PAGE_SIZE
REQUEST_BYTES: Final = 128
SLOT_BYTES: Final = 2 * REQUEST_BYTES
NR_SLOTS_MAX: Final = 256
DATA_BYTES_MAX: Final = REQUEST_BYTES - 16
_MESSAGE: Final = struct.Struct("<QQ")
_NUMBER: Final = struct.Struct("<Q")


class RingWindow(Protocol):
    """Memory that both sides see; a refused page raises, and does not kill."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on."""

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request or a response; both sides of an exchange have the same id."""

    id: int
    data: bytes

    def encode(self) -> bytes:
        """Return the bytes of its half of a slot."""
        assert len(self.data) <= DATA_BYTES_MAX, len(self.data)
        return _MESSAGE.pack(self.id, len(self.data)) + self.data

    @classmethod
    def decode(cls, half: bytes) -> Message:
        """Read half a slot; a length that cannot be is cut."""
        number, length = _MESSAGE.unpack_from(half)
        stop = _MESSAGE.size + min(length, DATA_BYTES_MAX)
        return cls(number, half[_MESSAGE.size : stop])


def nr_slots_of(size: int) -> int:
    """Return the slots of a ring in `size` bytes. Raises BadRequest (SIZE_INVALID)."""
    nr_slots = min(NR_SLOTS_MAX, (size - SLOTS_AT) // SLOT_BYTES)
    if nr_slots < 1:
        raise BadRequest(
            Reason.SIZE_INVALID,
            f"{size} bytes hold no ring: give {SLOTS_AT + SLOT_BYTES} or more",
            size=size,
        )
    return nr_slots


def request_at(number: int, nr_slots: int) -> int:
    """Return the byte offset of request `number`."""
    return SLOTS_AT + (number % nr_slots) * SLOT_BYTES


def response_at(number: int, nr_slots: int) -> int:
    """Return the byte offset of response `number`."""
    return request_at(number, nr_slots) + REQUEST_BYTES


def read_number(window: RingWindow, offset: int) -> int:
    """Return one number of the header."""
    (number,) = _NUMBER.unpack(window.read(offset, _NUMBER.size))
    return int(number)


def write_number(window: RingWindow, offset: int, number: int) -> None:
    """Write one number of the header."""
    window.write(offset, _NUMBER.pack(number))


def answer_to(request: Message) -> Message:
    """Return what the device answers: the digest of the data."""
    return Message(request.id, hashlib.sha256(request.data).digest())


class RingDevice:
    """The device's side of a ring that begins at byte `offset` of a window.

    It keeps nothing: a device that is killed and started again goes on.
    """

    def __init__(self, window: RingWindow, offset: int = 0) -> None:
        self._window = window
        self._offset = offset

    def poll(self) -> int:
        """Answer what was posted; return how many, 0 where there is no ring yet.

        Raises what the window raises, e.g. NotFaultable for a page that is private.
        """
        header = HEADER.unpack(self.read(0, HEADER.size))
        magic, nr_slots, generation, requests, responses = (int(n) for n in header)
        if magic != MAGIC or not 1 <= nr_slots <= NR_SLOTS_MAX:
            return 0
        # A driver never has more in flight than slots; more is a ring half laid out.
        pending = min(requests - responses, nr_slots)
        for number in range(responses, responses + pending):
            self._answer(number, nr_slots)
            if read_number(self, GENERATION_AT) != generation:
                return number - responses
            write_number(self, RESPONSES_AT, number + 1)
        return max(pending, 0)

    def read(self, offset: int, size: int) -> bytes:
        """Read from the ring."""
        return self._window.read(self._offset + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write into the ring."""
        self._window.write(self._offset + offset, data)

    def _answer(self, number: int, nr_slots: int) -> None:
        half = self.read(request_at(number, nr_slots), REQUEST_BYTES)
        response = answer_to(Message.decode(half))
        self.write(response_at(number, nr_slots), response.encode())
