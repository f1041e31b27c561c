"""The commands `cgroup ...`: HugeTLB cgroups, in the words of their files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Final, TypeVar

import typer

from gmem.api.host_allocator.v1.host_allocator_pb2 import Cgroup, CgroupCounters
from gmem.client import HostAllocatorClient
from gmem.client.host_allocator import NO_LIMIT
from gmem.ctl import options
from gmem.ctl.arguments import Host, Json, RunDir, state_of
from gmem.ctl.errors import EPILOG, ControlError
from gmem.ctl.output import console, print_json, print_table, reporting
from gmem.uapi.pages import format_size

cgroup_app = typer.Typer(help="HugeTLB cgroups.", no_args_is_help=True)

# What cgroup v1 shows where there is no limit: PAGE_COUNTER_MAX in bytes.
_V1_UNLIMITED: Final = (1 << 63) - 1

Name = Annotated[
    str, typer.Argument(help="Path of the cgroup, e.g. /tenant; / is all.")
]
T = TypeVar("T")


@cgroup_app.command("ls", epilog=EPILOG)
def cgroup_ls(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """List the cgroups: usage and reservations of each page size, with their limits."""
    with reporting(as_json):
        found = _ask(run_dir, host, lambda client: client.list_cgroups())
        if as_json:
            print_json({"cgroups": [cgroup_values(cgroup) for cgroup in found]})
        else:
            rows = [row for cgroup in found for row in _rows(cgroup)]
            columns = ("CGROUP", "SIZE", "CURRENT", "MAX", "RSVD", "RSVD_MAX", "EVENTS")
            print_table(columns, rows)


@cgroup_app.command("show", epilog=EPILOG)
def cgroup_show(
    name: Name, host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Show the files of a cgroup, by the names of cgroup v2 and of v1."""
    with reporting(as_json):
        cgroup = _ask(run_dir, host, lambda client: client.get_cgroup(name))
        if as_json:
            print_json(cgroup_values(cgroup))
        else:
            _print_files(cgroup)


@cgroup_app.command("create", epilog=EPILOG)
def cgroup_create(
    name: Name, host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Make a cgroup without limits; its parent must be there."""
    with reporting(as_json):
        cgroup = _ask(run_dir, host, lambda client: client.create_cgroup(name))
        if as_json:
            print_json(cgroup_values(cgroup))
        else:
            console().print(f"cgroup {cgroup.name} has no limits", markup=False)


@cgroup_app.command("set", epilog=EPILOG)
def cgroup_set(
    name: Name,
    limits: Annotated[
        list[str],
        typer.Argument(
            help="FILE=LIMIT: hugetlb.1GB.max=4G, hugetlb.2MB.rsvd.max=max."
        ),
    ],
    *,
    host: Host = "local",
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Write limits of a cgroup; `max` takes one away."""
    with reporting(as_json):
        changes = [parse_limit(text) for text in limits]
        written = [_ask(run_dir, host, _setting(name, *change)) for change in changes]
        cgroup = written[-1]
        if as_json:
            print_json(cgroup_values(cgroup))
        else:
            _print_files(cgroup)


@cgroup_app.command("delete", epilog=EPILOG)
def cgroup_delete(
    name: Name, host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Remove a cgroup; what it paid for, its parent pays for."""
    with reporting(as_json):
        _ask(run_dir, host, lambda client: client.delete_cgroup(name))
        if as_json:
            print_json({"name": name})
        else:
            console().print(f"cgroup {name} is gone", markup=False)


def parse_limit(text: str) -> tuple[int, bool, int]:
    """Read `hugetlb.2MB.rsvd.max=4G`: page size, whether rsvd, bytes or NO_LIMIT.

    The names of cgroup v1 are understood as well. Raises ControlError.
    """
    file, is_set, value = text.partition("=")
    parts = file.removeprefix("hugetlb.").split(".")
    rsvd = parts[1:-1] == ["rsvd"]
    known = parts[-1] in {"max", "limit_in_bytes"} and (rsvd or len(parts) == 2)
    if not is_set or not known or not parts[0].endswith("B"):
        raise ControlError(
            f"{text!r} is no limit: write hugetlb.1GB.max=4G, or "
            "hugetlb.2MB.rsvd.max=max for none"
        )
    page_size = options.parse_page_size(parts[0].removesuffix("B"))
    limit = NO_LIMIT if value in {"max", "-1"} else options.parse_size(value)
    return page_size, rsvd, limit


def files_of(counters: CgroupCounters) -> Iterator[tuple[str, int | str]]:
    """Yield the files of one page size: those of cgroup v2, then those of v1."""
    base = f"hugetlb.{format_size(counters.page_size)}B"
    limit, rsvd_limit = _limits(counters)
    yield f"{base}.current", counters.current
    yield f"{base}.max", "max" if limit is None else limit
    yield f"{base}.rsvd.current", counters.rsvd_current
    yield f"{base}.rsvd.max", "max" if rsvd_limit is None else rsvd_limit
    yield f"{base}.events", f"max {counters.events_max}"
    yield f"{base}.events.local", f"max {counters.events_local_max}"
    largest = _V1_UNLIMITED // counters.page_size * counters.page_size
    yield f"{base}.usage_in_bytes", counters.current
    yield f"{base}.limit_in_bytes", largest if limit is None else limit
    yield f"{base}.max_usage_in_bytes", counters.max_usage
    yield f"{base}.rsvd.usage_in_bytes", counters.rsvd_current
    yield f"{base}.rsvd.limit_in_bytes", largest if rsvd_limit is None else rsvd_limit
    yield f"{base}.rsvd.max_usage_in_bytes", counters.rsvd_max_usage


def cgroup_values(cgroup: Cgroup) -> dict[str, object]:
    """Return a cgroup as JSON values: its name, and every file."""
    files = {file: value for each in cgroup.counters for file, value in files_of(each)}
    return {"name": cgroup.name, "files": files}


def _print_files(cgroup: Cgroup) -> None:
    for counters in cgroup.counters:
        for file, value in files_of(counters):
            console().print(f"{file} {value}", markup=False, highlight=False)


def _rows(cgroup: Cgroup) -> Iterator[tuple[object, ...]]:
    for counters in cgroup.counters:
        limit, rsvd_limit = _limits(counters)
        yield (
            cgroup.name,
            f"{format_size(counters.page_size)}B",
            _size(counters.current),
            _size(limit),
            _size(counters.rsvd_current),
            _size(rsvd_limit),
            counters.events_max,
        )


def _limits(counters: CgroupCounters) -> tuple[int | None, int | None]:
    return (
        counters.max if counters.HasField("max") else None,
        counters.rsvd_max if counters.HasField("rsvd_max") else None,
    )


def _size(size: int | None) -> str:
    if size is None:
        return "max"
    return format_size(size) if size else "0"


def _setting(
    name: str, page_size: int, rsvd: bool, limit: int
) -> Callable[[HostAllocatorClient], Awaitable[Cgroup]]:
    if rsvd:
        return lambda c: c.update_cgroup(name, page_size=page_size, rsvd_max=limit)
    return lambda c: c.update_cgroup(name, page_size=page_size, max=limit)


def _ask(
    run_dir: RunDir, host: str, call: Callable[[HostAllocatorClient], Awaitable[T]]
) -> T:
    async def ask() -> T:
        target = state_of(run_dir, host).service("host_allocator").target
        async with HostAllocatorClient(target, client="gmemctl") as client:
            return await call(client)

    return asyncio.run(ask())
