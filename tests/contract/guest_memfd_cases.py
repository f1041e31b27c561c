"""Every call that guest_memfd refuses, in a scene where all of them can be made.

A Case belongs to one row of a table in guest_memfd.proto: rpc and Reason. It says how
the request differs from one that is right. The suite compares the cases with the
tables, so a row without a case fails; ELSEWHERE says who tests the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.contract.guest_memfd_scene import KEEP, MUTATIONS, PUNCH, Body

OTHER_VM: Final = "hosts/h/vms/other"
PAGE: Final = PAGE_SIZE


@dataclass(frozen=True)
class Case:
    """One refused call. `drained`: no page of base memory is free while it is made."""

    rpc: str
    reason: Reason
    errno: str
    body: Body
    words: tuple[str, ...]
    drained: bool = False
    with_id: bool = True

    @property
    def id(self) -> str:
        shown = " ".join(f"{key}={value!r:.40}" for key, value in self.body.items())
        return f"{self.rpc}-{self.reason.lower()}-{shown}"


R = Reason
# Rows that take thousands of calls, or an error no rpc can inject: who has them.
ELSEWHERE: Final = {
    ("Watch", R.REVISION_COMPACTED): "tests/unit/runtime/test_events.py",
    ("PinPages", R.LIMIT_REACHED): "tests/unit/guest_memfd/core/test_life.py",
    ("ConvertRange", R.INTERRUPTED): "tests/unit/guest_memfd/core/test_waiting.py",
    ("OpenView", R.LIMIT_REACHED): "tests/contract/test_guest_memfd.py",
}
NAMES: Final = [
    {"name": name}
    for name in (
        "hosts/h/guestMemfds/77777",
        "hosts/h/guestMemfds/",
        "hosts/h/guestMemfds/-1",
        "hosts/other/guestMemfds/1",
        "",
    )
]


def cases(
    rpc: str,
    reason: Reason,
    errno: str,
    bodies: Iterable[Body],
    *words: str,
    drained: bool = False,
) -> list[Case]:
    """Return a case for each body; `words` must all be found in the sentence."""
    return [Case(rpc, reason, errno, body, words, drained) for body in bodies]


def unknown(rpc: str, reason: Reason = R.INODE_UNKNOWN) -> list[Case]:
    """Return what is refused wherever an inode is named."""
    errno = "EBADF" if reason is R.FD_UNKNOWN else "ENOENT"
    return cases(rpc, reason, errno, NAMES, "never issued|names no guest_memfd")


def ranges(rpc: str) -> list[Case]:
    """Return what is refused wherever an unsigned range is given."""

    def bodies(*pairs: tuple[int, int]) -> list[Body]:
        return [{"offset": offset, "size": size} for offset, size in pairs]

    unaligned = bodies((1, PAGE), (PAGE, 4095), (PAGE, 4097))
    past = bodies(
        *((4 * SIZE_2M, PAGE), (PAGE, 4 * SIZE_2M), (1 << 63, PAGE)),
        *((PAGE, 1 << 63), ((1 << 64) - PAGE, PAGE)),
    )
    return [
        *cases(rpc, R.RANGE_UNALIGNED, "EINVAL", unaligned, "4096", "align it"),
        *cases(rpc, R.RANGE_EMPTY, "EINVAL", bodies((0, 0)), "size is 0", "give"),
        *cases(rpc, R.RANGE_PAST_END, "EINVAL", past, "past the end", "below"),
    ]


def fields(name: str, *values: Any) -> list[Body]:
    """Return a body for each value of one field."""
    return [{name: value} for value in values]


_BIG = {"size": SIZE_2M + PAGE, "page_size": SIZE_2M}
CREATE: Final = [
    *cases(
        *("CreateGuestMemfd", R.SIZE_INVALID, "EINVAL"),
        [*fields("size", 0, 1, PAGE - 1, PAGE + 1, 1 << 63, (1 << 64) - PAGE), _BIG],
        "multiple of [24][KM]",
        "round it up",
    ),
    *cases(
        *("CreateGuestMemfd", R.PAGE_SIZE_UNKNOWN, "EINVAL"),
        fields("page_size", 1, 8192, 2 * SIZE_2M, 1 << 63),
        "page_size \\d+",
        "use one of them",
    ),
    *cases(
        *("CreateGuestMemfd", R.ARGUMENT_INVALID, "EINVAL"),
        fields("lineage", "RFC_V9"),
        "RFC_V9",
        "use RFC_V1",
    ),
    *cases(
        *("CreateGuestMemfd", R.POOL_EMPTY, "ENOMEM"),
        [
            {"size": 64 * SIZE_2M, "page_size": SIZE_2M},
            {"size": SIZE_1G, "page_size": SIZE_1G},
        ],
        "64|1",
        "grow|free",
    ),
    *cases(
        *("CreateGuestMemfd", R.MEMPOLICY_INVALID, "EINVAL"),
        fields("mempolicy", {"mode": 99}),
        "99",
    ),
]

FLAGS: Final = [
    *cases(
        *("CreateGuestMemfd", R.FLAG_UNKNOWN, "EINVAL"),
        fields("support_shared", True),
        "RFC_V1",
    ),
    *cases(
        *("CreateGuestMemfd", R.FLAG_COMBINATION, "EINVAL"),
        [{"lineage": "RFC_V2", "init_private": True}],
        "set both|neither|support_shared|SUPPORT_SHARED",
    ),
    *cases(
        *("Fallocate", R.PAGE_IN_USE, "EAGAIN"),
        [{"name": "@second", "mode": PUNCH, "length": SIZE_2M}],
        "disk",
    ),
    *cases(
        *("BindMemslot", R.USERSPACE_ELSEWHERE, "EINVAL"),
        [{"name": "@second", "offset": 0, "userspace": {"st_dev": 1, "st_ino": 1}}],
        "give that, or none",
    ),
]

OPERATIONS: Final = [
    *cases(
        *("ListOperations", R.PAGE_TOKEN_INVALID, "EINVAL"),
        fields("page_token", "rubbish"),
        "page_token",
    ),
    *cases(
        *("GetOperation", R.OPERATION_UNKNOWN, "ENOENT"),
        fields("name", "", "rubbish", "hosts/h/operations/777"),
        "never issued|over|names no",
    ),
    *cases(
        *("KeepAlive", R.HOLDER_UNKNOWN, "ENOENT"),
        fields("holds", [777777]),
        "777777",
    ),
    *cases(
        *("ConvertRange", R.DEADLINE, "ETIMEDOUT"),
        [{"size": SIZE_2M, "wait_ms": 200}],
        "0x3000",
        "disk",
    ),
    *cases(
        *("ConvertRange", R.ARGUMENT_INVALID, "EINVAL"),
        fields("wait_ms", 600001, (1 << 32) - 1),
        "\\d+ ms is too long",
    ),
    *cases(
        *("PinPages", R.ARGUMENT_INVALID, "EINVAL"),
        fields("ttl_ms", 1, 499, 3600001, (1 << 32) - 1),
        "lease of \\d+ ms .*give 500 to 3600000",
    ),
]

INODES: Final = [
    *unknown("GetGuestMemfd"),
    *unknown("DeleteGuestMemfd"),
    *cases(
        *("DeleteGuestMemfd", R.INODE_UNKNOWN, "ENOENT"),
        fields("name", "@closed"),
        "closed already",
    ),
    *cases(
        *("ListGuestMemfds", R.PAGE_TOKEN_INVALID, "EINVAL"),
        fields("page_token", "rubbish", "1", "\N{SNOWMAN}", "A" * 4096),
        "page_token",
        "without",
    ),
    *unknown("OpenView", R.FD_UNKNOWN),
    *cases(
        *("OpenView", R.FD_UNKNOWN, "EBADF"),
        fields("name", "@closed"),
        "closed",
        "create one",
    ),
    *cases(
        *("OpenView", R.TOKEN_DENIED, "EACCES"),
        [
            {"view": pb.VIEW_GUEST, "vm": vm, "guest_pid": "@guest_pid"}
            for vm in ("", OTHER_VM)
        ],
        "no memslot",
        "bind one",
    ),
    *cases(
        *("OpenView", R.ARGUMENT_INVALID, "EINVAL"),
        fields("view", 0, 3),
        "VIEW_HOST or VIEW_GUEST",
    ),
]

_LATE = (1 << 63) - PAGE
FALLOCATE: Final = [
    *unknown("Fallocate"),
    *cases(
        *("Fallocate", R.MODE_UNSUPPORTED, "EOPNOTSUPP"),
        fields("mode", 0, 2, 4, KEEP | 4, PUNCH | 16, KEEP | 8, -1),
        "mode -?0x",
        "use KEEP_SIZE",
    ),
    *cases(
        *("Fallocate", R.RANGE_UNALIGNED, "EINVAL"),
        [
            {"mode": mode, "offset": offset, "length": length}
            for mode in (KEEP, PUNCH)
            for offset, length in ((1, PAGE), (0, 1), (PAGE, PAGE + 1))
        ],
        "4096",
        "align it",
    ),
    *cases("Fallocate", R.RANGE_EMPTY, "EINVAL", [{"length": 0}], "size is 0", "give"),
    *cases(
        *("Fallocate", R.RANGE_NEGATIVE, "EINVAL"),
        [{"offset": -PAGE}, {"length": -PAGE}, {"offset": -(1 << 63)}],
        "-\\d+ is negative",
        "from 0 on",
    ),
    *cases(
        *("Fallocate", R.RANGE_WRAPS, "EINVAL"),
        [{"offset": _LATE, "length": 2 * PAGE}],
        "2\\^63",
        "shorten it",
    ),
    *cases(
        *("Fallocate", R.RANGE_PAST_END, "EINVAL"),
        [{"offset": 2 * SIZE_2M}, {"length": 3 * SIZE_2M}, {"length": _LATE}],
        "past the end",
        "below",
    ),
    *cases(
        *("Fallocate", R.SUBPOOL_EMPTY, "ENOMEM"),
        [{"name": "@used_up", "length": SIZE_2M}],
        "free",
    ),
    *cases(
        *("Fallocate", R.BASE_MEMORY_EMPTY, "ENOMEM"),
        fields("name", "@tiny"),
        "free",
        drained=True,
    ),
    *cases(
        *("Fallocate", R.VMEMMAP_RESTORE_FAILED, "ENOMEM"),
        [{"name": "@unused", "length": SIZE_2M}],
        *("7", "free"),
        drained=True,
    ),
]

MEMSLOTS: Final = [
    *unknown("BindMemslot", R.FD_UNKNOWN),
    *cases(
        *("BindMemslot", R.FD_UNKNOWN, "EBADF"),
        [{"name": "@closed", "offset": 0}],
        *("closed", "create one"),
    ),
    *ranges("BindMemslot")[:4],
    *cases(
        *("BindMemslot", R.RANGE_PAST_END, "EINVAL"),
        [
            {"offset": 2 * SIZE_2M},
            {"size": 2 * SIZE_2M},
            {"offset": 0, "size": 1 << 63},
        ],
        "past the end",
        "below",
    ),
    *cases(*("BindMemslot", R.RANGE_NEGATIVE, "EINVAL"), [{"offset": -PAGE}], "-4096"),
    *cases(
        *("BindMemslot", R.BINDING_OVERLAP, "EINVAL"),
        [{"offset": SIZE_2M - PAGE, "size": 2 * PAGE}, {"slot": 0}],
        "bound to slot 0",
        "unbind it first",
    ),
    *cases(
        *("BindMemslot", R.BINDING_FOREIGN_VM, "EINVAL"),
        fields("vm", OTHER_VM),
        "vms/other",
        "create one for this VM",
    ),
    *unknown("UnbindMemslot"),
    *cases(
        *("UnbindMemslot", R.BINDING_MISSING, "EFAULT"),
        [{"slot": 9}, {"vm": OTHER_VM}],
        "slot [09] of .* is not bound",
    ),
    *unknown("GetPfn"),
    *cases(
        *("GetPfn", R.BINDING_MISSING, "EFAULT"),
        [{"slot": 9}, {"vm": OTHER_VM}, {"name": "@closed"}],
        "slot [09] of .* is not bound",
        "bind it first",
    ),
    *cases(
        *("GetPfn", R.BINDING_BROKEN, "EIO"),
        fields("gfn", 512, 1 << 63),
        "guest frame 0x",
        "bind it again",
    ),
    *cases(
        *("GetPfn", R.SUBPOOL_EMPTY, "ENOMEM"),
        [{"name": "@used_up", "slot": 3}],
        "free",
    ),
    *cases(
        *("GetPfn", R.BASE_MEMORY_EMPTY, "ENOMEM"),
        [{"name": "@tiny", "slot": 2}],
        "free",
        drained=True,
    ),
    *cases(
        *("GetPfn", R.VMEMMAP_RESTORE_FAILED, "ENOMEM"),
        [{"name": "@unused", "slot": 4}],
        "7",
        drained=True,
    ),
]

CONVERT: Final = [
    *unknown("ConvertRange"),
    *ranges("ConvertRange"),
    *cases(
        *("ConvertRange", R.RANGE_EMPTY, "EINVAL"),
        [{"name": None, "offset": None, "size": None, "ranges": []}],
        "no range",
        "give one",
    ),
    *cases(
        *("ConvertRange", R.ARGUMENT_INVALID, "EINVAL"),
        [
            {
                "name": None,
                "offset": None,
                "size": None,
                "ranges": [
                    {"name": "@shared", "offset": 0, "size": SIZE_2M},
                    {"name": "@shared", "offset": PAGE, "size": PAGE},
                ],
            }
        ],
        "overlap at offset 0x1000",
        "each page once",
    ),
    *cases(
        *("ConvertRange", R.PAGE_IN_USE, "EINVAL"),
        [{"size": SIZE_2M}, {"size": SIZE_2M, "validate_only": True}],
        *("0x3000", "disk", "unpin"),
    ),
    *cases(
        *("ConvertRange", R.VMEMMAP_RESTORE_FAILED, "ENOMEM"),
        [{"name": "@private", "to_shared": True}],
        "7",
        drained=True,
    ),
]

POPULATE: Final = [
    *unknown("PopulateRange"),
    *ranges("PopulateRange"),
    *cases(
        *("PopulateRange", R.PAGE_NOT_FAULTABLE, "EACCES"),
        fields("name", "@shared"),
        "0x1000 .* is shared",
        "convert it to private",
    ),
    *cases(
        *("PopulateRange", R.PAGE_PREPARED, "EEXIST"),
        [{"offset": 0, "size": 2 * PAGE}],
        "punch it first",
    ),
    *cases(
        *("PopulateRange", R.DESCRIPTOR_UNKNOWN, "ENOENT"),
        [
            *fields("descriptor", "descriptors/777", "", "/etc/passwd"),
            # No folio is allocated for it either.
            {"name": "@tiny_private", "descriptor": "descriptors/777"},
        ],
        "give it again",
    ),
    *cases(
        *("PopulateRange", R.DESCRIPTOR_TYPE, "EINVAL"),
        fields("descriptor", "@view", "@blind"),
        "is a view.*give a memfd|cannot be read",
    ),
    *cases(
        *("PopulateRange", R.RANGE_WRAPS, "EINVAL"),
        fields("source_offset", _LATE, 1 << 63, (1 << 64) - PAGE),
        "source_offset 0x",
        "shorten it",
    ),
    *cases(
        *("PopulateRange", R.PAGE_UNREADABLE, "EFAULT"),
        [
            {"size": 2 * PAGE, "descriptor": "@short"},
            {"source_offset": 2 * PAGE},
            {"source_offset": _LATE - PAGE},
        ],
        "\\d+ bytes",
        "give a longer one",
    ),
    *cases(
        *("PopulateRange", R.SUBPOOL_EMPTY, "ENOMEM"),
        fields("name", "@used_up_private"),
        "free",
    ),
    *cases(
        *("PopulateRange", R.BASE_MEMORY_EMPTY, "ENOMEM"),
        fields("name", "@tiny_private"),
        "free",
        drained=True,
    ),
]

HOLDS: Final = [
    *unknown("PinPages"),
    *ranges("PinPages"),
    *cases(
        *("PinPages", R.PAGE_NOT_FAULTABLE, "EACCES"),
        [{"offset": SIZE_2M - PAGE, "size": 2 * PAGE}],
        "0x200000 .* is private",
        "convert it to shared",
    ),
    *cases(
        *("PinPages", R.ARGUMENT_INVALID, "EINVAL"),
        fields("kind", 0, 9),
        "say HOLD_KIND_PIN",
    ),
    *cases(
        *("PinPages", R.SUBPOOL_EMPTY, "ENOMEM"), fields("name", "@used_up"), "free"
    ),
    *cases(
        *("PinPages", R.BASE_MEMORY_EMPTY, "ENOMEM"),
        fields("name", "@tiny"),
        "free",
        drained=True,
    ),
    *cases(
        *("PinPages", R.VMEMMAP_RESTORE_FAILED, "ENOMEM"),
        fields("name", "@unused"),
        "7",
        drained=True,
    ),
    *cases(
        *("UnpinPages", R.HOLDER_UNKNOWN, "ENOENT"),
        fields("hold", 0, 777777, (1 << 64) - 1),
        "hold \\d+ was never issued",
    ),
]

# The id is looked at before the body.
IDS: Final = [
    Case(rpc, R.REQUEST_ID_MISSING, "EINVAL", body, ("request_id",), with_id=False)
    for rpc in MUTATIONS
    for body in ({}, {"request_id": {"client": "c", "incarnation": "i"}})
]

CASES: Final = [
    *(*CREATE, *FLAGS, *OPERATIONS, *INODES, *FALLOCATE, *MEMSLOTS),
    *(*CONVERT, *POPULATE, *HOLDS, *IDS),
]
