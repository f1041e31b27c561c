"""One JSON object per line on stderr, with the request's names in every line.

Keys: event, level, timestamp, service, host, and where they are known request_id,
method, inode, vm. What the libraries log through `logging` takes the same road.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor

logger: structlog.stdlib.BoundLogger = structlog.get_logger()
"""The logger of every service; `configure` gives it the service's name."""


def configure(*, service: str, host: str, level: str = "info") -> None:
    """Send all logging of this process to stderr as JSON lines of `service`."""

    def name_the_service(_logger: object, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        event.setdefault("host", host)
        return event

    shared: list[Processor] = [
        merge_contextvars,
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
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


@contextmanager
def bound(**names: object) -> Iterator[None]:
    """Put `names` (request_id, method, inode, vm) into every line logged inside.

    They follow tasks started inside; names that are empty are left out.
    """
    with bound_contextvars(**{key: name for key, name in names.items() if name}):
        yield
