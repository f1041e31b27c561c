"""`python -m gmem.ctl.demo.victim`: touches a page it must not touch, and dies."""

from __future__ import annotations

from typing import Any

from gmem.ctl.demo.program import serve
from gmem.memory import MappedWindow, open_host_view
from gmem.uapi.pages import PAGE_SIZE

NAME = "gmem-victim"


class Victim:
    """One page of the host view."""

    def __init__(self) -> None:
        self._view: MappedWindow | None = None

    def open(
        self, *, token: str, broker: str, file: str, offset: int
    ) -> dict[str, Any]:
        """Map the page at `offset`; mapping a private page is allowed."""
        self._view = open_host_view(
            token, broker, offset, PAGE_SIZE, client=NAME, file=file
        )
        return {"mapped": len(self._view)}

    def touch(self) -> dict[str, Any]:
        """Load one byte as any program would."""
        assert self._view is not None, "open comes first"
        return {"byte": int(self._view.array[0])}


def main() -> None:
    """Serve the demo, for as long as it lives."""
    victim = Victim()
    serve(NAME, {"open": victim.open, "touch": victim.touch})


if __name__ == "__main__":
    main()
