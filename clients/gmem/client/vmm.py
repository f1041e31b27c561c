"""The vmm service as Python calls: what a VMM does with its /dev/kvm descriptors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import cached_property

from gmem.api.types.v1.types_pb2 import Capabilities, RequestId
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.api.vmm.v1 import vmm_pb2_grpc as pb_grpc
from gmem.client.base import ServiceClient
from gmem.client.connection import ONCE
from gmem.client.vcpu_run import VcpuRun


class VmmClient(ServiceClient):
    """The VMs of one VMM process; addresses and sizes in bytes, gfns in pages."""

    SERVICE = "vmm"

    @cached_property
    def _stub(self) -> pb_grpc.VmmServiceAsyncStub:
        return pb_grpc.VmmServiceStub(self.connection.channel)

    async def get_capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Return KVM_CHECK_EXTENSION's answers, and what this host emulates."""
        request = pb.GetCapabilitiesRequest()
        method = self._stub.GetCapabilities
        response = await self.connection.call(method, request, timeout=timeout)
        return response.capabilities

    async def create_vm(
        self,
        *,
        vm_id: str,
        type: pb.VmType.ValueType = pb.VM_TYPE_SW_PROTECTED,  # noqa: A002 - the rpc's field
        lineage: str = "",
        cgroup: str = "",
        request_id: RequestId | None = None,
    ) -> pb.Vm:
        """KVM_CREATE_VM; starts the VM's guest process."""
        request = pb.CreateVmRequest(
            vm_id=vm_id, type=type, lineage=lineage, cgroup=cgroup
        )
        method = self._stub.CreateVm
        return (await self.connection.mutate(method, request, request_id)).vm

    async def get_vm(self, name: str) -> pb.Vm:
        """Return one VM with its memslots."""
        request = pb.GetVmRequest(name=name)
        return (await self.connection.call(self._stub.GetVm, request)).vm

    async def list_vms(self) -> list[pb.Vm]:
        """Return all VMs, by name."""
        vms: list[pb.Vm] = []
        token = ""
        while True:
            request = pb.ListVmsRequest(page_token=token)
            response = await self.connection.call(self._stub.ListVms, request)
            vms += response.vms
            token = response.next_page_token
            if not token:
                return vms

    async def delete_vm(
        self, *, name: str, request_id: RequestId | None = None
    ) -> None:
        """End a VM: its memslots are unbound, its guest process ends."""
        request = pb.DeleteVmRequest(name=name)
        await self.connection.mutate(self._stub.DeleteVm, request, request_id)

    async def create_guest_memfd(
        self,
        *,
        vm: str,
        size: int,
        flags: int = 0,
        page_order: int = 0,
        request_id: RequestId | None = None,
    ) -> str:
        """KVM_CREATE_GUEST_MEMFD; return the inode's resource name.

        `page_order` is a field of IN_PLACE alone.
        """
        request = pb.CreateGuestMemfdRequest(
            vm=vm, size=size, flags=flags, page_order=page_order
        )
        method = self._stub.CreateGuestMemfd
        return (await self.connection.mutate(method, request, request_id)).guest_memfd

    async def set_user_memory_region2(
        self,
        *,
        vm: str,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        userspace: pb.Userspace | None = None,
        guest_memfd: str = "",
        guest_memfd_offset: int = 0,
        request_id: RequestId | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; memory_size 0 deletes the slot."""
        request = pb.SetUserMemoryRegion2Request(
            vm=vm,
            slot=slot,
            flags=flags,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            userspace=userspace,
            guest_memfd=guest_memfd,
            guest_memfd_offset=guest_memfd_offset,
        )
        method = self._stub.SetUserMemoryRegion2
        await self.connection.mutate(method, request, request_id)

    async def set_memory_attributes(
        self,
        *,
        vm: str,
        address: int,
        size: int,
        attributes: int,
        flags: int = 0,
        validate_only: bool = False,
        wait_ms: int | None = None,
        timeout: float | None = None,
        request_id: RequestId | None = None,
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: convert a gpa range, all or nothing.

        With `wait_ms` it waits for whoever holds the pages; `timeout` is then counted
        from the end of that wait, where it is not given.
        """
        request = pb.SetMemoryAttributesRequest(
            vm=vm,
            address=address,
            size=size,
            attributes=attributes,
            flags=flags,
            validate_only=validate_only,
            wait_ms=wait_ms,
        )
        timeout = self.connection.patience.beyond(wait_ms, timeout)
        method = self._stub.SetMemoryAttributes
        await self.connection.mutate(method, request, request_id, timeout=timeout)

    async def get_memory_attributes(
        self, *, vm: str, address: int, size: int
    ) -> tuple[pb.AttributeRun, ...]:
        """Return the attributes of a gpa range, as runs."""
        request = pb.GetMemoryAttributesRequest(vm=vm, address=address, size=size)
        method = self._stub.GetMemoryAttributes
        return tuple((await self.connection.call(method, request)).runs)

    async def populate_memory(
        self,
        *,
        vm: str,
        address: int,
        size: int,
        descriptor: str,
        source_offset: int = 0,
        timeout: float | None = None,
        request_id: RequestId | None = None,
    ) -> None:
        """Copy launch-time content into private memory (kvm_gmem_populate)."""
        request = pb.PopulateMemoryRequest(
            vm=vm,
            address=address,
            size=size,
            descriptor=descriptor,
            source_offset=source_offset,
        )
        method = self._stub.PopulateMemory
        await self.connection.mutate(method, request, request_id, timeout=timeout)

    async def create_vcpu(
        self, *, vm: str, vcpu: int, request_id: RequestId | None = None
    ) -> None:
        """KVM_CREATE_VCPU."""
        request = pb.CreateVcpuRequest(vm=vm, vcpu=vcpu)
        await self.connection.mutate(self._stub.CreateVcpu, request, request_id)

    async def pre_fault_memory(
        self, *, vm: str, vcpu: int, gpa: int, size: int, flags: int = 0
    ) -> pb.PreFaultMemoryResponse:
        """KVM_PRE_FAULT_MEMORY; return gpa and size of what is left."""
        request = pb.PreFaultMemoryRequest(
            vm=vm, vcpu=vcpu, gpa=gpa, size=size, flags=flags
        )
        return await self.connection.call(self._stub.PreFaultMemory, request)

    def run(
        self,
        *,
        vm: str,
        program: Sequence[pb.Instruction],
        vcpu: int = 0,
        policy: pb.Policy.ValueType = pb.POLICY_CONVERT,
    ) -> VcpuRun:
        """KVM_RUN as a stream of exits; use as `async with client.run(...) as run`."""
        start = pb.RunStart(vm=vm, vcpu=vcpu, program=program, policy=policy)
        return VcpuRun(self.connection, self._stub.Run, start)

    async def get_stage2(self, vm: str) -> pb.GetStage2Response:
        """Return stage-2 entries by level."""
        request = pb.GetStage2Request(vm=vm)
        return await self.connection.call(self._stub.GetStage2, request)

    async def invalidate_begin(
        self, *, vm: str, gfn: int, npages: int, timeout: float | None = None
    ) -> None:
        """Say that a change of guest frames begins; sent once, as each one counts."""
        request = pb.InvalidateBeginRequest(vm=vm, gfn=gfn, npages=npages)
        method = self._stub.InvalidateBegin
        await self.connection.call(method, request, timeout=timeout, patience=ONCE)

    async def invalidate_end(
        self, *, vm: str, gfn: int, npages: int, timeout: float | None = None
    ) -> None:
        """Say that the change that began is over; sent once."""
        request = pb.InvalidateEndRequest(vm=vm, gfn=gfn, npages=npages)
        method = self._stub.InvalidateEnd
        await self.connection.call(method, request, timeout=timeout, patience=ONCE)

    def watch(self, start_revision: int = 0) -> AsyncGenerator[pb.WatchResponse]:
        """Yield changes from `start_revision` (0: from now) on; close it after use."""
        request = pb.WatchRequest(start_revision=start_revision)
        return self.connection.stream(self._stub.Watch, request)
