"""`python -m gmem.ctl.demo.loader`: writes a payload through the host view."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from gmem.ctl.demo.program import serve
from gmem.memory import AnonymousMemory, MappedWindow, open_host_view
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.pages import PAGE_SIZE

NAME = "gmem-loader"


class Loader:
    """One window of the host view, and one memfd with the payload."""

    def __init__(self) -> None:
        self._view: MappedWindow | None = None
        self._given: tuple[AnonymousMemory, BrokerClient] | None = None

    def open(self, *, token: str, broker: str, file: str, size: int) -> dict[str, Any]:
        """Map the first `size` bytes of the host view."""
        self._view = open_host_view(token, broker, 0, size, client=NAME, file=file)
        return {"mapped": len(self._view)}

    def write(self, *, path: str) -> dict[str, Any]:
        """Copy a file to the start of the view."""
        data = Path(path).read_bytes()
        self._window.write(0, data)
        return {"written": len(data)}

    def read(self, *, size: int) -> dict[str, Any]:
        """Read the start of the view, safely."""
        return {"hex": self._window.read(0, size).hex()}

    def dont_need(self) -> dict[str, Any]:
        """MADV_DONTNEED the whole window."""
        self._window.dont_need()
        return {}

    def give(self, *, broker: str, path: str) -> dict[str, Any]:
        """Put the file into a memfd of whole pages and give that to a broker."""
        data = Path(path).read_bytes()
        memory = AnonymousMemory(-(-len(data) // PAGE_SIZE) * PAGE_SIZE, name="payload")
        memory.write(0, data)
        connection = BrokerClient(Path(broker), NAME, secrets.token_hex(8))
        # Both stay: to the service the descriptor ends with this connection.
        self._given = (memory, connection)
        return {
            "descriptor": connection.give(memory.fd, "payload"),
            "size": len(memory),
        }

    @property
    def _window(self) -> MappedWindow:
        assert self._view is not None, "open comes first"
        return self._view


def main() -> None:
    """Serve the demo."""
    loader = Loader()
    serve(
        NAME,
        {
            "open": loader.open,
            "write": loader.write,
            "read": loader.read,
            "dont_need": loader.dont_need,
            "give": loader.give,
        },
    )


if __name__ == "__main__":
    main()
