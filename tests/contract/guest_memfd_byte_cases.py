"""Every call of ReadRange and WriteRange that is refused; the rest of the cases."""

from __future__ import annotations

from typing import Final

from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.contract.guest_memfd_cases import Case, cases, fields, unknown
from tests.contract.guest_memfd_scene import Body

R = Reason
PAGE: Final = PAGE_SIZE
MIB: Final = 1 << 20
BYTES_ELSEWHERE: Final = {
    ("ReadRange", R.BINDING_BROKEN): "tests/unit/guest_memfd/core/test_byte_access.py",
    ("WriteRange", R.BINDING_BROKEN): "tests/unit/guest_memfd/core/test_byte_access.py",
    ("WriteRange", R.PAGE_IN_USE): "tests/unit/guest_memfd/core/test_byte_access.py",
}


def _both(rpc: str) -> list[Case]:
    past: list[Body] = [
        *({"offset": 2 * SIZE_2M}, {"offset": 2 * SIZE_2M - 1, "size": 2}),
        *({"size": 1 << 63}, {"offset": (1 << 64) - 1, "size": 1}),
    ]
    return [
        *unknown(rpc, R.FD_UNKNOWN),
        *cases(rpc, R.FD_UNKNOWN, "EBADF", fields("name", "@closed"), "create one"),
        *cases(rpc, R.RANGE_EMPTY, "EINVAL", fields("size", 0), "size is 0", "give"),
        *cases(rpc, R.RANGE_PAST_END, "EINVAL", past, "past the end", "below"),
        *cases(
            *(rpc, R.PAGE_NOT_FAULTABLE, "EACCES"),
            [{"offset": SIZE_2M - 1, "size": 2}, {"name": "@private"}],
            *("is private", "convert it to shared"),
        ),
        *cases(*(rpc, R.PAGE_POISONED, "EHWPOISON"), fields("name", "@lost"), "punch"),
        *cases(*(rpc, R.CGROUP_LIMIT, "ENOMEM"), fields("name", "@limited"), "raise"),
        *cases(*(rpc, R.SUBPOOL_EMPTY, "ENOMEM"), fields("name", "@used_up"), "free"),
        *cases(
            *(rpc, R.BASE_MEMORY_EMPTY, "ENOMEM"),
            fields("name", "@tiny"),
            "free",
            drained=True,
        ),
        *cases(
            *(rpc, R.VMEMMAP_RESTORE_FAILED, "ENOMEM"),
            fields("name", "@unused"),
            "7",
            drained=True,
        ),
    ]


def _parts(*sizes: int) -> Body:
    return {"parts": [{"data": bytes(size)} for size in sizes]}


_NO_HEADER: Final[Body] = {"name": None, "offset": None, "size": None}
BYTE_CASES: Final = [
    *(*_both("ReadRange"), *_both("WriteRange")),
    *cases(
        *("WriteRange", R.STREAM_LENGTH, "EINVAL"),
        [_parts(PAGE - 1), _parts(), _parts(PAGE, 1), _parts(PAGE + 1)],
        "as many",
    ),
    *cases(
        *("WriteRange", R.ARGUMENT_INVALID, "EINVAL"),
        [
            {"size": MIB + 1, **_parts(MIB + 1)},
            *(_parts(0), {"parts": [{"header": {}}]}, {"parts": [{}]}),
            *(_NO_HEADER | _parts(PAGE), _NO_HEADER | {"parts": [{}]}),
        ],
        "header",
        "send",
    ),
]
