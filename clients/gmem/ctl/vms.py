"""The commands `vm ...`: the virtual machines of a host, of all its VMM processes."""

from __future__ import annotations

import asyncio
from typing import Any

import typer

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import VmmClient
from gmem.ctl.arguments import Host, Json, RunDir, state_of
from gmem.ctl.errors import EPILOG
from gmem.ctl.inspection import message_values
from gmem.ctl.output import print_json, print_table, reporting
from gmem.ctl.state import HostState
from gmem.uapi.pages import format_size

vm_app = typer.Typer(help="Virtual machines.", no_args_is_help=True)

_VMM_PREFIX = "vmm-"
_COLUMNS = (
    "VM",
    "VMM",
    "TYPE",
    "LINEAGE",
    "SLOTS",
    "MEMORY",
    "VCPUS",
    "GUEST_PID",
    "GUEST",
)


@vm_app.command("ls", epilog=EPILOG)
def vm_ls(host: Host = "local", run_dir: RunDir = None, as_json: Json = False) -> None:
    """List the VMs of a host."""
    with reporting(as_json):
        found = asyncio.run(vms(state_of(run_dir, host)))
        if as_json:
            print_json({"vms": [message_values(vm) | {"vmm": v} for v, vm in found]})
        else:
            print_table(_COLUMNS, [vm_row(vmm, vm) for vmm, vm in found])


async def vms(state: HostState) -> list[tuple[str, pb.Vm]]:
    """Ask every VMM of a host; return (its name, a VM). Raises TransportError."""
    found: list[tuple[str, pb.Vm]] = []
    for service in state.services:
        if service.name.startswith(_VMM_PREFIX):
            async with VmmClient(service.target, client="gmemctl") as vmm:
                found += [(service.name, vm) for vm in await vmm.list_vms()]
    return found


def vm_row(vmm: str, vm: pb.Vm) -> tuple[Any, ...]:
    """Return the cells of one VM."""
    memory = sum(slot.memory_size for slot in vm.memslots)
    return (
        vm.name,
        vmm,
        pb.VmType.Name(vm.type).removeprefix("VM_TYPE_"),
        vm.lineage,
        len(vm.memslots),
        format_size(memory) if memory else "0",
        len(vm.vcpus),
        vm.guest_pid,
        "alive" if vm.guest_alive else "gone",
    )
