"""Lists in pages: opaque tokens that only the service that made them accepts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeAlias, TypeVar

from gmem.uapi.errors import BadRequest, Reason

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000

T = TypeVar("T")
Key: TypeAlias = int | str

# A token outlives neither the service nor the list it was made for.
_SECRET = secrets.token_bytes(16)
_MAC_BYTES = 8


def paginate(
    items: Iterable[T],
    *,
    page_size: int,
    page_token: str,
    scope: str,
    key: Callable[[T], Key],
) -> tuple[list[T], str]:
    """Return one page of `items` in the order of `key`, and the next page's token.

    `page_size` 0 means PAGE_SIZE_DEFAULT, more than PAGE_SIZE_MAX means that. `scope`
    names the list ("pools"). The token is empty after the last page; an item added or
    removed between two pages disturbs no other. PAGE_TOKEN_INVALID for a foreign token.
    """
    after = _open(page_token, scope) if page_token else None
    size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
    ordered = sorted(items, key=key)
    rest = (item for item in ordered if after is None or _is_after(key(item), after))
    page = list(islice(rest, size + 1))
    if len(page) <= size:
        return page, ""
    return page[:size], _seal(key(page[size - 1]), scope)


def _is_after(key: Key, last: Key) -> bool:
    assert type(key) is type(last), (key, last)
    return key > last  # type: ignore[operator]  # of one type


def _seal(last: Key, scope: str) -> str:
    body = json.dumps([scope, last]).encode()
    return base64.urlsafe_b64encode(_mac(body) + body).decode()


def _open(token: str, scope: str) -> Key:
    try:
        sealed = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        sealed = b""
    mac, body = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
    if hmac.compare_digest(mac, _mac(body)):
        of_scope, last = json.loads(body)
        if of_scope == scope:
            return int(last) if isinstance(last, int) else str(last)
    raise BadRequest(
        Reason.PAGE_TOKEN_INVALID,
        f"page_token is not one of this service's for {scope}; start without a token",
    )


def _mac(body: bytes) -> bytes:
    return hashlib.blake2b(body, key=_SECRET, digest_size=_MAC_BYTES).digest()
