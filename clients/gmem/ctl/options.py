"""What people write on the command line: sizes, pools, host names."""

from __future__ import annotations

import pwd
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gmem.ctl.errors import ControlError
from gmem.runtime import config
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.pages import HUGE_PAGE_SIZES, PAGE_SIZE, U64_LIMIT, format_size

HOST_NAME_MAX = 32
NODES_MAX = 64
VMMS_MAX = 16
SIZE_LIMIT = U64_LIMIT
DEFAULT_POOLS = ("1G:8", "2M:512")

_POOL = re.compile(r"([^:@]+):([^:@]+)(?:@([^:@]+))?")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class PoolOption:
    """`--pool 1G:6@0`: pages of one size that a node has at boot.

    `node` None spreads them over all nodes, as hugepages= on a kernel command line.
    """

    page_size: int
    nr_pages: int
    node: int | None = None

    def __str__(self) -> str:
        """Write it as it is given on the command line."""
        at = "" if self.node is None else f"@{self.node}"
        return f"{format_size(self.page_size)}:{self.nr_pages}{at}"


def parse_size(text: str) -> int:
    """Return the bytes of `16G`, `512M`, `4096`. Raises ControlError."""
    try:
        size = config.parse_size(text)
    except ValueError as error:
        raise ControlError(
            f"{text!r} is no size: write 16G, 512M, 4K or bytes"
        ) from error
    if size >= SIZE_LIMIT:
        raise ControlError(f"{text!r} is too large: stay below 16 EiB")
    return size


def parse_place(text: str) -> int:
    """Return the bytes of an offset or a size, hexadecimal too. Raises ControlError."""
    if text.lower().startswith("0x"):
        try:
            return parse_size(str(int(text, 16)))
        except ValueError as error:
            raise ControlError(f"{text!r} is no number: write 0x1000 or 4K") from error
    return parse_size(text)


def parse_page_size(text: str) -> int:
    """Return the bytes of a huge page size. Raises ControlError."""
    page_size = parse_size(text)
    if page_size not in HUGE_PAGE_SIZES:
        offered = " and ".join(format_size(size) for size in HUGE_PAGE_SIZES)
        raise ControlError(f"pages of {text} have no pool: there are {offered}")
    return page_size


def parse_memory(text: str) -> int:
    """Return the bytes of a node's memory: positive, a multiple of 4K."""
    size = parse_size(text)
    if size <= 0 or size % PAGE_SIZE:
        raise ControlError(f"memory of {text} is no positive multiple of 4K: round it")
    return size


def parse_pool(text: str) -> PoolOption:
    """Read `SIZE:PAGES` or `SIZE:PAGES@NODE`. Raises ControlError."""
    match = _POOL.fullmatch(text.strip())
    if match is None:
        raise ControlError(
            f"{text!r} is no pool: write 1G:6@0, or 2M:512 for all nodes"
        )
    page_size = parse_page_size(match[1])
    node = None if match[3] is None else _number(match[3], "node", text)
    return PoolOption(page_size, _number(match[2], "number of pages", text), node)


def parse_host(text: str) -> str:
    """Check a host's name: it is part of paths and of resource names."""
    if len(text) > HOST_NAME_MAX or _HOST.fullmatch(text) is None:
        raise ControlError(
            f"{text!r} is no host name: use a-z, 0-9 and inner '-', "
            f"at most {HOST_NAME_MAX} characters"
        )
    return text


def _number(text: str, what: str, whole: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ControlError(f"{text!r} in {whole!r} is no {what}: write 0 or more")
    return int(text)


def host_shape(
    nr_nodes: int,
    memory_per_node: int,
    pools: Sequence[PoolOption],
    default_page_size: int,
    *,
    in_place_conversion: bool = True,
) -> HostShape:
    """Put nodes and pools together. Raises ControlError where they do not fit."""
    huge_pages: list[dict[int, int]] = [{} for _ in range(nr_nodes)]
    for pool in pools:
        for node, nr_pages in _spread(pool, nr_nodes).items():
            pages = huge_pages[node]
            pages[pool.page_size] = pages.get(pool.page_size, 0) + nr_pages
    for node, pages in enumerate(huge_pages):
        pooled = sum(size * nr_pages for size, nr_pages in pages.items())
        if pooled > memory_per_node:
            raise ControlError(
                f"pools of {format_size(pooled)} do not fit the "
                f"{format_size(memory_per_node)} of node {node}: "
                "ask for fewer pages, or give more --memory"
            )
    nodes = tuple(
        NodeShape(memory_size=memory_per_node, huge_pages=pages) for pages in huge_pages
    )
    return HostShape(
        nodes=nodes,
        default_hugepagesize=default_page_size,
        gmem_in_place_conversion=in_place_conversion,
    )


def _spread(pool: PoolOption, nr_nodes: int) -> dict[int, int]:
    """Return the pages of each node; without a node round-robin, as at boot."""
    if pool.node is None:
        whole, rest = divmod(pool.nr_pages, nr_nodes)
        return {node: whole + (node < rest) for node in range(nr_nodes)}
    if pool.node >= nr_nodes:
        raise ControlError(
            f"pool {pool} names node {pool.node}, and the nodes are 0 to "
            f"{nr_nodes - 1}: name one of them, or give more --nodes"
        )
    return {pool.node: pool.nr_pages}


def parse_user(text: str) -> tuple[int, int]:
    """Return uid and main gid of a user, by name or number. Raises ControlError."""
    try:
        found = pwd.getpwuid(int(text)) if text.isdigit() else pwd.getpwnam(text)
    except KeyError as error:
        raise ControlError(f"--user {text}: this machine has no such user") from error
    return found.pw_uid, found.pw_gid
