"""Typed async clients of the services: what a VMM, a device or a test calls."""

from __future__ import annotations

from gmem.client.connection import Patience
from gmem.client.guest_memfd import GuestMemfdClient
from gmem.client.host_allocator import HostAllocatorClient
from gmem.client.hugetlb_file import HugetlbFile
from gmem.client.remote_memory import RemoteMemory
from gmem.client.vcpu_run import VcpuRun
from gmem.client.vmm import VmmClient

__all__ = [
    "GuestMemfdClient",
    "HostAllocatorClient",
    "HugetlbFile",
    "Patience",
    "RemoteMemory",
    "VcpuRun",
    "VmmClient",
]
