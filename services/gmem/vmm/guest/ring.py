"""The driver's side of the ring in `gmem.device`, played by a guest program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gmem.device import (
    GENERATION_AT,
    HEADER,
    MAGIC,
    MAGIC_AT,
    REQUEST_BYTES,
    REQUESTS_AT,
    RESPONSES_AT,
    Message,
    RingWindow,
    answer_to,
    nr_slots_of,
    read_number,
    request_at,
    response_at,
    write_number,
)

POLL_SECONDS: Final = 0.0005
DEFAULT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class RingResult:
    """How many answers came, and how many of them were wrong."""

    received: int
    wrong: int


class RingDriver:
    """Lays a ring out in `size` bytes of a window; exchanges requests with a device."""

    def __init__(self, window: RingWindow, size: int) -> None:
        """Write an empty ring; raises SIZE_INVALID where it does not fit."""
        self._window = window
        self._nr_slots = nr_slots_of(size)
        self._generation = read_number(window, GENERATION_AT) + 1
        # Without its magic there is no ring: a device does not see it half made.
        write_number(window, MAGIC_AT, 0)
        header = HEADER.pack(0, self._nr_slots, self._generation % (1 << 32), 0, 0)
        window.write(0, header)
        write_number(window, MAGIC_AT, MAGIC)

    def exchange(
        self, requests: int, seconds: float, check: Callable[[], None]
    ) -> RingResult:
        """Post `requests`; collect answers until all came or none for `seconds`.

        `check` is called in each turn of the loop and may raise.
        """
        posted = received = wrong = 0
        deadline = time.monotonic() + seconds
        while received < requests and time.monotonic() < deadline:
            check()
            posted = self._post(posted, min(requests, received + self._nr_slots))
            answered = min(read_number(self._window, RESPONSES_AT), posted)
            if answered == received:
                time.sleep(POLL_SECONDS)
                continue
            wrong += sum(self._is_wrong(n) for n in range(received, answered))
            received = answered
            deadline = time.monotonic() + seconds
        return RingResult(received, wrong)

    def _post(self, first: int, stop: int) -> int:
        for number in range(first, stop):
            at = request_at(number, self._nr_slots)
            self._window.write(at, self._request(number).encode())
        if stop > first:
            write_number(self._window, REQUESTS_AT, stop)
        return max(first, stop)

    def _is_wrong(self, number: int) -> bool:
        half = self._window.read(response_at(number, self._nr_slots), REQUEST_BYTES)
        return Message.decode(half) != answer_to(self._request(number))

    def _request(self, number: int) -> Message:
        data = f"request {number} of ring {self._generation}".encode()
        return Message(number, data)
