"""What guest_memfd refuses because of memory errors, and because of cgroups."""

from __future__ import annotations

from typing import Final

from gmem.uapi.errors import Reason
from gmem.uapi.pages import SIZE_2M
from tests.contract.guest_memfd_cases import PAGE, cases, fields, unknown
from tests.contract.guest_memfd_scene import Body

R = Reason
ELSEWHERE: Final = {
    ("BindMemslot", R.DESCRIPTOR_TYPE): "tests/cluster/test_bad_input.py",
    ("CreateGuestMemfd", R.LIMIT_REACHED): (
        "tests/unit/guest_memfd/core/test_checks.py"
    ),
    ("InjectMemoryError", R.PAGE_IN_USE): (
        "tests/unit/guest_memfd/core/test_memory_failure.py"
    ),
}
_AT_OFFSET: Final = [
    case
    for rpc in ("InjectMemoryError", "UnpoisonMemory")
    for case in (
        *unknown(rpc),
        *cases(
            *(rpc, R.RANGE_UNALIGNED, "EINVAL"),
            fields("offset", 1, PAGE - 1, PAGE + 1),
            "4096",
            "align it",
        ),
        *cases(
            *(rpc, R.RANGE_PAST_END, "EINVAL"),
            fields("offset", 2 * SIZE_2M, 1 << 63, (1 << 64) - PAGE),
            "past the end",
            "below",
        ),
    )
]

ERROR_CASES: Final = [
    *_AT_OFFSET,
    *cases(
        *("InjectMemoryError", R.FOLIO_UNKNOWN, "ENOENT"),
        [{"name": "@tiny"}, {"name": "@unused"}, {"offset": 2 * PAGE}],
        "is a hole",
        "allocate it first",
    ),
    *cases(
        *("InjectMemoryError", R.PAGE_POISONED, "EHWPOISON"),
        [{"offset": 0}, {"offset": 0, "name": "@lost_private"}],
        "offset 0x0",
        "unpoison it",
    ),
    *cases(
        *("InjectMemoryError", R.ARGUMENT_INVALID, "EINVAL"),
        fields("kill_policy", 9),
        "say KILL_POLICY_EARLY",
    ),
    *cases(
        *("UnpoisonMemory", R.FRAME_UNKNOWN, "ENOENT"),
        [{"name": "@shared"}, {"offset": PAGE}, {"name": "@tiny"}],
        "has no memory error",
    ),
    *cases(
        *("GetPfn", R.PAGE_POISONED, "EHWPOISON"),
        [{"name": "@lost", "slot": 7}, {"name": "@lost_private", "slot": 8}],
        "offset 0x0",
        "punch its folio",
    ),
    *cases(
        *("PinPages", R.PAGE_POISONED, "EHWPOISON"),
        [{"name": "@lost"}, {"name": "@lost", "size": 4 * PAGE}],
        "offset 0x0",
        "punch its folio",
    ),
    *cases(
        *("PopulateRange", R.PAGE_POISONED, "EHWPOISON"),
        [{"name": "@lost_private", "offset": 0}],
        "offset 0x0",
        "punch its folio",
    ),
]

_LIMITED: Final[dict[str, Body]] = {
    "Fallocate": {"name": "@limited", "length": SIZE_2M},
    "GetPfn": {"name": "@limited", "slot": 9},
    "PinPages": {"name": "@limited"},
    "PopulateRange": {"name": "@limited_private"},
}
_V2: Final[Body] = {"lineage": "RFC_V2", "page_size": SIZE_2M, "size": SIZE_2M}
CGROUP_CASES: Final = [
    *[
        case
        for rpc, body in _LIMITED.items()
        for case in cases(
            *(rpc, R.CGROUP_LIMIT, "ENOMEM"),
            [body],
            "hugetlb.2MB.max of cgroup /full",
            "raise it",
        )
    ],
    *cases(
        *("CreateGuestMemfd", R.CGROUP_LIMIT, "ENOMEM"),
        [_V2 | {"cgroup": "/full"}],
        "hugetlb.2MB.rsvd.max of cgroup /full",
        "raise it",
    ),
    *cases(
        *("CreateGuestMemfd", R.CGROUP_UNKNOWN, "ENOENT"),
        [{"cgroup": "/nobody"}, _V2 | {"cgroup": "nobody"}],
        "there is no cgroup",
        "create it",
    ),
]
