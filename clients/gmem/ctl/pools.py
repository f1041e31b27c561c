"""The commands `pool ...`: look at the pools of huge pages, and change them.

Sizes are written as hugeadm writes them: `1G:8` sets, `1G:+4` and `1G:-2` change; with
`@NODE` the pages of one node alone. A change is read and written back, as hugeadm does
it: two at the same moment may lose one.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import typer

from gmem.api.host_allocator.v1.host_allocator_pb2 import (
    DemotePoolResponse,
    GetStatisticsResponse,
    Pool,
    UpdatePoolResponse,
)
from gmem.client import HostAllocatorClient
from gmem.ctl import options
from gmem.ctl.arguments import Host, Json, RunDir, state_of
from gmem.ctl.errors import EPILOG, ControlError, ExitStatus
from gmem.ctl.inspection import message_values
from gmem.ctl.output import print_json, reporting
from gmem.ctl.state import HostState
from gmem.uapi.pages import SIZE_1G, SIZE_2M, format_size

pool_app = typer.Typer(help="Pools of huge pages.", no_args_is_help=True)

_CHANGE: Final = re.compile(r"([^:@]+):([+-]?)([0-9]{1,9})(?:@([0-9]{1,3}))?")
_FORMAT: Final = "{:>10} {:>8} {:>8} {:>8} {:>8}"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolChange:
    """`1G:8`, `1G:+4` or `2M:-2@1`: set to, or changed by, a number of pages."""

    page_size: int
    sign: str
    nr_pages: int
    node: int | None = None

    def applied_to(self, now: int) -> int:
        """Return the number that `now` becomes; never less than 0, as in hugeadm."""
        match self.sign:
            case "+":
                return now + self.nr_pages
            case "-":
                return max(0, now - self.nr_pages)
            case _:
                return self.nr_pages


def parse_change(text: str) -> PoolChange:
    """Read `SIZE:[+|-]PAGES[@NODE]`. Raises ControlError."""
    match = _CHANGE.fullmatch(text.strip())
    if match is None:
        raise ControlError(
            f"{text!r} is no size of a pool: write 1G:8, 1G:+4 or 1G:-2, and @NODE "
            "for the pages of one node"
        )
    node = None if match[4] is None else int(match[4])
    return PoolChange(options.parse_page_size(match[1]), match[2], int(match[3]), node)


@pool_app.command("list", epilog=EPILOG)
def pool_list(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """List the pools as hugeadm --pool-list does: counts of pages, * for the default.

    Minimum is what the pool was set to, Current adds surplus pages, Maximum is Minimum
    and the surplus that overcommit allows.
    """
    with reporting(as_json):
        statistics = _ask(state_of(run_dir, host), lambda c: c.get_statistics())
        if as_json:
            default = statistics.meminfo.hugepagesize_kb << 10
            print_json(
                {"pools": [pool_values(pool, default) for pool in statistics.pools]}
            )
        else:
            sys.stdout.write(pool_list_text(statistics))


@pool_app.command("resize", epilog=EPILOG)
def pool_resize(
    change: Annotated[
        str, typer.Argument(help="SIZE:PAGES, SIZE:+PAGES or SIZE:-PAGES, and @NODE.")
    ],
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Say what would happen.")
    ] = False,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Set a pool's pages (nr_hugepages); status 1 where some could not be had."""
    with reporting(as_json):
        wanted = parse_change(change)

        async def resize(allocator: HostAllocatorClient) -> UpdatePoolResponse:
            pool = await _pool(allocator, wanted.page_size)
            return await allocator.update_pool(
                page_size=wanted.page_size,
                nr_huge_pages=wanted.applied_to(persistent_pages(pool, wanted.node)),
                node=wanted.node,
                validate_only=validate_only,
            )

        response = _ask(state_of(run_dir, host), resize)
        _report(response, [response.pool], as_json=as_json)


@pool_app.command("overcommit", epilog=EPILOG)
def pool_overcommit(
    change: Annotated[
        str, typer.Argument(help="SIZE:PAGES, SIZE:+PAGES or SIZE:-PAGES.")
    ],
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Set how many surplus pages there may be (nr_overcommit_hugepages)."""
    with reporting(as_json):
        wanted = parse_change(change)

        async def overcommit(allocator: HostAllocatorClient) -> UpdatePoolResponse:
            pool = await _pool(allocator, wanted.page_size)
            nr_pages = wanted.applied_to(pool.nr_overcommit_huge_pages)
            return await allocator.update_pool(
                page_size=wanted.page_size,
                node=wanted.node,
                nr_overcommit_huge_pages=nr_pages,
            )

        response = _ask(state_of(run_dir, host), overcommit)
        _report(response, [response.pool], as_json=as_json)


@pool_app.command("demote", epilog=EPILOG)
def pool_demote(
    pages: Annotated[str, typer.Argument(help="1G:PAGES, and @NODE.")],
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Say what would happen.")
    ] = False,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Make free 1G pages into 2M pages; status 1 where some could not be."""
    with reporting(as_json):
        wanted = parse_change(pages)
        if wanted.sign:
            raise ControlError(f"{pages!r} has a sign: write how many to demote, 1G:2")
        response = _ask(
            state_of(run_dir, host),
            lambda allocator: allocator.demote_pool(
                page_size=wanted.page_size,
                nr_pages=wanted.nr_pages,
                node=wanted.node,
                validate_only=validate_only,
            ),
        )
        _report(response, [response.target, response.source], as_json=as_json)


def pool_values(pool: Pool, default_page_size: int) -> dict[str, Any]:
    """Return a pool as JSON values: sysfs' names, and hugeadm's columns."""
    return message_values(pool) | {
        "minimum": persistent_pages(pool),
        "current": pool.nr_huge_pages,
        "maximum": persistent_pages(pool) + pool.nr_overcommit_huge_pages,
        "default": pool.page_size == default_page_size,
    }


def pool_list_text(statistics: GetStatisticsResponse) -> str:
    """Return what hugeadm --pool-list prints."""
    lines = [_FORMAT.format("Size", "Minimum", "Current", "Maximum", "Default")]
    default = statistics.meminfo.hugepagesize_kb << 10
    for pool in statistics.pools:
        values = pool_values(pool, default)
        star = "*" if values["default"] else ""
        columns = [values[key] for key in ("minimum", "current", "maximum")]
        lines.append(_FORMAT.format(pool.page_size, *columns, star))
    return "\n".join(lines) + "\n"


def persistent_pages(pool: Pool, node: int | None = None) -> int:
    """Return what a pool, or its part on a node, was set to: all but surplus."""
    if node is None:
        return pool.nr_huge_pages - pool.surplus_huge_pages
    return sum(
        part.nr_huge_pages - part.surplus_huge_pages
        for part in pool.nodes
        if part.node == node
    )


def _ask(
    state: HostState, question: Callable[[HostAllocatorClient], Awaitable[T]]
) -> T:
    async def ask() -> T:
        target = state.service("host_allocator").target
        async with HostAllocatorClient(target, client="gmemctl") as allocator:
            return await question(allocator)

    return asyncio.run(ask())


async def _pool(allocator: HostAllocatorClient, page_size: int) -> Pool:
    pools = {pool.page_size: pool for pool in await allocator.list_pools()}
    assert {SIZE_2M, SIZE_1G} <= pools.keys(), pools
    return pools[page_size]


def _report(
    response: UpdatePoolResponse | DemotePoolResponse,
    pools: Iterable[Pool],
    *,
    as_json: bool,
) -> None:
    """Print what a change did; end with REFUSED where it did not do all of it."""
    if as_json:
        print_json(message_values(response))
    else:
        for pool in pools:
            sys.stdout.write(
                f"{format_size(pool.page_size)}: {pool.nr_huge_pages} pages, "
                f"{pool.free_huge_pages} free, {pool.resv_huge_pages} reserved, "
                f"{pool.surplus_huge_pages} surplus, "
                f"overcommit {pool.nr_overcommit_huge_pages}\n"
            )
    if response.missing_pages:
        if not as_json:
            sys.stderr.write(
                f"gmemctl: {response.missing_pages} pages could not be done: they are "
                "in use or reserved, or base memory is short; see gmemctl numastat\n"
            )
        raise typer.Exit(int(ExitStatus.REFUSED))
