"""Run in a client's container: write numbers through the host view, and look again.

    python - TOKEN BROKER FILE STOP SECONDS

It ends when the file STOP appears, or after SECONDS. Each write goes to the next page
of PAGES, so that the newest number of a page tells which writes must be there. JSON
lines: one every half second, then what was lost, or the TransportError that ended it
(exit status 3).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from gmem.memory import MappedWindow, open_host_view
from gmem.uapi.errors import TransportError
from gmem.uapi.pages import PAGE_SIZE

PAGES = 256
TELL_SECONDS = 0.5


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def write(view: MappedWindow, stop: Path, seconds: float) -> None:
    newest = [0] * PAGES
    began = told = last = time.monotonic()
    longest, number = 0.0, 0
    while last - began < seconds:
        number += 1
        page = number % PAGES
        view.write(page * PAGE_SIZE, number.to_bytes(8, "little"))
        newest[page] = number
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        if now - told > TELL_SECONDS:
            told = now
            tell(writes=number, longest=longest)
            if stop.exists():
                break
    lost = [page for page in range(PAGES) if found(view, page) != newest[page]]
    tell(done=True, writes=number, longest=longest, lost=lost)


def found(view: MappedWindow, page: int) -> int:
    return int.from_bytes(view.read(page * PAGE_SIZE, 8), "little")


def main(token: str, broker: str, file: str, stop: str, seconds: str) -> int:
    try:
        size = PAGES * PAGE_SIZE
        with open_host_view(token, broker, 0, size, client="writer", file=file) as view:
            write(view, Path(stop), float(seconds))
    except TransportError as error:
        tell(dead=str(error), service=error.service)
        return 3
    return 0


sys.exit(main(*sys.argv[1:]))
