"""The rpcs of VmmService: read the request, run the core, make the response."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.api.vmm.v1 import vmm_pb2_grpc
from gmem.effects import Op
from gmem.runtime.broker import Broker
from gmem.runtime.drive import Runner
from gmem.runtime.log import logger
from gmem.runtime.paging import paginate
from gmem.runtime.server import Runtime
from gmem.uapi.flags import KVM_HC_MAP_GPA_RANGE, Capability, MemoryAttribute, VmType
from gmem.uapi.pages import PAGE_SIZES
from gmem.vmm import codec
from gmem.vmm.core.attributes import require_gpa_range
from gmem.vmm.core.create import create_guest_memfd
from gmem.vmm.core.invalidate import Notice
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.pre_fault import pre_fault_memory
from gmem.vmm.core.registry import VmRegistry
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.guests import Guests
from gmem.vmm.program_codec import resume_from_wire, start_from_wire
from gmem.vmm.run import VcpuRun

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

GUEST_MEMFD_KEY: Final = "guest_memfd"
"""Brackets of guest_memfd's upcalls; those of our own changes have numbers."""

EXTENSIONS: Final = {
    Capability.EXIT_HYPERCALL: 1 << KVM_HC_MAP_GPA_RANGE,
    Capability.USER_MEMORY2: 1,
    Capability.MEMORY_FAULT_INFO: 1,
    Capability.MEMORY_ATTRIBUTES: int(MemoryAttribute.PRIVATE),
    Capability.GUEST_MEMFD: 1,
    Capability.PRE_FAULT_MEMORY: 1,
    Capability.VM_TYPES: sum(1 << vm_type for vm_type in VmType),
}
"""What KVM_CHECK_EXTENSION answers."""


class VmmServicer(vmm_pb2_grpc.VmmServiceServicer):
    """Three beats each: decode, run, encode; the boundary does everything else."""

    def __init__(
        self,
        runtime: Runtime,
        runner: Runner,
        registry: VmRegistry,
        guests: Guests,
        broker: Broker,
    ) -> None:
        self._runtime = runtime
        self._runner = runner
        self._registry = registry
        self._guests = guests
        self._broker = broker
        broker.register("invalidate", self.invalidate)

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        """KVM_CHECK_EXTENSION."""
        del request, context
        capabilities = self._runtime.capabilities(
            data_plane=self._runtime.config.backend.value,
            broker_path=str(self._broker.path),
            extensions={int(number): value for number, value in EXTENSIONS.items()},
            page_sizes=PAGE_SIZES,
        )
        return pb.GetCapabilitiesResponse(capabilities=capabilities)

    async def CreateVm(
        self, request: pb.CreateVmRequest, context: Context
    ) -> pb.CreateVmResponse:
        """KVM_CREATE_VM."""
        del context
        vm_type = codec.vm_type_from_wire(request.type)
        lineage = codec.lineage_from_wire(request.lineage)
        op = self._registry.create(request.vm_id, vm_type, lineage, request.cgroup)
        vm = await self._runner.run(op)
        if not self._guests.get(vm.name).alive:
            self.guest_gone(vm.name)
        self._record("vm.created", vm.name, guest_pid=vm.guest_pid)
        return pb.CreateVmResponse(vm=codec.vm_to_wire(vm))

    async def GetVm(
        self, request: pb.GetVmRequest, context: Context
    ) -> pb.GetVmResponse:
        """One VM."""
        del context
        vm = self._registry.get(request.name)
        return pb.GetVmResponse(vm=codec.vm_to_wire(vm))

    async def ListVms(
        self, request: pb.ListVmsRequest, context: Context
    ) -> pb.ListVmsResponse:
        """VMs in the order of their names."""
        del context
        page, token = paginate(
            self._registry.names(),
            page_size=request.page_size,
            page_token=request.page_token,
            scope="vms",
            key=lambda name: name,
        )
        vms = [codec.vm_to_wire(self._registry.get(name)) for name in page]
        return pb.ListVmsResponse(vms=vms, next_page_token=token)

    async def DeleteVm(
        self, request: pb.DeleteVmRequest, context: Context
    ) -> pb.DeleteVmResponse:
        """End a VM."""
        del context
        await self._runner.run(self._registry.delete(request.name))
        self._record("vm.deleted", request.name)
        return pb.DeleteVmResponse()

    async def CreateGuestMemfd(
        self, request: pb.CreateGuestMemfdRequest, context: Context
    ) -> pb.CreateGuestMemfdResponse:
        """KVM_CREATE_GUEST_MEMFD."""
        del context
        vm = self._registry.get(request.vm)
        name = await self._runner.run(
            create_guest_memfd(
                vm, request.size, request.flags, page_order=request.page_order
            )
        )
        self._record("guest_memfd.created", vm.name, guest_memfd=name)
        return pb.CreateGuestMemfdResponse(guest_memfd=name)

    async def SetUserMemoryRegion2(
        self, request: pb.SetUserMemoryRegion2Request, context: Context
    ) -> pb.SetUserMemoryRegion2Response:
        """KVM_SET_USER_MEMORY_REGION2."""
        del context
        vm = self._registry.get(request.vm)
        region = codec.region_from_wire(request)
        await self._runner.run(set_user_memory_region2(vm, region))
        self._record("memslot.set", vm.name, slot=region.slot, size=region.memory_size)
        return pb.SetUserMemoryRegion2Response()

    async def SetMemoryAttributes(
        self, request: pb.SetMemoryAttributesRequest, context: Context
    ) -> pb.SetMemoryAttributesResponse:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        del context
        vm = self._registry.get(request.vm)
        op = set_memory_attributes(
            vm,
            request.address,
            request.size,
            attributes=request.attributes,
            flags=request.flags,
            validate_only=request.validate_only,
            wait_ms=request.wait_ms if request.HasField("wait_ms") else None,
        )
        await self._changed_attributes(vm.name, request, op)
        return pb.SetMemoryAttributesResponse()

    async def GetMemoryAttributes(
        self, request: pb.GetMemoryAttributesRequest, context: Context
    ) -> pb.GetMemoryAttributesResponse:
        """The attributes of a range."""
        del context
        vm = self._registry.get(request.vm)
        gfns = require_gpa_range(request.address, request.size)
        runs = [
            pb.AttributeRun(address=run.offset, size=run.size, attributes=attributes)
            for run, attributes in vm.attributes.runs(gfns)
        ]
        return pb.GetMemoryAttributesResponse(runs=runs)

    async def PopulateMemory(
        self, request: pb.PopulateMemoryRequest, context: Context
    ) -> pb.PopulateMemoryResponse:
        """kvm_gmem_populate."""
        del context
        vm = self._registry.get(request.vm)
        op = populate_memory(
            vm,
            request.address,
            request.size,
            descriptor=request.descriptor,
            source_offset=request.source_offset,
        )
        await self._runner.run(op)
        self._record(
            "memory.populated", vm.name, address=request.address, size=request.size
        )
        return pb.PopulateMemoryResponse()

    async def CreateVcpu(
        self, request: pb.CreateVcpuRequest, context: Context
    ) -> pb.CreateVcpuResponse:
        """KVM_CREATE_VCPU."""
        del context
        self._registry.get(request.vm).create_vcpu(request.vcpu)
        self._record("vcpu.created", request.vm, vcpu=request.vcpu)
        return pb.CreateVcpuResponse()

    async def PreFaultMemory(
        self, request: pb.PreFaultMemoryRequest, context: Context
    ) -> pb.PreFaultMemoryResponse:
        """KVM_PRE_FAULT_MEMORY."""
        del context
        vm = self._registry.get(request.vm)
        op = pre_fault_memory(
            vm, request.vcpu, request.gpa, request.size, request.flags
        )
        left = await self._runner.run(op)
        return pb.PreFaultMemoryResponse(gpa=left.gpa, size=left.size)

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: Context
    ) -> AsyncIterator[pb.RunResponse]:
        """KVM_RUN."""
        del context
        requests = aiter(request_iterator)
        order = start_from_wire(await anext(requests, None))
        vm = self._registry.get(order.vm)
        vm.vcpu(order.vcpu)
        vm.require_guest()
        guest = self._guests.get(vm.name)
        with VcpuRun(vm, guest, self._runner, order) as run:
            while True:
                yield await run.next_exit()
                request = None if run.halted else await anext(requests, None)
                if request is None:
                    return
                run.resume(resume_from_wire(request))

    async def GetStage2(
        self, request: pb.GetStage2Request, context: Context
    ) -> pb.GetStage2Response:
        """Stage-2 entries by level."""
        del context
        return codec.stage2_to_wire(self._registry.get(request.vm))

    async def InvalidateBegin(
        self, request: pb.InvalidateBeginRequest, context: Context
    ) -> pb.InvalidateBeginResponse:
        """Zap, tell the guest process, answer."""
        del context
        self._invalidate_begin(request)
        return pb.InvalidateBeginResponse()

    async def InvalidateEnd(
        self, request: pb.InvalidateEndRequest, context: Context
    ) -> pb.InvalidateEndResponse:
        """The change is over."""
        del context
        self._invalidate_end(request)
        return pb.InvalidateEndResponse()

    def invalidate(self, fields: dict[str, Any]) -> None:
        """Both of them, as a message of the broker; see `guest_memfd/vmm_link.py`."""
        edge, request = codec.notice_from_message(fields)
        if edge == "begin":
            self._invalidate_begin(request)
        else:
            self._invalidate_end(request)

    # Nothing in these two may wait (V3).

    def _invalidate_begin(self, request: codec.Invalidate) -> None:
        vm = self._registry.get(request.vm)
        gfns = codec.gfns_from_wire(request)
        self._notify(vm.name, vm.invalidate_begin(GUEST_MEMFD_KEY, gfns))

    def _invalidate_end(self, request: codec.Invalidate) -> None:
        vm = self._registry.get(request.vm)
        gfns = codec.gfns_from_wire(request)
        self._notify(vm.name, vm.invalidate_end(GUEST_MEMFD_KEY, gfns))

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        """Changes, as they happen."""
        del context
        async for events in self._runtime.events.watch(request.start_revision):
            revision = events[-1].revision
            yield pb.WatchResponse(revision=revision, events=events)

    def guest_gone(self, name: str) -> None:
        """Note that a guest process died by itself."""
        logger.warning("guest process died", vm=name)
        if name in self._registry.names():
            self._registry.get(name).guest_died()
            self._record("guest.gone", name)

    def _notify(self, vm: str, notice: Notice) -> None:
        guest = self._guests.find(vm)
        if guest is not None:
            guest.notify(notice)

    async def _changed_attributes(
        self, vm: str, request: pb.SetMemoryAttributesRequest, op: Op[bool]
    ) -> None:
        if await self._runner.run(op):
            self._record(
                "attributes.set",
                vm,
                address=hex(request.address),
                size=hex(request.size),
                attributes=request.attributes,
            )

    def _record(self, kind: str, name: str, **details: object) -> None:
        self._runtime.events.record(kind, name, **details)
