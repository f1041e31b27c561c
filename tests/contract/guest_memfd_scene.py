"""A host with inodes in every state, and calls on them that are almost right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
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
    Program,
    counters,
    new_inode,
)

KEEP: Final = FALLOC_FL_KEEP_SIZE
PUNCH: Final = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
MIB: Final = 1 << 20
SCENE_SHAPE: Final = HostShape(
    nodes=(NodeShape(memory_size=128 * MIB, huge_pages={SIZE_2M: 16}),)
)
"""Sixteen 2M pages, and little enough base memory to be used up."""
GIVER: Final = ("giver", "scene")


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


async def build_scene(host: Host) -> dict[str, Any]:
    """Make what Scene's docstring lists; return its words.

    The holds and descriptors are those of a client process of the host: they last as
    long as it does.
    """
    program = host.program(*GIVER)
    async with host.clients(*GIVER) as (allocator, gmem):
        await _cgroup(allocator)
        inodes = await _inodes(host, gmem)
        words: dict[str, Any] = {name: inode.name for name, inode in inodes.items()}
        words |= await _descriptors(host, program, inodes["shared"])
        words["guest_pid"] = program.pid
        scene = Scene(gmem, words)
        await scene.call("PopulateRange", {"offset": 0})
    return words


async def _cgroup(allocator: HostAllocatorClient) -> None:
    """Make a cgroup that may have nothing, if it is not there."""
    names = {cgroup.name for cgroup in await allocator.list_cgroups()}
    if "/full" not in names:
        await allocator.create_cgroup("/full")
    await allocator.update_cgroup("/full", page_size=SIZE_2M, max=0, rsvd_max=0)


async def _descriptors(host: Host, program: Program, inode: Inode) -> dict[str, str]:
    await program.asked("take", await inode.token())
    blind = str(host.run_dir / "blind")
    return {
        "long": await program.asked("give", 2 * PAGE_SIZE, 0x11),
        "short": await program.asked("give", PAGE_SIZE, 0x22),
        "view": await program.asked("give_view"),
        "blind": await program.asked("give_unreadable", blind),
    }


async def _make(
    host: Host,
    gmem: GuestMemfdClient,
    slot: int,
    *,
    shared: bool,
    page_size: int,
    units: int = 1,
    cgroup: str = "",
) -> Inode:
    """Make an inode of RFC_V1 and bind its first 2M."""
    inode = await new_inode(
        *(host, gmem),
        page_size=page_size,
        pages=units * SIZE_2M // page_size,
        bound=False,
        cgroup=cgroup,
    )
    await gmem.bind_memslot(
        name=inode.name,
        vm=VM,
        slot=slot,
        base_gfn=0,
        offset=0,
        size=SIZE_2M,
        host_faultable=shared,
    )
    return inode


async def _inodes(host: Host, gmem: GuestMemfdClient) -> dict[str, Inode]:
    make = partial(_make, host, gmem)
    made = {
        "shared": await make(0, shared=True, page_size=SIZE_2M, units=2),
        "private": await make(1, shared=False, page_size=SIZE_2M),
        "tiny": await make(2, shared=True, page_size=PAGE_SIZE),
        "used_up": await make(3, shared=True, page_size=SIZE_2M),
        "unused": await make(4, shared=True, page_size=SIZE_2M),
        "tiny_private": await make(5, shared=False, page_size=PAGE_SIZE),
        "used_up_private": await make(6, shared=True, page_size=SIZE_2M),
        "limited": await make(9, shared=True, page_size=SIZE_2M, cgroup="/full"),
        "limited_private": await make(
            10, shared=False, page_size=SIZE_2M, cgroup="/full"
        ),
        "lost": await make(7, shared=True, page_size=PAGE_SIZE),
        "lost_private": await make(8, shared=False, page_size=PAGE_SIZE),
        "closed": await make(0, shared=True, page_size=SIZE_2M),
    }
    for name in ("lost", "lost_private"):
        await made[name].fallocate(KEEP, 0, 2 * PAGE_SIZE)
        await gmem.inject_memory_error(name=made[name].name, offset=0)
    made["second"] = await _of_lineage(
        host, gmem, "RFC_V2", page_size=SIZE_2M, support_shared=True
    )
    made["mainline"] = await _of_lineage(
        host, gmem, "MAINLINE", page_size=PAGE_SIZE, mmap=True, init_shared=True
    )
    made["in_place"] = await _of_lineage(host, gmem, "IN_PLACE", page_size=SIZE_2M)
    made["plain"] = await _of_lineage(
        host, gmem, "IN_PLACE", page_size=PAGE_SIZE, no_private_memory=True
    )
    for name, page in (("shared", 3), ("second", 0)):
        await _pin(gmem, made[name], page, "disk", pb.HOLD_KIND_PIN)
    for name in ("used_up", "used_up_private", "closed"):
        await _pin(gmem, made[name], 0, "somebody", pb.HOLD_KIND_PLAIN)
    for name in ("used_up", "used_up_private"):
        await made[name].fallocate(PUNCH, 0, SIZE_2M)
    await made["used_up_private"].convert(0, SIZE_2M, private=True)
    await gmem.delete_guest_memfd(name=made["closed"].name)
    return made


async def _of_lineage(
    host: Host, gmem: GuestMemfdClient, lineage: str, **options: Any
) -> Inode:
    made = await gmem.create_guest_memfd(size=SIZE_2M, lineage=lineage, **options)
    return Inode(host, gmem, made.name, SIZE_2M)


async def _pin(
    gmem: GuestMemfdClient,
    inode: Inode,
    page: int,
    holder: str,
    kind: pb.HoldKind.ValueType,
) -> None:
    await gmem.pin_pages(
        name=inode.name,
        offset=page * PAGE_SIZE,
        size=PAGE_SIZE,
        holder=holder,
        kind=kind,
    )


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
