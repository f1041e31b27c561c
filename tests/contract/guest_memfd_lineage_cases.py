"""More that guest_memfd refuses, most of it by lineage; see guest_memfd_cases."""

from __future__ import annotations

from typing import Final

from gmem.api.types.v1.types_pb2 import MemPolicy
from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.contract.guest_memfd_cases import Case, cases, fields, ranges, unknown
from tests.contract.guest_memfd_scene import PUNCH, Body

R = Reason
_BIND: Final = MemPolicy.MODE_BIND
_MAINLINE: Final[Body] = {"lineage": "MAINLINE"}


def on(name: str, *bodies: Body) -> list[Body]:
    """Return requests for one inode of the scene."""
    return [{"name": name, **body} for body in bodies]


def policies(*values: Body) -> list[Body]:
    """Return a request for each memory policy."""
    return [{"mempolicy": value} for value in values]


MEMPOLICIES: Final = [
    *[
        case
        for rpc in ("SetMempolicy", "GetMempolicy")
        for case in (
            *unknown(rpc),
            *ranges(rpc),
            *cases(
                *(rpc, R.OPERATION_UNSUPPORTED, "EOPNOTSUPP"),
                on("@shared", {}) + on("@second", {}),
                "RFC_V[12]",
                "one memory policy",
            ),
        )
    ],
    *cases(
        *("SetMempolicy", R.MEMPOLICY_INVALID, "EINVAL"),
        policies({"mode": 999}, {"mode": -1}),
        "999|-1",
    ),
    *cases(
        *("SetMempolicy", R.MEMPOLICY_INVALID, "EINVAL"),
        policies({"mode": _BIND}, {"mode": MemPolicy.MODE_INTERLEAVE}),
        "without nodes",
    ),
    *cases(
        *("SetMempolicy", R.MEMPOLICY_INVALID, "EINVAL"),
        policies({"mode": MemPolicy.MODE_DEFAULT, "nodes": [0]}),
        "default policy has no nodes",
    ),
    *cases(
        *("SetMempolicy", R.NODE_UNKNOWN, "EINVAL"),
        policies({"mode": _BIND, "nodes": [0, 1]}, {"mode": _BIND, "nodes": [1 << 31]}),
        "node \\d+ does not exist",
    ),
]

FLAGS: Final = [
    *cases(
        *("CreateGuestMemfd", R.FLAG_UNKNOWN, "EINVAL"),
        [
            {"mmap": True},
            {"init_shared": True},
            _MAINLINE | {"support_shared": True},
            _MAINLINE | {"init_private": True},
            {"lineage": "RFC_V2", "mmap": True},
        ],
        "does not know",
        "clear it",
    ),
    *cases(
        *("CreateGuestMemfd", R.PAGE_SIZE_UNKNOWN, "EINVAL"),
        [_MAINLINE | {"size": SIZE_2M, "page_size": SIZE_2M}],
        "MAINLINE has pages of 4K only",
    ),
]

IN_PLACE: Final = [
    *cases(
        *("CreateGuestMemfd", R.FLAG_COMBINATION, "EINVAL"),
        [
            {
                "lineage": "IN_PLACE",
                "init_shared": True,
                "size": SIZE_2M,
                "page_size": SIZE_2M,
            }
        ],
        "init_shared with huge pages",
    ),
    *cases(
        *("Fallocate", R.RANGE_UNALIGNED, "EINVAL"),
        on("@in_place", {}, {"offset": PAGE_SIZE}, {"mode": PUNCH}),
        "multiple of 2097152",
    ),
    *cases(
        *("ConvertRange", R.ATTRIBUTE_UNSUPPORTED, "EINVAL"),
        on("@plain", {}, {"to_shared": True}, {"validate_only": True}),
        "no private memory",
        "SW_PROTECTED",
    ),
]

CONVERSION: Final = cases(
    *("ConvertRange", R.IOCTL_UNKNOWN, "ENOTTY"),
    on(
        "@mainline",
        {},
        {"to_shared": True},
        {"validate_only": True},
        {"wait_ms": 100},
        {"size": 4 * PAGE_SIZE},
    ),
    "not converted in place",
    "KVM_SET_MEMORY_ATTRIBUTES",
)

NAMES: Final = [
    *cases(
        *("BindMemslot", R.DESCRIPTOR_TYPE, "EINVAL"),
        fields("name", "hosts/h", "hosts/h/vms/a", "descriptors/1"),
        "is no guest_memfd",
    ),
    *cases(
        *("CreateGuestMemfd", R.LIMIT_REACHED, "ENOMEM"),
        fields("size", (1 << 40) + PAGE_SIZE, 1 << 62),
        "make several",
    ),
]

CASES: Final[list[Case]] = [*MEMPOLICIES, *FLAGS, *IN_PLACE, *CONVERSION, *NAMES]
