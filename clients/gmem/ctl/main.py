"""gmemctl: start an emulated host, look at it, see one conversion, end it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gmem.ctl import inspection, lifecycle, memory_errors, options, reports
from gmem.ctl.arguments import (
    ChosenBackend,
    Host,
    InPlaceConversion,
    Json,
    Pools,
    Repair,
    RunDir,
    Spare,
    directory_of,
    state_of,
)
from gmem.ctl.cgroups import cgroup_app
from gmem.ctl.directories import base_directory
from gmem.ctl.elsewhere import host_elsewhere
from gmem.ctl.errors import EPILOG, ExitStatus
from gmem.ctl.inodes import inode_app
from gmem.ctl.launcher import Plan
from gmem.ctl.output import console, print_json, reporting
from gmem.ctl.pools import pool_app
from gmem.ctl.vms import vm_app
from gmem.uapi.lineage import Lineage

DISTRIBUTION = "gmem-emulator"

app = typer.Typer(
    name="gmemctl",
    help="Emulated hosts whose VMs get memory from guest_memfd with 1G pages.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
memory_errors.add_to(inode_app)
app.add_typer(inode_app, name="inode")
app.add_typer(memory_errors.frame_app, name="frame")
app.add_typer(pool_app, name="pool")
app.add_typer(cgroup_app, name="cgroup")
app.add_typer(vm_app, name="vm")


@app.command(epilog=EPILOG)
def up(
    *,
    host: Host = "local",
    nodes: Annotated[
        int, typer.Option(min=1, max=options.NODES_MAX, help="NUMA nodes.")
    ] = 2,
    memory: Annotated[str, typer.Option(help="Memory of each node, e.g. 16G.")] = "16G",
    pool: Pools = None,
    default_hugepagesz: Annotated[
        str, typer.Option(help="The size that HugePages_* of meminfo speak of.")
    ] = "2M",
    gmem_in_place_conversion: InPlaceConversion = True,
    vmms: Annotated[
        int, typer.Option(min=1, max=options.VMMS_MAX, help="VMM processes.")
    ] = 1,
    user: Annotated[
        str | None,
        typer.Option(
            help="Run all services but the keeper as this user, name or uid. "
            "Default: as yourself."
        ),
    ] = None,
    backend: ChosenBackend = None,
    spare: Spare = True,
    repair: Repair = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Start a host: its services as processes of this machine."""
    with reporting(as_json):
        directory = directory_of(run_dir, host)
        if repair:
            lifecycle.repair(directory, as_json=as_json)
            return
        shape = options.host_shape(
            nodes,
            options.parse_memory(memory),
            [options.parse_pool(text) for text in pool or options.DEFAULT_POOLS],
            options.parse_page_size(default_hugepagesz),
            in_place_conversion=gmem_in_place_conversion,
        )
        who = None if user is None else options.parse_user(user)
        plan = Plan(directory, shape, vmms, user=who, spare=spare, backend=backend)
        lifecycle.up(plan, as_json=as_json)


@app.command(epilog=EPILOG)
def status(
    host: Annotated[
        str | None, typer.Option("--host", help="One host; default: all of them.")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until all answer.")
    ] = 0,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show the services of the hosts, and whether each answers."""
    with reporting(as_json):
        base = base_directory(run_dir, os.environ)
        if host is not None:
            options.parse_host(host)
        answers = lifecycle.status(base, host, wait_seconds=wait, as_json=as_json)
    raise typer.Exit(int(ExitStatus.DONE if answers else ExitStatus.UNREACHABLE))


@app.command(epilog=EPILOG)
def down(
    host: Host = "local",
    force: Annotated[
        bool, typer.Option("--force", help="Kill, after a crash; only its own.")
    ] = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """End a host; leave no process, socket or file of it behind."""
    with reporting(as_json):
        lifecycle.down(directory_of(run_dir, host), force=force, as_json=as_json)


@app.command(epilog=EPILOG)
def meminfo(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Print /proc/meminfo of the emulated host."""
    with reporting(as_json):
        state = state_of(run_dir, host)
        statistics = asyncio.run(inspection.statistics(state))
        if as_json:
            print_json(inspection.message_values(statistics))
        else:
            sys.stdout.write(inspection.meminfo_text(statistics.meminfo))


@app.command(epilog=EPILOG)
def numastat(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Print memory per node as numastat -m does, in MBs."""
    with reporting(as_json):
        statistics = asyncio.run(inspection.statistics(state_of(run_dir, host)))
        if as_json:
            rows = dict(reports.numastat_rows(statistics))
            print_json({"unit": "MiB", "columns": "nodes, then total", "rows": rows})
        else:
            sys.stdout.write(reports.numastat_text(statistics))


@app.command("page-types", epilog=EPILOG)
def page_types(
    host: Host = "local", run_dir: RunDir = None, as_json: Json = False
) -> None:
    """Count the frames of a host by their flags, as the kernel's page-types does."""
    with reporting(as_json):
        counts = asyncio.run(reports.page_flags(state_of(run_dir, host)))
        if as_json:
            print_json({"types": reports.page_type_values(counts)})
        else:
            sys.stdout.write(reports.page_types_text(counts))


@app.command(epilog=EPILOG)
def demo(
    payload: Annotated[
        Path | None,
        typer.Option(help="What the guest is given; default: this Python's ELF file."),
    ] = None,
    lineage: Annotated[
        Lineage, typer.Option(help="The kernel series whose behaviour it shows.")
    ] = Lineage.RFC_V1,
    backend: ChosenBackend = None,
    host: Host = "demo",
    programs: Annotated[
        Path | None,
        typer.Option(
            help="Directory with the sockets of programs in containers; for the host "
            "that GMEM_TARGETS describes."
        ),
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Watch a VM with 1G pages from boot to teardown, in real processes."""
    # An eighth of what gmemctl loads, and no other command needs it.
    from gmem.ctl.demo import command as demo_command  # noqa: PLC0415

    with reporting(as_json):
        ended = demo_command.run(
            directory_of(run_dir, host),
            payload,
            as_json=as_json,
            lineage=lineage,
            backend=backend,
            elsewhere=host_elsewhere(os.environ),
            programs=programs,
        )
    raise typer.Exit(int(ended))


@app.command(epilog=EPILOG)
def conformance(
    lineage: Annotated[
        str | None,
        typer.Option(help="One kernel series; default: all that the backend plays."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="Who is asked: emulator, or kernel for this machine's."),
    ] = "emulator",
    number: Annotated[
        list[str] | None,
        typer.Option("--id", help="One line of the list, e.g. C087; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a kernel what docs/semantics.md says, line by line."""
    # Nothing else of gmemctl needs the cases.
    from gmem.ctl import conformance as command  # noqa: PLC0415

    with reporting(as_json):
        ended = command.run(lineage, backend, number or [], as_json=as_json)
    raise typer.Exit(int(ended))


@app.command(epilog=EPILOG)
def version(as_json: Json = False) -> None:
    """Print the version of the distribution."""
    number = importlib.metadata.version(DISTRIBUTION)
    if as_json:
        print_json({"distribution": DISTRIBUTION, "version": number})
    else:
        console().print(f"{DISTRIBUTION} {number}", markup=False)


def main() -> None:
    """Be the program gmemctl."""
    app(prog_name="gmemctl")
