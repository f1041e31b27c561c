"""Lists in pages."""

from __future__ import annotations

import base64

import pytest

from gmem.runtime.paging import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, paginate
from gmem.uapi.errors import BadRequest, Reason


def page(items: list[int], size: int, token: str = "") -> tuple[list[int], str]:
    return paginate(
        items, page_size=size, page_token=token, scope="vms", key=lambda item: item
    )


def test_pages_hold_every_item_once_and_in_order() -> None:
    items, seen, token = list(range(10, 0, -1)), [], ""
    while True:
        part, token = page(items, 3, token)
        seen += part
        if not token:
            break
    assert seen == list(range(1, 11))


def test_an_item_that_goes_between_two_pages_disturbs_no_other() -> None:
    first, token = page([1, 2, 3, 4], 2)
    second, token = page([1, 3, 4], 2, token)
    assert (first, second, token) == ([1, 2], [3, 4], "")


@pytest.mark.parametrize(
    ("asked", "given"), [(0, PAGE_SIZE_DEFAULT), (1 << 31, PAGE_SIZE_MAX)]
)
def test_a_page_is_bounded(asked: int, given: int) -> None:
    part, token = page(list(range(2000)), asked)
    assert len(part) == given
    assert token


def forged() -> str:
    return base64.urlsafe_b64encode(b"12345678" + b'["vms", 1]').decode()


@pytest.mark.parametrize("token", ["x", "é", "AAAA", forged()])
def test_a_token_of_somebody_else_is_refused(token: str) -> None:
    with pytest.raises(BadRequest) as caught:
        page([1, 2, 3], 2, token)
    assert caught.value.reason is Reason.PAGE_TOKEN_INVALID


def test_a_token_of_another_list_is_refused() -> None:
    _part, token = paginate(
        ["a", "b"], page_size=1, page_token="", scope="pools", key=lambda item: item
    )
    with pytest.raises(BadRequest, match="for vms"):
        page([1, 2], 1, token)
