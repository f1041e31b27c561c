"""Programs of the cases as machine code, and the vCPU of /dev/kvm that runs them.

The guest has 64-bit code, so that it reaches every guest physical address. A memslot of
our own, far from those of the cases, holds its page tables, its code and a buffer:

    0x0000  PML4
    0x1000  page directory pointers
    0x2000  page directory of 0 to 1 GiB: our memslot, at its own address
    0x3000  page directory of 1 to 2 GiB: what the program touches
    0x4000  how many instructions are done
    0x5000  code
    behind  bytes that are read and written

Pages of 2 MiB map more than a program asks for; nothing else is touched.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, assert_never

from gmem.testing.conformance import kvm_abi as abi
from gmem.testing.conformance.guest import (
    Exit,
    Fill,
    Halted,
    Instruction,
    IoExit,
    Load,
    MapGpaRange,
    MemoryFault,
    MmioExit,
    Out,
    Result,
    Store,
    Verify,
)
from gmem.uapi.errors import Errno
from gmem.uapi.flags import ExitReason
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M

BASE: Final = 256 << 20
"""Guest physical address of our memslot."""

_POINTERS, _DIRECTORY, _WINDOW_DIRECTORY, _DONE, _CODE = range(
    PAGE_SIZE, 6 * PAGE_SIZE, PAGE_SIZE
)
_CODE_BYTES: Final = 64 << 10
_BUFFER: Final = _CODE + _CODE_BYTES
_WINDOW: Final = 1 << 30
"""Linear address from which on the program sees what it touches."""
_DIRECTORY_ENTRIES: Final = 512

_PRESENT, _WRITABLE, _LARGE = 1 << 0, 1 << 1, 1 << 7
_ENTRY: Final = _PRESENT | _WRITABLE
_CR0: Final = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 31
"""PE, ET, NE, PG."""
_CR4_PAE: Final = 1 << 5
_EFER: Final = 1 << 8 | 1 << 10
"""LME, LMA."""
_RFLAGS: Final = 1 << 1
_CODE_SEGMENT: Final = abi.SEGMENT.pack(0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0)
_DATA_SEGMENT: Final = abi.SEGMENT.pack(0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0)
_DATA_SEGMENTS: Final = 5

_INC_DWORD_AT: Final = b"\xff\x04\x25"
_CLD, _HLT, _REP_MOVSB, _REP_STOSB = b"\xfc", b"\xf4", b"\xf3\xa4", b"\xf3\xaa"
_OUT_DX_EAX: Final = b"\xef"
_IO_OUT: Final = 1


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of our memslot for one program, and where its results will be."""

    memory: bytes
    size: int
    steps: tuple[tuple[Instruction, int], ...]

    @classmethod
    def of(cls, program: Sequence[Instruction]) -> Payload:
        """Assemble a program."""
        assembler = _Assembler()
        for instruction in program:
            assembler.add(instruction)
        return assembler.finish()


class _Assembler:
    """Code, data and page tables, as they grow."""

    def __init__(self) -> None:
        self._code = bytearray(_CLD)
        self._data = bytearray()
        self._frames: list[int] = []
        self._steps: list[tuple[Instruction, int]] = []

    def add(self, instruction: Instruction) -> None:
        at = _BUFFER + len(self._data)
        self._steps.append((instruction, at))
        match instruction:
            case Load(gpa, size) | Verify(gpa, size):
                self._copy(self._linear(gpa, size), BASE + at, size)
                self._data += bytes(size)
            case Store(gpa, data):
                self._copy(BASE + at, self._linear(gpa, len(data)), len(data))
                self._data += data
            case Fill(gpa, size, value):
                to = self._linear(gpa, size)
                self._code += _set(_EDI, to) + _set(_ECX, size) + _set(_EAX, value)
                self._code += _REP_STOSB
            case Out(port, value):
                self._code += _set(_EAX, value) + _set(_EDX, port) + _OUT_DX_EAX
            case MapGpaRange():
                raise NotImplementedError(f"{instruction} needs private memory")
            case _:
                assert_never(instruction)
        self._code += _INC_DWORD_AT + struct.pack("<I", BASE + _DONE)

    def finish(self) -> Payload:
        self._code += _HLT
        assert len(self._code) <= _CODE_BYTES, "a longer program: raise _CODE_BYTES"
        memory = bytearray(_BUFFER)
        directories = (BASE + _DIRECTORY | _ENTRY, BASE + _WINDOW_DIRECTORY | _ENTRY)
        struct.pack_into("<Q", memory, 0, BASE + _POINTERS | _ENTRY)
        struct.pack_into("<2Q", memory, _POINTERS, *directories)
        ours = range(BASE, BASE + _BUFFER + len(self._data), SIZE_2M)
        _put_pages(memory, _DIRECTORY + 8 * (BASE // SIZE_2M), ours)
        _put_pages(memory, _WINDOW_DIRECTORY, self._frames)
        memory[_CODE : _CODE + len(self._code)] = self._code
        whole = bytes(memory + self._data)
        return Payload(whole, -(-len(whole) // PAGE_SIZE) * PAGE_SIZE, (*self._steps,))

    def _copy(self, source: int, to: int, size: int) -> None:
        self._code += _set(_ESI, source) + _set(_EDI, to) + _set(_ECX, size)
        self._code += _REP_MOVSB

    def _linear(self, gpa: int, size: int) -> int:
        """Map a range of guest physical memory; return its linear address."""
        first = gpa // SIZE_2M * SIZE_2M
        at = _WINDOW + len(self._frames) * SIZE_2M
        self._frames += range(first, gpa + size, SIZE_2M)
        assert len(self._frames) <= _DIRECTORY_ENTRIES, "a program touches 1G at most"
        return at + gpa - first


def _put_pages(memory: bytearray, at: int, frames: Sequence[int]) -> None:
    """Write entries of a page directory from `at` on."""
    for index, frame in enumerate(frames):
        struct.pack_into("<Q", memory, at + 8 * index, frame | _ENTRY | _LARGE)


_EAX, _ECX, _EDX, _ESI, _EDI = 0, 1, 2, 6, 7


def _set(register: int, value: int) -> bytes:
    """Return `mov register, imm32`."""
    return bytes([0xB8 + register]) + struct.pack("<I", value)


class Vcpu:
    """A file of KVM_CREATE_VCPU with its struct kvm_run."""

    def __init__(self, vm_fd: int, number: int, run_bytes: int) -> None:
        """KVM_CREATE_VCPU."""
        with ExitStack() as stack:
            self._fd = fcntl.ioctl(vm_fd, abi.KVM_CREATE_VCPU, number)
            stack.callback(os.close, self._fd)
            self._run = stack.enter_context(mmap.mmap(self._fd, run_bytes))
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Set registers to the beginning of a payload."""
        state = bytearray(abi.SREGS.size)
        fcntl.ioctl(self._fd, abi.KVM_GET_SREGS, state)
        segments, control = abi.SREGS.unpack(state)
        _, cr2, _, _, cr8, _, apic_base = abi.CONTROL_REGISTERS.unpack(control)
        flat = _CODE_SEGMENT + _DATA_SEGMENTS * _DATA_SEGMENT
        control = abi.CONTROL_REGISTERS.pack(
            *(_CR0, cr2, BASE, _CR4_PAE, cr8, _EFER, apic_base)
        )
        state = bytearray(abi.SREGS.pack(flat + segments[len(flat) :], control))
        fcntl.ioctl(self._fd, abi.KVM_SET_SREGS, state)
        registers = [0] * 16 + [BASE + _CODE, _RFLAGS]
        fcntl.ioctl(self._fd, abi.KVM_SET_REGS, abi.REGS.pack(*registers))

    def pre_fault(self, gpa: int, size: int) -> tuple[int, int, int]:
        """KVM_PRE_FAULT_MEMORY; return errno, and gpa and size left."""
        argument = bytearray(abi.PRE_FAULT_MEMORY.pack(gpa, size, 0))
        number = 0
        try:
            fcntl.ioctl(self._fd, abi.KVM_PRE_FAULT_MEMORY, argument)
        except OSError as error:
            number = error.errno or 0
        gpa, size, _ = abi.PRE_FAULT_MEMORY.unpack(argument)
        return number, gpa, size

    def enter(self) -> int:
        """KVM_RUN; return the errno that it failed with, 0 where it did not."""
        try:
            fcntl.ioctl(self._fd, abi.KVM_RUN)
        except OSError as error:
            if error.errno not in {Errno.EFAULT, Errno.EHWPOISON}:
                raise
            return error.errno
        return 0

    def exit_reason(self) -> int:
        """Return exit_reason of struct kvm_run."""
        (reason,) = abi.RUN_EXIT_REASON.unpack_from(self._run)
        return int(reason)

    def exited(self, left: struct.Struct) -> tuple[int, ...]:
        """Return the part of struct kvm_run's union that an exit left."""
        return left.unpack_from(self._run, abi.RUN_UNION_OFFSET)

    def word_at(self, offset: int, size: int) -> int:
        """Return a number inside the pages of struct kvm_run."""
        return int.from_bytes(self._run[offset : offset + size], "little")

    def answer_mmio(self, value: int) -> None:
        """Put in what an MMIO read yields."""
        at = abi.RUN_UNION_OFFSET + abi.RUN_MMIO_DATA_OFFSET
        self._run[at : at + 8] = value.to_bytes(8, "little")

    def close(self) -> None:
        """Close it."""
        self._stack.close()


class VcpuExits:
    """KVM_RUN of one payload in a loop."""

    def __init__(self, vcpu: Vcpu, payload: Payload, memory: mmap.mmap) -> None:
        """`memory` is what the guest sees of the payload."""
        self._vcpu = vcpu
        self._steps = payload.steps
        self._memory = memory
        self._reported = 0
        self._resumed = True

    def exits(self) -> Iterator[Exit]:
        """Yield exits up to Halted, or until nobody resumes."""
        self._vcpu.start()
        while self._resumed:
            self._resumed = False
            number = self._vcpu.enter()
            left = self._exit(number)
            yield left
            if isinstance(left, Halted):
                return

    def resume(self, value: int = 0) -> None:
        """Enter the guest again."""
        if self._vcpu.exit_reason() == ExitReason.MMIO:
            self._vcpu.answer_mmio(value)
        self._resumed = True

    def _exit(self, number: int) -> Exit:
        results = self._results()
        match self._vcpu.exit_reason():
            case ExitReason.MEMORY_FAULT if number:
                flags, gpa, size = self._vcpu.exited(abi.RUN_MEMORY_FAULT)
                return MemoryFault(number, flags, gpa, size, results)
            case ExitReason.IO if not number:
                direction, size, port, _, at = self._vcpu.exited(abi.RUN_IO)
                assert direction == _IO_OUT, "programs read no port"
                return IoExit(port, self._vcpu.word_at(at, size), results)
            case ExitReason.MMIO if not number:
                gpa, _, length, is_write = self._vcpu.exited(abi.RUN_MMIO)
                return MmioExit(gpa, length, bool(is_write), results)
            case ExitReason.HLT if not number:
                return Halted(results)
            case reason:
                raise RuntimeError(f"KVM_RUN left with exit {reason}, errno {number}")

    def _results(self) -> tuple[Result, ...]:
        """Return what the reading instructions left, done since the last exit."""
        done = int.from_bytes(self._memory[_DONE : _DONE + 4], "little")
        steps = self._steps[self._reported : done]
        self._reported = done
        results = (self._result(instruction, at) for instruction, at in steps)
        return tuple(result for result in results if result is not None)

    def _result(self, instruction: Instruction, at: int) -> Result | None:
        match instruction:
            case Load(_, size):
                return Result(data=self._memory[at : at + size])
            case Verify(_, size, value):
                found = self._memory[at : at + size]
                return Result(count=size - found.count(bytes([value])))
            case _:
                return None
