"""One JSON object per line on stderr, with the request's names in every line.

Keys: timestamp, level, service, host, event, and where they are known request_id,
method, inode, vm; a traceback is under `exception`. What the libraries log through
`logging` gets the same form. What we log does not go through `logging`: that doubles
the cost of a line, and there is one for each call that changes something.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_encode: Final = json.JSONEncoder(default=str).encode
_NOTHING: Final[Mapping[str, object]] = {}
_bound: ContextVar[Mapping[str, object]] = ContextVar("bound", default=_NOTHING)


class Logger:
    """Writes an event and its fields; until it is configured, of every level."""

    def __init__(self) -> None:
        """Name no service yet."""
        self.names: dict[str, object] = {}
        self.level = logging.DEBUG

    def debug(self, event: str, **fields: object) -> None:
        """Say what only who looks for a mistake wants to know."""
        self.write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Say what was done."""
        self.write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Say what somebody may want to change."""
        self.write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Say what failed."""
        self.write("error", event, fields)

    def critical(self, event: str, **fields: object) -> None:
        """Say what ends the process."""
        self.write("critical", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Say what failed, with the traceback of the exception that is handled."""
        self.write("error", event, {**fields, "exc_info": sys.exception()})

    def write(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        """Write one line; `exc_info` among `fields` is an exception.

        A line that cannot be written is lost, as in `logging`.
        """
        if _LEVELS[level] < self.level:
            return
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        line = {"timestamp": now, "level": level, **self.names, **_bound.get()}
        line |= {"event": event, **fields}
        error = line.pop("exc_info", None)
        if isinstance(error, BaseException):
            line["exception"] = "".join(traceback.format_exception(error)).rstrip()
        # One write for each line: threads must not mix theirs.
        with suppress(OSError, ValueError):
            sys.stderr.write(_encode(line) + "\n")
            sys.stderr.flush()


logger: Final = Logger()
"""The logger of every service; `configure` gives it the service's name."""


class _FromLibraries(logging.Handler):
    """Writes what was logged through `logging`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        error = record.exc_info[1] if record.exc_info else None
        level = record.levelname.lower()
        fields = {"logger": record.name, "exc_info": error}
        logger.write(level if level in _LEVELS else "info", record.getMessage(), fields)


def configure(*, service: str, host: str, level: str = "info") -> None:
    """Send all logging of this process to stderr as JSON lines of `service`."""
    logger.names = {"service": service, "host": host}
    logger.level = _LEVELS[level.lower()]
    logging.basicConfig(handlers=[_FromLibraries()], level=logger.level, force=True)


@contextmanager
def bound(**names: object) -> Iterator[None]:
    """Put `names` (request_id, method, inode, vm) into every line logged inside.

    They follow tasks started inside; names that are empty are left out.
    """
    known = {key: name for key, name in names.items() if name}
    token = _bound.set({**_bound.get(), **known})
    try:
        yield
    finally:
        _bound.reset(token)
