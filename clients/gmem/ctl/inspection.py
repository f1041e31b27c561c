"""The commands meminfo and inode: what the services know, in the kernel's formats."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import HOLD_KIND_PIN, GuestMemfd
from gmem.api.host_allocator.v1.host_allocator_pb2 import (
    GetStatisticsResponse,
    Meminfo,
)
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.ctl.errors import ControlError
from gmem.ctl.output import console, print_table
from gmem.ctl.state import HostState
from gmem.uapi.pages import format_size

# The order of fs/proc/meminfo.c.
_MEMINFO_KB: Final = (
    ("MemTotal", "mem_total_kb"),
    ("MemFree", "mem_free_kb"),
    ("HardwareCorrupted", "hardware_corrupted_kb"),
)
_MEMINFO_PAGES: Final = (
    ("HugePages_Total", "huge_pages_total"),
    ("HugePages_Free", "huge_pages_free"),
    ("HugePages_Rsvd", "huge_pages_rsvd"),
    ("HugePages_Surp", "huge_pages_surp"),
)
_MEMINFO_HUGE_KB: Final = (
    ("Hugepagesize", "hugepagesize_kb"),
    ("Hugetlb", "hugetlb_kb"),
)
_INTEGERS: Final = {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}
_FRAGMENTS_SHOWN: Final = 32
_OFFSETS_SHOWN: Final = 8


async def statistics(state: HostState) -> GetStatisticsResponse:
    """Ask host_allocator for its counters. Raises TransportError."""
    target = state.service("host_allocator").target
    async with HostAllocatorClient(target, client="gmemctl") as allocator:
        return await allocator.get_statistics()


async def inodes(state: HostState) -> list[GuestMemfd]:
    """Ask guest_memfd for all inodes. Raises TransportError."""
    async with guest_memfd(state) as client:
        return await client.list_guest_memfds()


async def inode(state: HostState, name: str) -> GuestMemfd:
    """Ask for one inode. Raises NoSuchObject, TransportError."""
    async with guest_memfd(state) as client:
        return await client.get_guest_memfd(name)


def inode_name(host: str, text: str) -> str:
    """Return the resource name of `7` or of `hosts/local/guestMemfds/7`."""
    if text.isascii() and text.isdigit():
        return f"hosts/{host}/guestMemfds/{text}"
    if not text.startswith("hosts/"):
        raise ControlError(
            f"{text!r} is no inode: give its number, see gmemctl inode list"
        )
    return text


def message_values(message: Message) -> dict[str, Any]:
    """Return a protobuf message as JSON values; 64-bit integers stay integers."""
    values: dict[str, Any] = MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    return _with_integers(message, values)


def meminfo_text(meminfo: Meminfo) -> str:
    """Return the lines of /proc/meminfo, in its order, widths and units."""
    lines = [_kb_line(name, getattr(meminfo, field)) for name, field in _MEMINFO_KB]
    for name, field in _MEMINFO_PAGES:
        lines.append(f"{name + ':':<18} {getattr(meminfo, field):5d}")
    lines += [
        _kb_line(name, getattr(meminfo, field)) for name, field in _MEMINFO_HUGE_KB
    ]
    return "\n".join(lines) + "\n"


def print_inodes(found: list[GuestMemfd]) -> None:
    """Print one line per inode."""
    columns = (
        "INODE",
        "SIZE",
        "PAGE",
        "LINEAGE",
        "WHOLE",
        "SPLIT",
        "SHARED",
        "PRIVATE",
    )
    rows = [
        (
            one.inode,
            format_size(one.size),
            format_size(one.page_size),
            one.lineage,
            one.whole_folios,
            one.split_folios,
            one.shared_pages,
            one.private_pages,
        )
        for one in found
    ]
    print_table(columns, rows)


def print_inode(one: GuestMemfd) -> None:
    """Print all that is known of an inode."""
    print_inodes([one])
    console().print(
        f"{one.name}: {'open' if one.file_open else 'closed'}, "
        f"st_blocks {one.st_blocks}, st_blksize {one.st_blksize}, "
        f"host views {one.host_views_open}, guest views {one.guest_views_open}",
        markup=False,
    )
    if one.poisoned_pages:
        print_poisoned(one)
    if one.bindings:
        rows = [
            (b.vm, b.slot, hex(b.base_gfn), hex(b.offset), format_size(b.size))
            for b in one.bindings
        ]
        print_table(("VM", "SLOT", "BASE_GFN", "OFFSET", "SIZE"), rows)
    if one.holds:
        print_table(("HOLD", "KIND", "HOLDER", "OFFSET", "SIZE"), _hold_rows(one))
    print_table(("OFFSET", "SIZE", "FAULTABILITY"), _fragment_rows(one))
    hidden = one.nr_fragments - min(one.nr_fragments, _FRAGMENTS_SHOWN)
    if hidden:
        console().print(f"... and {hidden} more runs")


def print_poisoned(one: GuestMemfd) -> None:
    """Print where an inode has memory errors."""
    shown = ", ".join(hex(offset) for offset in one.poisoned_offsets[:_OFFSETS_SHOWN])
    more = one.poisoned_pages - min(one.poisoned_pages, _OFFSETS_SHOWN)
    rest = f" and {more} more" if more else ""
    console().print(f"memory errors at {shown}{rest}", markup=False)


def _hold_rows(one: GuestMemfd) -> list[tuple[object, ...]]:
    return [
        (
            hold.hold,
            "pin" if hold.kind == HOLD_KIND_PIN else "plain",
            hold.holder,
            hex(hold.offset),
            format_size(hold.size),
        )
        for hold in one.holds
    ]


def _fragment_rows(one: GuestMemfd) -> list[tuple[object, ...]]:
    return [
        (hex(run.offset), format_size(run.size), "shared" if run.shared else "private")
        for run in one.fragments[:_FRAGMENTS_SHOWN]
    ]


def _kb_line(name: str, kilobytes: int) -> str:
    # show_val_kb() pads the name to 16 characters and the number to 8;
    # HardwareCorrupted is one character too long and takes it from the number.
    width = 24 - max(16, len(name) + 2)
    return f"{name + ':':<15} {kilobytes:{width}d} kB"


def _with_integers(message: Message, values: dict[str, Any]) -> dict[str, Any]:
    """Undo protobuf's habit of writing 64-bit integers as JSON strings."""
    for field in message.DESCRIPTOR.fields:
        value = values.get(field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None and isinstance(value, list):
            parts = getattr(message, field.name)
            values[field.name] = [
                _with_integers(part, item)
                for part, item in zip(parts, value, strict=True)
            ]
        elif field.message_type is not None and isinstance(value, dict):
            _with_integers(getattr(message, field.name), value)
        elif field.cpp_type in _INTEGERS and isinstance(value, str):
            values[field.name] = int(value)
    return values


def guest_memfd(state: HostState) -> GuestMemfdClient:
    """Return a client of the host's guest_memfd."""
    return GuestMemfdClient(state.service("guest_memfd").target, client="gmemctl")
