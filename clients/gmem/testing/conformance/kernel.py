"""The kernel of this machine, over /dev/kvm.

Every call of a case is the system call itself. What a mainline kernel cannot be asked
for is missing from `capabilities`, with the reason, and such cases are skipped: memory
attributes where KVM_CAP_MEMORY_ATTRIBUTES is 0, huge pages, conversions, pins.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gmem.testing.conformance import kvm_abi as abi
from gmem.testing.conformance.guest import Exit, Halted, Instruction, Load
from gmem.testing.conformance.kernel_guest import BASE, Payload, Vcpu, VcpuExits
from gmem.testing.conformance.kernel_memory import Mapping as MappedFile
from gmem.testing.conformance.kvm import (
    MAINLINE,
    Backend,
    Capabilities,
    Descriptor,
    Feature,
    GuestMemfd,
    Userspace,
    Vm,
)
from gmem.testing.conformance.outcomes import errno_name
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    Capability,
    VmType,
)
from gmem.uapi.pages import PAGE_SIZE

DEV_KVM: Final = Path("/dev/kvm")
NODES_WITH_MEMORY: Final = Path("/sys/devices/system/node/has_memory")

_U64: Final = (1 << 64) - 1
_U32: Final = (1 << 32) - 1
_NO_FD: Final = -1
_PROBE_GPA: Final = 4 << 30


class NoKernelError(Exception):
    """This machine has no KVM that knows guest_memfd; the text says what is missing."""


class Kernel(Backend):
    """/dev/kvm of this machine."""

    name = "kernel"

    def __init__(self, device: Path = DEV_KVM) -> None:
        """Open the device; NoKernelError where it cannot be asked anything."""
        self._fd = _opened(device)
        self.reads_through_userspace = False
        try:
            self._capabilities = self._asked()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def capabilities(self) -> Capabilities:
        """MAINLINE with pages of 4K, and what this kernel was found to have."""
        return self._capabilities

    def fileno(self) -> int:
        """Return the descriptor of the device."""
        return self._fd

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the device."""
        return fcntl.ioctl(self._fd, abi.KVM_CHECK_EXTENSION, capability)

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        """KVM_CREATE_VM."""
        assert lineage == MAINLINE, f"{lineage} is no lineage of a released kernel"
        return KernelVm(self, fcntl.ioctl(self._fd, abi.KVM_CREATE_VM, int(vm_type)))

    def close(self) -> None:
        """Close the device."""
        os.close(self._fd)

    def _asked(self) -> Capabilities:
        """Find out what is there."""
        try:
            version = fcntl.ioctl(self._fd, abi.KVM_GET_API_VERSION)
        except OSError as error:
            name = errno_name(error.errno)
            raise NoKernelError(f"KVM_GET_API_VERSION fails with {name}") from error
        if version != abi.KVM_API_VERSION:
            raise NoKernelError(
                f"KVM_GET_API_VERSION is {version}, not {abi.KVM_API_VERSION}"
            )
        for needed in (Capability.USER_MEMORY2, Capability.GUEST_MEMFD):
            if not self.check_extension(needed):
                raise NoKernelError(
                    f"KVM_CAP_{needed.name} is 0: the kernel ({os.uname().release}) or "
                    "its configuration has no guest_memfd"
                )
        flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
        if self.check_extension(abi.KVM_CAP_GUEST_MEMFD_FLAGS) & flags != flags:
            raise NoKernelError(
                "KVM_CAP_GUEST_MEMFD_FLAGS has no MMAP and INIT_SHARED: guest_memfd of "
                f"this kernel ({os.uname().release}) is older than Linux 6.18"
            )
        self.reads_through_userspace = not self._guest_reads_file()
        missing = {**_NEVER, **self._missing()}
        has = frozenset(Feature) - missing.keys()
        return Capabilities({MAINLINE: (PAGE_SIZE,)}, has, missing)

    def _missing(self) -> Mapping[Feature, str]:
        """Return what depends on the machine and is not there."""
        missing: dict[Feature, str] = {}
        if not self.check_extension(Capability.MEMORY_ATTRIBUTES):
            missing[Feature.PRIVATE_MEMORY] = "KVM_CAP_MEMORY_ATTRIBUTES is 0"
        if not _has_two_nodes():
            missing[Feature.NUMA] = "this machine has one NUMA node"
        return missing

    def _guest_reads_file(self) -> bool:
        """Whether a guest gets at a guest_memfd whose memslot has no userspace_addr.

        Not on hardware without virtualization: an instruction that KVM has to emulate
        reads and writes memory through userspace_addr alone. There every memslot gets
        a mapping of its file.
        """
        flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
        with ExitStack() as stack:
            vm = self.create_vm(lineage=MAINLINE, vm_type=VmType.DEFAULT)
            stack.callback(vm.close)
            file = vm.create_guest_memfd(PAGE_SIZE, flags)
            stack.callback(file.close)
            vm.set_user_memory_region2(
                slot=0,
                flags=KVM_MEM_GUEST_MEMFD,
                guest_phys_addr=_PROBE_GPA,
                memory_size=PAGE_SIZE,
                guest_memfd=file,
            )
            vm.create_vcpu()
            return isinstance(_first_exit(vm, Load(_PROBE_GPA, 1)), Halted)


class AbsentKernel(Backend):
    """What stands for a kernel that cannot be asked anything."""

    name = Kernel.name

    def __init__(self, reason: str) -> None:
        """`reason` is what every case is skipped with."""
        self._reason = reason

    @property
    def capabilities(self) -> Capabilities:
        """The cases that would be played, and why they are not."""
        sizes = {MAINLINE: (PAGE_SIZE,)}
        return Capabilities(sizes, frozenset(), nothing=self._reason)

    def create_vm(self, *, lineage: str, vm_type: VmType) -> Vm:
        """Refuse: nobody may play a case on it."""
        raise NoKernelError(f"{self._reason}: no {vm_type.name} VM of {lineage}")

    def close(self) -> None:
        """Nothing was opened."""


_NEVER: Final[Mapping[Feature, str]] = {
    Feature.PINS: "a released kernel pins no page of guest_memfd by name",
    Feature.POOLS: "guest_memfd of a released kernel takes no HugeTLB pages",
    Feature.OWN_POOLS: "HugeTLB pools of a machine belong to everybody",
    Feature.HUGETLB_FILES: "guest_memfd of a released kernel takes no HugeTLB pages",
    Feature.MACHINE_HUGE_PAGES: "no case of MAINLINE takes huge pages of the machine",
    Feature.CGROUPS: "guest_memfd of a released kernel takes no HugeTLB pages",
    Feature.MEMORY_ERRORS: "an error would take a page of the machine for good",
    Feature.USERSPACE_VMA: "a released kernel does not look behind userspace_addr",
}


class KernelMemfd(GuestMemfd):
    """A file of the kernel's own."""

    _closed = False

    def close(self) -> None:
        """Close the descriptor."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


class KernelVm(Vm):
    """A file of KVM_CREATE_VM, and what its memslots have mapped here."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        """Own `fd`."""
        self._kernel = kernel
        self._fd = fd
        self._mapped: dict[int, MappedFile] = {}
        self._vcpus: dict[int, Vcpu] = {}
        self._closed = False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def create_guest_memfd(
        self, size: int, flags: int, page_order: int = 0
    ) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD."""
        assert page_order == 0, f"no released kernel has the field: {page_order}"
        argument = bytearray(abi.CREATE_GUEST_MEMFD.pack(size & _U64, flags))
        fd = fcntl.ioctl(self._fd, abi.KVM_CREATE_GUEST_MEMFD, argument)
        return KernelMemfd(fd, size)

    def set_user_memory_region2(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        flags: int = 0,
        userspace: Userspace | None = None,
        guest_memfd: Descriptor | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; who plays the VMM is this process."""
        mapped = _mapped(userspace, memory_size)
        if userspace is None and self._kernel.reads_through_userspace:
            mapped = _mapped_if_mmapable(guest_memfd, guest_memfd_offset, memory_size)
        region = abi.USERSPACE_MEMORY_REGION2.pack(
            slot,
            flags,
            guest_phys_addr & _U64,
            memory_size & _U64,
            mapped.address if mapped else 0,
            guest_memfd_offset & _U64,
            _fileno(guest_memfd) & _U32,
        )
        try:
            fcntl.ioctl(self._fd, abi.KVM_SET_USER_MEMORY_REGION2, region)
        except OSError:
            if mapped:
                mapped.close()
            raise
        self._remember(slot, mapped)

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM."""
        return fcntl.ioctl(self._fd, abi.KVM_CHECK_EXTENSION, capability)

    def create_vcpu(self, vcpu: int = 0) -> None:
        """KVM_CREATE_VCPU."""
        run_bytes = fcntl.ioctl(self._kernel.fileno(), abi.KVM_GET_VCPU_MMAP_SIZE)
        self._vcpus[vcpu] = Vcpu(self._fd, vcpu, run_bytes)

    @contextmanager
    def run(
        self, program: Sequence[Instruction], *, vcpu: int = 0
    ) -> Iterator[VcpuExits]:
        """KVM_RUN, with a memslot of our own for the program while it runs."""
        payload = Payload.of(program)
        fd = os.memfd_create("program", os.MFD_CLOEXEC)
        with ExitStack() as stack:
            stack.callback(os.close, fd)
            os.ftruncate(fd, payload.size)
            memory = stack.enter_context(mmap.mmap(fd, payload.size))
            memory[: len(payload.memory)] = payload.memory
            slot = self.check_extension(abi.KVM_CAP_NR_MEMSLOTS) - 1
            stack.callback(self._delete, slot)
            self.set_user_memory_region2(
                slot=slot,
                guest_phys_addr=BASE,
                memory_size=payload.size,
                userspace=Userspace(_Fd(fd)),
            )
            yield VcpuExits(self._vcpus[vcpu], payload, memory)

    def pre_fault_memory(
        self, gpa: int, size: int, *, vcpu: int = 0
    ) -> tuple[str, int, int]:
        """KVM_PRE_FAULT_MEMORY."""
        number, gpa, size = self._vcpus[vcpu].pre_fault(gpa, size)
        return errno_name(number), gpa, size

    def close(self) -> None:
        """Close everything; the VM goes with the last file that refers to it."""
        if self._closed:
            return
        self._closed = True
        for vcpu in self._vcpus.values():
            vcpu.close()
        os.close(self._fd)
        for mapped in self._mapped.values():
            mapped.close()

    def _delete(self, slot: int) -> None:
        self.set_user_memory_region2(slot=slot, guest_phys_addr=0, memory_size=0)

    def _remember(self, slot: int, mapped: MappedFile | None) -> None:
        """Keep what a memslot has mapped, and drop what it had before."""
        before = self._mapped.pop(slot, None)
        if before:
            before.close()
        if mapped:
            self._mapped[slot] = mapped


@dataclass(frozen=True, slots=True)
class _Fd:
    """A descriptor as HasFileno."""

    number: int

    def fileno(self) -> int:
        return self.number


def _fileno(descriptor: Descriptor | None) -> int:
    match descriptor:
        case None:
            return _NO_FD
        case Kernel() | KernelVm() | GuestMemfd():
            return descriptor.fileno()
        case Vm() | Backend():
            raise TypeError(f"{descriptor} is no file of this machine's kernel")
        case _:
            return descriptor.fileno()


def _mapped(userspace: Userspace | None, length: int) -> MappedFile | None:
    if userspace is None:
        return None
    return MappedFile(userspace.file.fileno(), userspace.offset, length)


def _mapped_if_mmapable(
    file: Descriptor | None, offset: int, length: int
) -> MappedFile | None:
    """Return a mapping of a guest_memfd; None for what cannot be mapped."""
    if not isinstance(file, GuestMemfd):
        return None
    try:
        return MappedFile(file.fileno(), offset, length)
    except OSError:
        return None


def _first_exit(vm: Vm, instruction: Instruction) -> Exit:
    with vm.run([instruction]) as run:
        return next(iter(run.exits()))


def _opened(device: Path) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NoKernelError(f"{device}: {error.strerror}") from error


def _has_two_nodes() -> bool:
    """Whether the machine has memory on two nodes; no list means one."""
    try:
        nodes = NODES_WITH_MEMORY.read_text().strip()
    except OSError:
        return False
    return nodes not in {"", "0"}
