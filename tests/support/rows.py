"""A journal as a dict: what is left when changes are applied one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def apply(rows: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply one transaction as gmem.runtime.journal does; return `rows`."""
    for key, value in changes.items():
        if value is not None:
            rows[key] = value
        elif key.endswith("/"):
            for below in [k for k in rows if k.startswith(key)]:
                del rows[below]
        else:
            rows.pop(key, None)
    return rows
