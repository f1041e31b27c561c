"""A host with inodes in every state, and calls on them that are almost right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import Message

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.api.types.v1.types_pb2 import MemPolicy
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.hosts import (
    VM,
    Host,
    Inode,
    counters,
    new_inode,
)

KEEP: Final = FALLOC_FL_KEEP_SIZE
PUNCH: Final = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
MIB: Final = 1 << 20
SCENE_SHAPE: Final = HostShape(
    nodes=(NodeShape(memory_size=40 * MIB, huge_pages={SIZE_2M: 16}),)
)
"""Sixteen 2M pages, and little enough base memory to be used up."""


Body = dict[str, Any]

# What a caller would send; "@word" stands for Scene.words[word].
RIGHT: Final[dict[str, Body]] = {
    "CreateGuestMemfd": {"size": PAGE_SIZE, "page_size": PAGE_SIZE},
    "GetGuestMemfd": {"name": "@shared"},
    "ListGuestMemfds": {},
    "DeleteGuestMemfd": {"name": "@shared"},
    "Fallocate": {"name": "@shared", "mode": KEEP, "offset": 0, "length": PAGE_SIZE},
    "BindMemslot": {
        "name": "@shared",
        "vm": VM,
        "slot": 9,
        "base_gfn": 1 << 20,
        "offset": SIZE_2M,
        "size": SIZE_2M,
    },
    "UnbindMemslot": {"name": "@shared", "vm": VM, "slot": 0},
    "GetPfn": {"name": "@shared", "vm": VM, "slot": 0, "gfn": 0},
    "ConvertRange": {"name": "@shared", "offset": 0, "size": PAGE_SIZE},
    "PopulateRange": {
        "name": "@private",
        "offset": PAGE_SIZE,
        "size": PAGE_SIZE,
        "descriptor": "@long",
    },
    "SetMempolicy": {
        "name": "@mainline",
        "offset": 0,
        "size": PAGE_SIZE,
        "mempolicy": {"mode": MemPolicy.MODE_BIND, "nodes": [0]},
    },
    "GetMempolicy": {"name": "@mainline", "offset": 0, "size": PAGE_SIZE},
    "PinPages": {
        "name": "@shared",
        "offset": 0,
        "size": PAGE_SIZE,
        "kind": pb.HOLD_KIND_PIN,
        "holder": "device",
    },
    "UnpinPages": {"hold": 1},
    "InjectMemoryError": {"name": "@lost", "offset": PAGE_SIZE},
    "UnpoisonMemory": {"name": "@lost", "offset": 0},
    "OpenView": {"name": "@shared", "view": pb.VIEW_HOST},
    "KeepAlive": {"holds": []},
    "GetOperation": {"name": ""},
    "ReadRange": {"name": "@shared", "offset": 0, "size": PAGE_SIZE},
    "WriteRange": {
        "name": "@shared",
        "offset": 0,
        "size": PAGE_SIZE,
        "parts": [{"data": b"w" * PAGE_SIZE}],
    },
    "ListOperations": {},
}
READERS: Final = (
    *("GetGuestMemfd", "ListGuestMemfds", "GetPfn"),
    *("KeepAlive", "GetOperation", "ListOperations", "GetMempolicy", "ReadRange"),
)
MUTATIONS: Final = sorted(rpc for rpc in RIGHT if rpc not in READERS)


def named_in(*bodies: Body) -> set[str]:
    """Return the words that requests name."""
    values = [value for body in bodies for value in body.values()]
    strings = [value for value in values if isinstance(value, str)]
    return {value[1:] for value in strings if value.startswith("@")}


@dataclass
class Scene:
    """Inodes in every state that a refusal needs; `words` are their names.

    shared: 4M; the first 2M bound to slot 0 and shared, page 3 pinned by "disk", the
    rest private. private: 2M, slot 1, page 0 prepared. tiny: 4K pages, slot 2, shared,
    no folio. tiny_private: the same in slot 5, private. closed: its file is closed, a
    hold keeps it. used_up: 2M, slot 3, shared; its one folio was punched while held, so
    that its reservation is empty. used_up_private: as that, private. unused: 2M, slot
    4, shared, no folio. lost, lost_private: 4K pages, slots 7 and 8, two folios, the
    first of which has a memory error. limited, limited_private: 2M, slots 9 and 10,
    of a cgroup that may have nothing. second: 2M of RFC_V2, unbound, shared, page 0
    pinned by "disk". mainline: 2M of MAINLINE, unbound, shared, no folio. in_place: 2M
    of IN_PLACE, one page. plain: as that in 4K pages, of a VM without private memory.
    long, short, view, blind: descriptors of a memfd with two pages and one page, of a
    view, and of a file open for writing alone. guest_pid: a client's.
    """

    gmem: GuestMemfdClient
    words: dict[str, Any]

    async def call(self, rpc: str, body: Body, *, with_id: bool = True) -> Any:
        """Send the right request with the fields of `body` in place of its own."""
        fields = self._resolved({**RIGHT[rpc], **body})
        if rpc == "ConvertRange" and "ranges" not in fields:
            part = {key: fields.pop(key) for key in ("name", "offset", "size")}
            fields["ranges"] = [part]
        if rpc == "WriteRange":
            return await self._write_range(fields, with_id=with_id)
        request = getattr(pb, f"{rpc}Request")(**fields)
        method = getattr(self.gmem._stub, rpc)
        connection = self.gmem.connection
        if rpc == "ReadRange":
            return [part async for part in connection.stream(method, request)]
        if with_id and rpc not in READERS and "request_id" not in fields:
            return await connection.mutate(method, request)
        return await connection.call(method, request)

    async def _write_range(self, fields: Body, *, with_id: bool) -> Any:
        """Send a header of `fields`, if there is any, and then their `parts`."""
        messages = [pb.WriteRangeRequest(**part) for part in fields.pop("parts")]
        if fields:
            header = pb.WriteRangeHeader(**fields)
            if with_id and not header.HasField("request_id"):
                header.request_id.CopyFrom(self.gmem.new_request_id())
            messages.insert(0, pb.WriteRangeRequest(header=header))
        method = self.gmem._stub.WriteRange
        stream = self.gmem.connection.mutate_by_stream
        return await stream(method, lambda: messages, timeout=30)

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("@"):
            return self.words[value[1:]]
        if isinstance(value, dict):
            return {
                key: self._resolved(field)
                for key, field in value.items()
                if field is not None
            }
        return [*map(self._resolved, value)] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Bound:
    """An inode of RFC_V1 whose first 2M a memslot binds."""

    slot: int
    shared: bool = True
    page_size: int = SIZE_2M
    units: int = 1
    cgroup: str = ""


_BOUND: Final = {
    "shared": _Bound(0, units=2),
    "private": _Bound(1, shared=False),
    "tiny": _Bound(2, page_size=PAGE_SIZE),
    "used_up": _Bound(3),
    "unused": _Bound(4),
    "tiny_private": _Bound(5, shared=False, page_size=PAGE_SIZE),
    "used_up_private": _Bound(6),
    "limited": _Bound(9, cgroup="/full"),
    "limited_private": _Bound(10, shared=False, cgroup="/full"),
    "lost": _Bound(7, page_size=PAGE_SIZE),
    "lost_private": _Bound(8, shared=False, page_size=PAGE_SIZE),
    "closed": _Bound(0),
}
_UNBOUND: Final[dict[str, Body]] = {
    "second": {"lineage": "RFC_V2", "page_size": SIZE_2M, "support_shared": True},
    "mainline": {
        "lineage": "MAINLINE",
        "page_size": PAGE_SIZE,
        "mmap": True,
        "init_shared": True,
    },
    "in_place": {"lineage": "IN_PLACE", "page_size": SIZE_2M},
    "plain": {
        "lineage": "IN_PLACE",
        "page_size": PAGE_SIZE,
        "no_private_memory": True,
    },
}
_HELD: Final = {
    "shared": (3, "disk", pb.HOLD_KIND_PIN),
    "second": (0, "disk", pb.HOLD_KIND_PIN),
    "used_up": (0, "somebody", pb.HOLD_KIND_PLAIN),
    "used_up_private": (0, "somebody", pb.HOLD_KIND_PLAIN),
    "closed": (0, "somebody", pb.HOLD_KIND_PLAIN),
}
"""The page of each that is held, by whom and how."""
_OF_A_CLIENT: Final = ("long", "short", "view", "blind", "guest_pid")
EVERYTHING: Final = frozenset((*_BOUND, *_UNBOUND, *_OF_A_CLIENT))


async def build_scene(host: Host, wanted: Iterable[str] = EVERYTHING) -> dict[str, Any]:
    """Make what of Scene's docstring is `wanted`, and what that needs; return words.

    What is of a client process lasts as long as it does.
    """
    names = {*wanted}
    assert names <= EVERYTHING, names - EVERYTHING
    if "private" in names:
        names.add("long")
    async with host.clients() as (allocator, gmem):
        if any(_BOUND[name].cgroup for name in names & _BOUND.keys()):
            await _make_cgroup(allocator)
        made = {
            name: await _make(host, gmem, name)
            for name in (*_BOUND, *_UNBOUND)
            if name in names
        }
        words: dict[str, Any] = {name: inode.name for name, inode in made.items()}
        if not names.isdisjoint(_OF_A_CLIENT):
            words |= await _of_a_client(host, made.get("shared"))
        if "private" in names:
            await Scene(gmem, words).call("PopulateRange", {"offset": 0})
    return words


async def _make_cgroup(allocator: HostAllocatorClient) -> None:
    """Make a cgroup that may have nothing, if it is not there."""
    names = {cgroup.name for cgroup in await allocator.list_cgroups()}
    if "/full" not in names:
        await allocator.create_cgroup("/full")
    await allocator.update_cgroup("/full", page_size=SIZE_2M, max=0, rsvd_max=0)


async def _of_a_client(host: Host, shared: Inode | None) -> dict[str, Any]:
    """Start a client process that gives descriptors, the host view of `shared` too."""
    program = host.program("giver", "scene")
    given: dict[str, Any] = {
        "long": await program.asked("give", 2 * PAGE_SIZE, 0x11),
        "short": await program.asked("give", PAGE_SIZE, 0x22),
        "blind": await program.asked("give_unreadable", str(host.run_dir / "blind")),
        "guest_pid": program.pid,
    }
    if shared is not None:
        await program.asked("take", await shared.token())
        given["view"] = await program.asked("give_view")
    return given


async def _make(host: Host, gmem: GuestMemfdClient, name: str) -> Inode:
    """Make one inode, and bring it into its state."""
    bound = _BOUND.get(name)
    if bound is None:
        made = await gmem.create_guest_memfd(size=SIZE_2M, **_UNBOUND[name])
        inode = Inode(host, gmem, made.name, SIZE_2M)
    else:
        inode = await _make_bound(host, gmem, bound)
    if name in _HELD:
        page, holder, kind = _HELD[name]
        await gmem.pin_pages(
            name=inode.name,
            offset=page * PAGE_SIZE,
            size=PAGE_SIZE,
            holder=holder,
            kind=kind,
        )
    if name in ("lost", "lost_private"):
        await inode.fallocate(KEEP, 0, 2 * PAGE_SIZE)
        await gmem.inject_memory_error(name=inode.name, offset=0)
    if name in ("used_up", "used_up_private"):
        await inode.fallocate(PUNCH, 0, SIZE_2M)
    if name == "used_up_private":
        await inode.convert(0, SIZE_2M, private=True)
    if name == "closed":
        await gmem.delete_guest_memfd(name=inode.name)
    return inode


async def _make_bound(host: Host, gmem: GuestMemfdClient, like: _Bound) -> Inode:
    inode = await new_inode(
        *(host, gmem),
        page_size=like.page_size,
        pages=like.units * SIZE_2M // like.page_size,
        bound=False,
        cgroup=like.cgroup,
    )
    await gmem.bind_memslot(
        name=inode.name,
        vm=VM,
        slot=like.slot,
        base_gfn=0,
        offset=0,
        size=SIZE_2M,
        host_faultable=like.shared,
    )
    return inode


@asynccontextmanager
async def no_base_memory(allocator: HostAllocatorClient) -> AsyncIterator[None]:
    """Have another tenant hold every page of base memory."""
    (node,) = (await allocator.get_statistics()).nodes
    taken = node.free_base_pages
    handle = await allocator.reserve(page_size=PAGE_SIZE, num_pages=taken)
    folios = await allocator.allocate(
        handle=handle, page_size=PAGE_SIZE, nr_folios=taken
    )
    try:
        yield
    finally:
        await allocator.free(handle=handle, folios=folios)
        await allocator.unreserve(handle=handle)


async def everything(
    gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> list[Message]:
    """Return every inode, and the allocator's counters."""
    inodes, counted = await asyncio.gather(
        gmem.list_guest_memfds(), counters(allocator)
    )
    return [*inodes, counted]
