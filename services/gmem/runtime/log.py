"""One JSON object per line on stderr, with the request's names in every line.

Keys: event, level, timestamp, service, host, and where they are known request_id,
method, inode, vm. What the libraries log through `logging` gets the same form. What
we log does not go through `logging`: that doubles the cost of a line, and there is one
for each call that changes something.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Final, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

logger: FilteringBoundLogger = structlog.get_logger()
"""The logger of every service; `configure` gives it the service's name."""

# One variable for all names: structlog has one for each, and walks through the whole
# context for each line.
_NAMES: Final[ContextVar[Mapping[str, object]]] = ContextVar("names")
_NO_NAMES: Final[Mapping[str, object]] = {}


class _Lines:
    """Writes lines to a file; one that cannot be written is lost, as in `logging`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        # One write for each line: threads must not mix theirs.
        with suppress(OSError, ValueError):
            self._file.write(line + "\n")
            self._file.flush()

    debug = info = warning = error = critical = msg


def configure(*, service: str, host: str, level: str = "info") -> None:
    """Send all logging of this process to stderr as JSON lines of `service`."""

    def name_the_service(_logger: object, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        event.setdefault("host", host)
        return event

    shared: list[Processor] = [
        _add_names,
        name_the_service,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    lines = _Lines(sys.stderr)
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(default=str)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.root.level),
        logger_factory=lambda *_: lines,
    )


@contextmanager
def bound(**names: object) -> Iterator[None]:
    """Put `names` (request_id, method, inode, vm) into every line logged inside.

    They follow tasks started inside; names that are empty are left out.
    """
    given = {key: name for key, name in names.items() if name}
    token = _NAMES.set({**_NAMES.get(_NO_NAMES), **given})
    try:
        yield
    finally:
        _NAMES.reset(token)


def _add_names(_logger: object, _method: str, event: EventDict) -> EventDict:
    return {**_NAMES.get(_NO_NAMES), **event}
