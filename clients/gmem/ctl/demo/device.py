"""`python -m gmem.ctl.demo.device`: answers a guest's requests in shared pages."""

from __future__ import annotations

import fcntl
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from gmem.ctl.demo.program import serve
from gmem.device import RingDevice
from gmem.memory import MappedWindow, open_host_view
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_FORMAT,
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_ATTRIBUTES2_FORMAT,
    KVM_SET_MEMORY_ATTRIBUTES2,
)

NAME = "gmem-device"
POLL_SECONDS: Final = 0.0005


def _rfc_v2(offset: int, size: int, private: bool) -> tuple[int, bytearray]:
    request = KVM_GMEM_CONVERT_PRIVATE if private else KVM_GMEM_CONVERT_SHARED
    return request, bytearray(struct.pack(KVM_GMEM_CONVERT_FORMAT, offset, size, 0))


def _in_place(offset: int, size: int, private: bool) -> tuple[int, bytearray]:
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    words = (offset, size, attributes, *[0] * 13)
    argument = struct.pack(KVM_MEMORY_ATTRIBUTES2_FORMAT, *words)
    return KVM_SET_MEMORY_ATTRIBUTES2, bytearray(argument)


CONVERTS: Final[dict[str, Callable[[int, int, bool], tuple[int, bytearray]]]] = {
    "KVM_GMEM_CONVERT_PRIVATE": _rfc_v2,
    "KVM_SET_MEMORY_ATTRIBUTES2": _in_place,
}
"""Request and struct of a conversion, by the name of its ioctl."""


class Device:
    """One window of the host view with a ring at its start."""

    def __init__(self) -> None:
        self._view: MappedWindow | None = None

    def open(
        self, *, token: str, broker: str, file: str, offset: int, size: int
    ) -> dict[str, Any]:
        """Map the bounce window."""
        self._view = open_host_view(token, broker, offset, size, client=NAME, file=file)
        return {"mapped": len(self._view)}

    def answer(self, *, requests: int, seconds: float) -> dict[str, Any]:
        """Answer `requests` requests; give up after `seconds` without one."""
        ring = RingDevice(self._window)
        answered = 0
        deadline = time.monotonic() + seconds
        while answered < requests and time.monotonic() < deadline:
            now = ring.poll()
            answered += now
            if now:
                deadline = time.monotonic() + seconds
            else:
                time.sleep(POLL_SECONDS)
        return {"answered": answered}

    def convert(self, *, call: str, private: bool, size: int) -> dict[str, Any]:
        """Convert the first pages of the window by an ioctl of its own descriptor."""
        request, argument = CONVERTS[call](self._window.offset, size, private)
        fcntl.ioctl(self._window.fd, request, argument)
        return {}

    def read(self, *, size: int) -> dict[str, Any]:
        """Read the start of the window, safely."""
        return {"hex": self._window.read(0, size).hex()}

    def dont_need(self) -> dict[str, Any]:
        """Drop what is mapped, as a device does before its pages become private."""
        self._window.dont_need()
        return {}

    @property
    def _window(self) -> MappedWindow:
        assert self._view is not None, "open comes first"
        return self._view


def main() -> None:
    """Serve the demo."""
    device = Device()
    serve(
        NAME,
        {
            "open": device.open,
            "answer": device.answer,
            "convert": device.convert,
            "read": device.read,
            "dont_need": device.dont_need,
        },
    )


if __name__ == "__main__":
    main()
