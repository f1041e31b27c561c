"""The commands numastat and page-types: memory in the layouts of the known tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from gmem.api.host_allocator.v1.host_allocator_pb2 import (
    GetStatisticsResponse,
    NodeMemory,
    PageFlagCount,
)
from gmem.client import HostAllocatorClient
from gmem.ctl.state import HostState
from gmem.uapi.pages import PAGE_SIZE

_MIB: Final = 1 << 20
_NUMASTAT_TITLE: Final = "\nPer-node system memory usage (in MBs):\n"
_PAGE_TYPES_HEAD: Final = (
    "             flags\tpage-count       MB  symbolic-flags\t\t\tlong-symbolic-flags"
)

# tools/mm/page-types.c, page_flag_names: the letter of each bit, and its word.
_KPF_NAMES: Final = {
    0: "L:locked",
    1: "E:error",
    2: "R:referenced",
    3: "U:uptodate",
    4: "D:dirty",
    5: "l:lru",
    6: "A:active",
    7: "S:slab",
    8: "W:writeback",
    9: "I:reclaim",
    10: "B:buddy",
    11: "M:mmap",
    12: "a:anonymous",
    13: "s:swapcache",
    14: "b:swapbacked",
    15: "H:compound_head",
    16: "T:compound_tail",
    17: "G:huge",
    18: "u:unevictable",
    19: "X:hwpoison",
    20: "n:nopage",
    21: "x:ksm",
    22: "t:thp",
    23: "o:offline",
    24: "z:zero_page",
    25: "i:idle_page",
    26: "g:pgtable",
    32: "r:reserved",
    33: "m:mlocked",
    34: "d:mappedtodisk",
    35: "P:private",
    36: "p:private_2",
    37: "O:owner_private",
    38: "h:arch",
    39: "c:uncached",
    40: "f:softdirty",
}


async def page_flags(state: HostState) -> tuple[PageFlagCount, ...]:
    """Ask host_allocator for the counts of /proc/kpageflags. Raises TransportError."""
    target = state.service("host_allocator").target
    async with HostAllocatorClient(target, client="gmemctl") as allocator:
        return await allocator.get_page_flags()


def page_type_values(counts: Iterable[PageFlagCount]) -> list[dict[str, Any]]:
    """Return the counts as JSON values, each with the words of its flags."""
    return [
        {
            "flags": count.flags,
            "nr_pages": count.nr_pages,
            "words": long_symbolic(count.flags),
        }
        for count in counts
    ]


def numastat_rows(
    statistics: GetStatisticsResponse,
) -> list[tuple[str, list[float]]]:
    """Return the rows of numastat -m: a name, and MiB of each node and of all.

    HugePages_* are the bytes of the default size's pages, as numastat converts them.
    """
    size = statistics.meminfo.hugepagesize_kb << 10
    (pool,) = [pool for pool in statistics.pools if pool.page_size == size]
    nodes = statistics.nodes
    total = [_pages(node.managed_pages) for node in nodes]
    free = [_pages(node.free_base_pages) for node in nodes]
    used = [all_of_it - rest for all_of_it, rest in zip(total, free, strict=True)]
    rows = [("MemTotal", total), ("MemFree", free), ("MemUsed", used)]
    rows += [
        ("HugePages_Total", [p.nr_huge_pages * size / _MIB for p in pool.nodes]),
        ("HugePages_Free", [p.free_huge_pages * size / _MIB for p in pool.nodes]),
        ("HugePages_Surp", [p.surplus_huge_pages * size / _MIB for p in pool.nodes]),
    ]
    return [(name, [*values, sum(values)]) for name, values in rows]


def numastat_text(statistics: GetStatisticsResponse) -> str:
    """Return what numastat -m prints: columns of 15 characters behind the names."""
    heads = [*_node_names(statistics.nodes), "Total"]
    lines = [
        " " * 16 + "".join(f" {head:>15}" for head in heads),
        " " * 16 + "".join(f" {'-' * 15}" for _ in heads),
    ]
    for name, values in numastat_rows(statistics):
        lines.append(f"{name:<16}" + "".join(f" {value:15.2f}" for value in values))
    return _NUMASTAT_TITLE + "\n".join(lines) + "\n"


def page_types_text(counts: Sequence[PageFlagCount]) -> str:
    """Return what page-types prints without options."""
    lines = [_PAGE_TYPES_HEAD]
    lines += [
        f"0x{count.flags:016x}\t{count.nr_pages:10d} {_mib(count.nr_pages):8d}  "
        f"{symbolic(count.flags)}\t{','.join(long_symbolic(count.flags))}"
        for count in counts
    ]
    total = sum(count.nr_pages for count in counts)
    lines.append(f"             total\t{total:10d} {_mib(total):8d}")
    return "\n".join(lines) + "\n"


def symbolic(flags: int) -> str:
    """Return a flag word as page-types' row of letters, `_` for a bit that is 0."""
    return "".join(
        name[0] if flags >> bit & 1 else "_" for bit, name in _KPF_NAMES.items()
    )


def long_symbolic(flags: int) -> list[str]:
    """Return the words of the bits that are set."""
    return [name[2:] for bit, name in _KPF_NAMES.items() if flags >> bit & 1]


def _node_names(nodes: Iterable[NodeMemory]) -> list[str]:
    return [f"Node {node.node}" for node in nodes]


def _pages(nr_pages: int) -> float:
    return nr_pages * PAGE_SIZE / _MIB


def _mib(nr_pages: int) -> int:
    return nr_pages * PAGE_SIZE // _MIB
