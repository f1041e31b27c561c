"""What of a host's memory must survive, as rows: incrementally out, and back in.

    host                                 frames of each node, the default page size
    handles                              the next handle
    node/I, vmemmap, pool/SIZE           every number that they have
    subpool/SIZE/HANDLE, claim/HANDLE    the fields of a claim
    cgroup/PATH                          limits and counters of a cgroup
    live/SIZE/PFN                        node, handle and state of a huge folio in use
    hwpoison/SIZE/PFN                    a memory error: in how many pages from PFN on
    runs/PLACE/.../START                 where a run of frames ends

Numbers and claims are compared with what was told last; runs and folios in use, of
which there may be millions, are told by what was touched. Attributes are found by
their type, so one that is added to a pool or a node is kept without a line here.
Free frames hold whatever their last owner left in all cases, which is why no row says
needs_zero: who is given a frame clears it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from gmem.host_allocator.core.base import BaseClaim
from gmem.host_allocator.core.extents import Extents
from gmem.host_allocator.core.folio import FolioState, LiveFolio
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.subpool import Subpool
from gmem.host_allocator.core.values import Folio
from gmem.uapi.pages import PAGE_SIZE, NodeId, Pfn, PgRange

Changes: TypeAlias = dict[str, Any]


class HostRows:
    """Tells what of `memory` has changed since it told last; at first, everything."""

    def __init__(self, memory: HostMemory, *, restored: bool = False) -> None:
        """Follow `memory`, which is new, or was `restored` from all of its rows."""
        self._memory = memory
        self._told: Changes = {}
        if restored:
            # Restoring touched every run and told nothing new.
            self.changes()

    def changes(self) -> Changes:
        """Return the rows that have changed, None for those that are gone."""
        memory = self._memory
        now: Changes = {"host": _shape(memory), "handles": memory.handles.next}
        now |= {path: _numbers(thing) for path, thing in _things(memory)}
        for path, claim in _claims(memory):
            now[path] = _fields(claim)
        for cgroup in memory.cgroups:
            now[f"cgroup{cgroup.name}".rstrip("/")] = cgroup.row()
        for size, poisoned in _hwpoison(memory):
            now |= {f"hwpoison/{size}/{pfn}": nr for pfn, nr in poisoned.items()}
        changed = {k: row for k, row in now.items() if self._told.get(k) != row}
        gone = self._told.keys() - now.keys()
        self._told = now
        rows: Changes = dict.fromkeys(sorted(gone))
        rows |= {f"runs/{key}/": None for key in sorted(gone)}
        return rows | changed | self._frames()

    def _frames(self) -> Changes:
        memory = self._memory
        rows: Changes = {}
        for path, extents in _extents(memory):
            for start, stop in extents.drain().items():
                rows[f"runs/{path}/{start}"] = stop
        for size, pfn in memory.drain_touched():
            rows[f"live/{size}/{pfn}"] = _live_row(memory, size, pfn)
        return rows


def fits(rows: Mapping[str, Any], nodes_pages: list[int]) -> bool:
    """Tell whether rows are those of a host whose nodes have so many pages."""
    return bool(rows["host"]["nodes_pages"] == nodes_pages)


def restore(rows: Mapping[str, Any]) -> HostMemory:
    """Make the host whose changes, one after the other, left `rows`; checks all of it.

    AssertionError where they are no host: every frame must be somewhere once.
    """
    host = rows["host"]
    memory = HostMemory(
        host["nodes_pages"],
        default_page_size=host["default_page_size"],
        first_handle=rows["handles"],
    )
    for key, row in rows.items():
        _restore_claim(memory, key.split("/"), row)
    for path, thing in _things(memory):
        vars(thing).update(rows[path])
    runs = _runs_by_path(rows)
    for path, extents in _extents(memory):
        extents.reset(runs.get(path, ()))
    memory.check_frames()
    return memory


def _restore_claim(memory: HostMemory, path: list[str], row: Any) -> None:  # noqa: ANN401 - JSON
    match path:
        case ["subpool", size, _]:
            row = row | {"allowed": tuple(map(NodeId, row["allowed"]))}
            memory.hugetlb[int(size)].subpools[row["handle"]] = Subpool(**row)
        case ["claim", _]:
            row = row | {"allowed": tuple(map(NodeId, row["allowed"]))}
            frames = tuple(Extents() for _ in memory.nodes)
            claim = BaseClaim(**row, frames=frames)
            memory.base.claims[claim.handle] = claim
        case ["live", size, pfn]:
            node, handle, state = row
            hugetlb = memory.hugetlb[int(size)]
            folio = Folio(Pfn(int(pfn)), hugetlb.hstate.order, NodeId(node))
            hugetlb.live[folio.pfn] = LiveFolio(folio, handle, FolioState(state))
        case ["cgroup", *_]:
            memory.cgroups.restore(row)
        case ["hwpoison", size, pfn]:
            dict(_hwpoison(memory))[int(size)][int(pfn)] = row
        case _:
            pass


def _runs_by_path(rows: Mapping[str, Any]) -> dict[str, list[PgRange]]:
    runs: dict[str, list[PgRange]] = {}
    for key, stop in rows.items():
        if key.startswith("runs/"):
            path, _, start = key.removeprefix("runs/").rpartition("/")
            runs.setdefault(path, []).append(PgRange(int(start), stop))
    return {path: sorted(found) for path, found in runs.items()}


def _shape(memory: HostMemory) -> Changes:
    return {
        "nodes_pages": [len(node.frames) for node in memory.nodes],
        "default_page_size": memory.default_hstate.page_size,
    }


def _things(memory: HostMemory) -> Iterator[tuple[str, object]]:
    """Yield what has numbers and runs, claims left out."""
    yield "vmemmap", memory.vmemmap
    for node in memory.nodes:
        yield f"node/{node.node}", node
    for size, hugetlb in memory.hugetlb.items():
        yield f"pool/{size}", hugetlb.hstate


def _claims(memory: HostMemory) -> Iterator[tuple[str, Subpool | BaseClaim]]:
    for handle, claim in memory.base.claims.items():
        yield f"claim/{handle}", claim
    for size, hugetlb in memory.hugetlb.items():
        for handle, subpool in hugetlb.subpools.items():
            yield f"subpool/{size}/{handle}", subpool


def _hwpoison(memory: HostMemory) -> Iterator[tuple[int, dict[int, int]]]:
    yield PAGE_SIZE, memory.base.hwpoison
    for size, hugetlb in memory.hugetlb.items():
        yield size, hugetlb.hwpoison


def _live_row(memory: HostMemory, size: int, pfn: int) -> list[Any] | None:
    live = memory.hugetlb[size].live.get(pfn)
    return None if live is None else [live.folio.node, live.handle, live.state.value]


def _extents(memory: HostMemory) -> Iterator[tuple[str, Extents]]:
    for path, thing in _things(memory):
        for name, value in vars(thing).items():
            yield from _extents_in(f"{path}/{name}", value)
    for handle, claim in memory.base.claims.items():
        yield from _extents_in(f"claim/{handle}/frames", claim.frames)


def _extents_in(path: str, value: object) -> Iterator[tuple[str, Extents]]:
    """Yield an attribute's runs: of an Extents, or of a list or dict of them."""
    if isinstance(value, Extents):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _extents_in(f"{path}/{key}", each)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _extents_in(f"{path}/{number}", each)


def _numbers(thing: object) -> Changes:
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(thing).items()
        if _is_number(value)
        or (isinstance(value, list) and value and all(map(_is_number, value)))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _fields(claim: Subpool | BaseClaim) -> Changes:
    values = {field.name: getattr(claim, field.name) for field in fields(claim)}
    values.pop("frames", None)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
