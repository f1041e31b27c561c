"""``python -m gmem.vmm --name vmm-0``: one VMM process of an emulated host."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from gmem.api.vmm.v1 import vmm_pb2, vmm_pb2_grpc
from gmem.client import GuestMemfdClient
from gmem.runtime.broker import Broker
from gmem.runtime.config import HostShape, ServiceConfig
from gmem.runtime.log import logger
from gmem.runtime.performer import Performer
from gmem.runtime.server import Runtime, open_journal, run_service, wait_for_start
from gmem.uapi.errors import NoSuchObject, TransportError
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.lineage import VM_RULES, VmRules, vm_rules_of
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.rows import VmRows, restore
from gmem.vmm.guests import Guests
from gmem.vmm.ports import GuestMemfdPort, GuestPort
from gmem.vmm.servicer import VmmServicer

RETRY_SECONDS: Final = 0.5
EXIT_USAGE: Final = 2


async def start(
    runtime: Runtime, *, rules: Mapping[Lineage, VmRules] = VM_RULES
) -> None:
    """Make the service: its broker, its ports, its core, its rpcs."""
    config = runtime.config
    journal = runtime.use(open_journal(config))
    broker = Broker(config.run_dir / f"{config.name}.broker")
    await broker.start()
    runtime.on_stop(broker.stop)
    client = GuestMemfdClient(
        config.guest_memfd_target, client=config.name, incarnation=runtime.incarnation
    )
    runtime.on_stop(client.close)

    registry = VmRegistry(config.host, rules)
    if journal.rows:
        restore(registry, journal.rows)
        logger.info("recovered", vms=len(registry))
        task = asyncio.create_task(unbind_unknown(client, registry))
        runtime.on_stop(partial(_cancelled, task))
    journal.loaded()
    # Each RPC changes the VMs in one step, and is told with its reply.
    journal.collect = VmRows(registry).changes
    guests = Guests()
    runtime.on_stop(guests.end_all)
    performer = Performer()
    GuestMemfdPort(client, lambda: runtime.target).register(performer)
    GuestPort(
        guests, broker, client, name=config.name, incarnation=runtime.incarnation
    ).register(performer)

    runner = runtime.runner(performer)
    servicer = VmmServicer(runtime, runner, registry, guests, broker)
    guests.on_gone = servicer.guest_gone
    service = vmm_pb2.DESCRIPTOR.services_by_name["VmmService"]
    runtime.add(vmm_pb2_grpc.add_VmmServiceServicer_to_server, servicer, service)


async def unbind_unknown(client: GuestMemfdClient, registry: VmRegistry) -> None:
    """End bindings of our VMs that no memslot has: setting one was cut off.

    Nobody makes new ones meanwhile: the guests of these VMs are gone.
    """
    while True:
        try:
            for inode in await client.list_guest_memfds():
                for binding in inode.bindings:
                    if _is_unknown(registry, binding.vm, binding.slot):
                        logger.info("unbound", vm=binding.vm, slot=binding.slot)
                        await client.unbind_memslot(
                            name=inode.name, vm=binding.vm, slot=binding.slot
                        )
        except TransportError as error:
            logger.warning("recovery waits", error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
        except NoSuchObject:
            # An inode that went while we looked.
            continue
        else:
            return


def _is_unknown(registry: VmRegistry, vm: str, slot: int) -> bool:
    return vm in registry.names() and registry.get(vm).memslots.get(slot) is None


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def main(argv: Sequence[str] | None = None) -> int:
    """Serve VMs; return the exit status."""
    config = ServiceConfig.load("vmm", argv)
    if not wait_for_start(config):
        return 0
    try:
        shape = HostShape.load(config)
    except (OSError, ValueError) as error:
        logger.critical("cannot boot", error=str(error))
        return EXIT_USAGE
    rules = vm_rules_of(in_place_conversion=shape.gmem_in_place_conversion)
    return run_service(config, partial(start, rules=rules))


if __name__ == "__main__":
    sys.exit(main())
