"""How long a call may wait for somebody to let go of pages."""

from __future__ import annotations

from typing import Final

from gmem.uapi.errors import BadRequest, Reason

WAIT_MS_MAX: Final = 600_000


def require_wait(wait_ms: int) -> None:
    """Refuse a wait of more than WAIT_MS_MAX milliseconds: ARGUMENT_INVALID."""
    if wait_ms > WAIT_MS_MAX:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"a wait of {wait_ms} ms is too long: wait {WAIT_MS_MAX} at most, and call "
            "again",
            wait_ms=wait_ms,
        )
