"""Between the wire's messages and the core's values, one function per message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.types.v1 import types_pb2
from gmem.host_allocator.core.cgroups import Cgroup
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import (
    BootPool,
    Folio,
    FolioRun,
    HostStatistics,
    MemPolicy,
    MemPolicyMode,
    PoisonedFrame,
    PoolDemotion,
    PoolStatistics,
    ReservationStatistics,
)
from gmem.runtime.config import HostShape
from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.pages import PAGE_SIZE, NodeId, Pfn

_MODES = {
    # proto3's absent value: no policy was given.
    types_pb2.MemPolicy.MODE_UNSPECIFIED: MemPolicyMode.DEFAULT,
    types_pb2.MemPolicy.MODE_DEFAULT: MemPolicyMode.DEFAULT,
    types_pb2.MemPolicy.MODE_BIND: MemPolicyMode.BIND,
    types_pb2.MemPolicy.MODE_PREFERRED: MemPolicyMode.PREFERRED,
    types_pb2.MemPolicy.MODE_INTERLEAVE: MemPolicyMode.INTERLEAVE,
}


def host_memory(shape: HostShape, *, first_handle: int) -> HostMemory:
    """Boot the memory of a host of `shape`.

    KernelError where it cannot be: no memory, or an overcommit of 1G pages.
    """
    return HostMemory(
        [node.memory_size // PAGE_SIZE for node in shape.nodes],
        [
            BootPool(page_size, number, node=i)
            for i, node in enumerate(shape.nodes)
            for page_size, number in node.huge_pages.items()
        ],
        nr_overcommit=shape.nr_overcommit_hugepages,
        default_page_size=shape.default_hugepagesize,
        optimize_vmemmap=shape.optimize_vmemmap,
        first_handle=first_handle,
    )


def node_from_wire(
    request: pb.ReserveRequest | pb.UpdatePoolRequest | pb.DemotePoolRequest,
) -> int | None:
    """Return the node of a request, None where it has none."""
    return request.node if request.HasField("node") else None


def folio_from_wire(folio: types_pb2.Folio) -> Folio:
    """Return the folio that a message names."""
    return Folio(Pfn(folio.pfn), folio.order, NodeId(folio.node))


def folios_from_wire(folios: Iterable[types_pb2.Folio]) -> list[Folio]:
    """Return the folios that messages name."""
    return [folio_from_wire(folio) for folio in folios]


def folio_to_wire(folio: Folio) -> types_pb2.Folio:
    """Return the message that names a folio."""
    return types_pb2.Folio(pfn=folio.pfn, order=folio.order, node=folio.node)


def mempolicy_from_wire(mempolicy: types_pb2.MemPolicy) -> MemPolicy:
    """Return the policy of a message; MEMPOLICY_INVALID for a mode that is none."""
    mode = _MODES.get(mempolicy.mode)
    if mode is None:
        raise BadRequest(
            Reason.MEMPOLICY_INVALID,
            f"mode {mempolicy.mode} is no policy: use default, bind, "
            "preferred or interleave",
            mode=int(mempolicy.mode),
        )
    return MemPolicy(mode, tuple(mempolicy.nodes))


def pool_to_wire(host: str, pool: PoolStatistics) -> pb.Pool:
    """Return the message of one pool of `host`."""
    return pb.Pool(name=pool_name(host, pool.page_size), **asdict(pool))


def pool_sizes_from_wire(
    request: pb.UpdatePoolRequest,
) -> tuple[int | None, int | None]:
    """Return nr_huge_pages and nr_overcommit_huge_pages, None where absent."""
    overcommit = request.nr_overcommit_huge_pages
    return (
        request.nr_huge_pages if request.HasField("nr_huge_pages") else None,
        overcommit if request.HasField("nr_overcommit_huge_pages") else None,
    )


def demotion_to_wire(host: str, demotion: PoolDemotion) -> pb.DemotePoolResponse:
    """Return the message of what a demotion did."""
    return pb.DemotePoolResponse(
        source=pool_to_wire(host, demotion.source),
        target=pool_to_wire(host, demotion.target),
        demoted_pages=demotion.demoted_pages,
        target_pages=demotion.target_pages,
        missing_pages=demotion.missing_pages,
    )


def statistics_to_wire(
    host: str, statistics: HostStatistics
) -> pb.GetStatisticsResponse:
    """Return the message of all counters of `host`."""
    return pb.GetStatisticsResponse(
        nodes=[pb.NodeMemory(**asdict(node)) for node in statistics.nodes],
        pools=[pool_to_wire(host, pool) for pool in statistics.pools],
        vmemmap=pb.Vmemmap(**asdict(statistics.vmemmap)),
        meminfo=pb.Meminfo(**asdict(statistics.meminfo)),
    )


def folio_run_to_wire(run: FolioRun) -> pb.FolioRun:
    """Return the message of neighbouring folios."""
    first = folio_to_wire(run.first)
    return pb.FolioRun(first=first, nr_folios=run.nr_folios, split=run.split)


def cgroup_to_wire(cgroup: Cgroup) -> pb.Cgroup:
    """Return the message of a cgroup: pages become bytes."""
    counters = [
        pb.CgroupCounters(
            page_size=size,
            current=each.usage.usage * size,
            max=_bytes(each.usage.max, size),
            max_usage=each.usage.watermark * size,
            rsvd_current=each.rsvd.usage * size,
            rsvd_max=_bytes(each.rsvd.max, size),
            rsvd_max_usage=each.rsvd.watermark * size,
            events_max=each.events,
            events_local_max=each.events_local,
        )
        for size, each in cgroup.sizes.items()
    ]
    return pb.Cgroup(name=cgroup.name, counters=counters)


def limits_from_wire(request: pb.UpdateCgroupRequest) -> list[tuple[bool, int | None]]:
    """Return what is to be set: whether rsvd, and bytes or None for no limit."""
    limits: list[tuple[bool, int | None]] = []
    for rsvd, word in ((False, "max"), (True, "rsvd_max")):
        limit: pb.CgroupLimit = getattr(request, word)
        if limit.WhichOneof("kind") == "bytes":
            limits.append((rsvd, limit.bytes))
        elif limit.unlimited:
            limits.append((rsvd, None))
    if not limits:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            "neither max nor rsvd_max is given: set one, to bytes or unlimited",
        )
    return limits


def _bytes(pages: int | None, page_size: int) -> int | None:
    return None if pages is None else pages * page_size


def poisoned_to_wire(frame: PoisonedFrame) -> pb.PoisonedFrame:
    """Return the message of a memory error."""
    return pb.PoisonedFrame(**asdict(frame))


def reservation_to_wire(claim: ReservationStatistics) -> pb.Reservation:
    """Return the message of one reservation."""
    return pb.Reservation(**asdict(claim))


def pool_name(host: str, page_size: int) -> str:
    """Return the resource name of a pool."""
    return f"hosts/{host}/pools/{page_size}"


def reservation_name(host: str, handle: int) -> str:
    """Return the resource name of a reservation."""
    return f"hosts/{host}/reservations/{handle}"


def frame_name(host: str, pfn: int) -> str:
    """Return the resource name of a frame."""
    return f"hosts/{host}/frames/{pfn:#x}"
