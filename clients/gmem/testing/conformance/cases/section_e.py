"""E. private_mem_conversions_test of the first series.

Each vCPU has 2M + 4K of data at 4 GiB and up. `-g` is the test's option for shared
memory that comes from the guest_memfd itself; without it, from somewhere else.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from gmem.testing.conformance.guest import (
    Fill,
    Halted,
    HypercallExit,
    IoExit,
    MapGpaRange,
    Out,
    Verify,
)
from gmem.testing.conformance.kvm import (
    IN_PLACE,
    RFC_V1,
    Feature,
    HasFileno,
    Userspace,
)
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import ALL_SIZES, case
from gmem.testing.conformance.scene import GPA, CaseFailedError, Machine, Scene
from gmem.testing.conformance.toucher import Window
from gmem.uapi.flags import (
    KVM_GUEST_MEMFD_HUGETLB,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MEM_GUEST_MEMFD,
    VmType,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M

GUESTS: Final = (Feature.PRIVATE_MEMORY, Feature.GUESTS)
DATA: Final = SIZE_2M + PAGE_SIZE
IN_FILE: Final = "g"
"""The variant in which shared memory comes from the file, `-g`.

The source IN_PLACE is the same, and the kernel unmaps by itself.
"""
RANGES: Final = (
    (0, PAGE_SIZE),
    (0, SIZE_2M),
    (PAGE_SIZE, PAGE_SIZE),
    (PAGE_SIZE, SIZE_2M),
    (SIZE_2M, PAGE_SIZE),
)
VARIANTS: Final = ("anonymous", IN_FILE)
FALLOCATED: Final = tuple(f"{v}{a}" for v in VARIANTS for a in ("", "-fallocate"))
PORT: Final = 0x3F8


def aligned(size: int, to: int) -> int:
    """Round up."""
    return -(-size // to) * to


@dataclass
class Conversions:
    """The test's VM; each vCPU has a chunk, and DATA of it is used."""

    scene: Scene
    machine: Machine
    window: Window
    in_file: bool
    fallocate: bool
    chunk: int
    must_drop: bool = True
    """Whether the VMM has to drop its mappings before a conversion to private."""
    used: tuple[int, int] = (0, DATA)
    """Where in its data a vCPU writes."""

    def data(self, vcpu: int) -> tuple[int, int]:
        """Return where a vCPU writes, and how many bytes that is."""
        start, stop = self.used
        return vcpu * self.chunk + start, stop - start

    def start(self, vcpu: int = 0) -> None:
        """Guest fills 0xaa, host sees it and writes 0xcc, guest sees that."""
        expect, (at, size) = self.scene.expect, self.data(vcpu)
        guest = self.machine.guest
        (seen,) = guest(
            Fill(GPA + at, size, 0xAA), Verify(GPA + at, size, 0xAA), vcpu=vcpu
        )
        expect("guest load", "its own bytes", 0, seen.count)
        expect("host load", "bytes of the guest", 0, self.other(0xAA, at, size))
        expect("host fill", "shared", OK, self.window.fill(0xCC, at, size))
        (seen,) = guest(Verify(GPA + at, size, 0xCC), vcpu=vcpu)
        expect("guest load", "bytes of the host", 0, seen.count)

    def to_private(self, offset: int, size: int, vcpu: int = 0) -> None:
        """Guest writes 0x11 to a range and asks that it become private."""
        at = GPA + offset
        self.machine.guest(Fill(at, size, 0x11), vcpu=vcpu)
        self.map_gpa(offset, size, private=True, vcpu=vcpu)

    def map_gpa(self, offset: int, size: int, *, private: bool, vcpu: int = 0) -> None:
        """Have the guest make the hypercall and the VMM do what it is for."""
        npages = size // PAGE_SIZE
        call = MapGpaRange(GPA + offset, npages, private)
        (result,) = self.machine.guest(call, vcpu=vcpu, vmm=self.before_conversion)
        word = "private" if private else "shared"
        self.scene.expect("MAP_GPA_RANGE", f"to {word}", 0, result.value)

    def before_conversion(self, offset: int, size: int, private: bool) -> None:
        """Do what userspace must do before a conversion, and what it may."""
        file = self.machine.file
        if private and self.in_file and self.must_drop:
            self.window.dont_need(offset, size)
        if self.fallocate and private:
            file.allocate(offset, size)
        if self.fallocate and not private and not self.in_file:
            file.punch_hole(offset, size)

    def own_bytes(self, offset: int, size: int, value: int, vcpu: int = 0) -> None:
        """Guest writes a range and reads it back."""
        at = GPA + offset
        (seen,) = self.machine.guest(
            Fill(at, size, value), Verify(at, size, value), vcpu=vcpu
        )
        self.scene.expect("guest load", "its own bytes", 0, seen.count)

    def host_sees_old(self, offset: int, size: int, value: int) -> None:
        """Behind a private range: old shared bytes, or SIGBUS where there are none."""
        if not self.in_file:
            found = self.other(value, offset, size)
            self.scene.expect("host load", "beside private memory", 0, found)
            return
        fork = self.window.toucher.fork()
        died = self.window.of(fork).load(offset)
        self.scene.expect("host load", "private page", SIGBUS, died)

    def rest_is(self, offset: int, size: int, value: int, vcpu: int = 0) -> None:
        """Check the data outside a range of them."""
        at, used = self.data(vcpu)
        parts = [(at, offset), (offset + size, at + used)]
        program = [
            Verify(GPA + start, stop - start, value)
            for start, stop in parts
            if stop > start
        ]
        for seen in self.machine.guest(*program, vcpu=vcpu):
            self.scene.expect("guest load", "outside the range", 0, seen.count)

    def back(self, offset: int, size: int, vcpu: int = 0) -> None:
        """Make a range shared; 0x33 goes from guest to host, 0x44 back."""
        expect = self.scene.expect
        self.map_gpa(offset, size, private=False, vcpu=vcpu)
        self.machine.guest(Fill(GPA + offset, size, 0x33), vcpu=vcpu)
        found = self.other(0x33, offset, size)
        expect("host load", "shared again", 0, found)
        expect("host fill", "shared again", OK, self.window.fill(0x44, offset, size))
        (seen,) = self.machine.guest(Verify(GPA + offset, size, 0x44), vcpu=vcpu)
        expect("guest load", "shared again", 0, seen.count)

    def other(self, value: int, offset: int, size: int) -> object:
        """Count bytes that the host does not see as `value`."""
        return self.window.count_other(value, offset, size)


def conversions(
    scene: Scene,
    source: str,
    *,
    flags: int | None = None,
    vcpus: int = 1,
    slots: int = 1,
    fallocate: bool = False,
) -> Conversions:
    """Boot the test's VM: one file, bound by one or several memslots."""
    vm = scene.vm(VmType.SW_PROTECTED)
    chunk = aligned(DATA, max(SIZE_2M, scene.page_size))
    if flags is None:
        file = scene.memory(vm, vcpus * chunk // scene.page_size)
    else:
        file = scene.created(vm, vcpus * chunk, flags)
    in_file = source in {IN_FILE, IN_PLACE}
    side: HasFileno = file if in_file else scene.memfd(file.size)
    size = file.size // slots
    for slot in range(slots):
        vm.set_user_memory_region2(
            slot=slot,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA + slot * size,
            memory_size=size,
            userspace=Userspace(side, slot * size),
            guest_memfd=file,
            guest_memfd_offset=slot * size,
        )
    machine = Machine(scene, vm, file)
    machine.boot(vcpus)
    window = scene.toucher(side).map(file.size)
    if source == "anonymous_thp":
        window.madvise(mmap.MADV_HUGEPAGE)
    must_drop = source != IN_PLACE
    return Conversions(scene, machine, window, in_file, fallocate, chunk, must_drop)


def _of_variant(scene: Scene) -> Conversions:
    source, _, allocate = scene.variant.partition("-")
    return conversions(scene, source, fallocate=bool(allocate))


@case("C047", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=VARIANTS, needs=GUESTS)
def memory_starts_shared(scene: Scene) -> None:
    """Memory starts shared: host and guest see each other's bytes."""
    _of_variant(scene).start()


@case(
    "C048", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=FALLOCATED, needs=GUESTS
)
def ranges_become_private(scene: Scene) -> None:
    """Five ranges, with and without fallocate: MAP_GPA_RANGE to private returns 0."""
    test = _of_variant(scene)
    for offset, size in RANGES:
        test.to_private(offset, size)
        test.map_gpa(offset, size, private=False)


def _four_k(test: Conversions) -> Iterator[tuple[int, int]]:
    """Make the 4K ranges private in turn; each is shared again afterwards."""
    for offset, size in RANGES:
        if size == PAGE_SIZE:
            test.start()
            test.to_private(offset, size)
            yield offset, size
            test.map_gpa(offset, size, private=False)


@case("C049", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=VARIANTS, needs=GUESTS)
def private_bytes_are_the_guest_s(scene: Scene) -> None:
    """Private 4K: the guest reads what it wrote; the host old bytes, -g: SIGBUS."""
    test = _of_variant(scene)
    for offset, size in _four_k(test):
        test.own_bytes(offset, size, 0x22)
        test.host_sees_old(offset, size, 0x11)


@case("C050", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=VARIANTS, needs=GUESTS)
def the_rest_stays(scene: Scene) -> None:
    """Outside a private 4K range the guest reads what the host wrote."""
    test = _of_variant(scene)
    for offset, size in _four_k(test):
        test.rest_is(offset, size, 0xCC)


@case("C051", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=VARIANTS, needs=GUESTS)
def odd_pages_become_shared(scene: Scene) -> None:
    """Of two private pages the odd one becomes shared: both see it, as ever."""
    test = _of_variant(scene)
    test.start()
    test.to_private(0, 2 * PAGE_SIZE)
    odd = PAGE_SIZE
    test.map_gpa(odd, PAGE_SIZE, private=False)
    # Memory of its own kept the bytes; that of the file was zeroed.
    old = 0x00 if test.in_file else 0x11
    found = test.other(old, odd, PAGE_SIZE)
    scene.expect("host load", "odd page, shared", 0, found)
    scene.expect("host fill", "odd page", OK, test.window.fill(0x33, odd, PAGE_SIZE))
    (seen,) = test.machine.guest(Verify(GPA + odd, PAGE_SIZE, 0x33))
    scene.expect("guest load", "odd page", 0, seen.count)
    test.host_sees_old(0, PAGE_SIZE, 0x11)


@case("C052", lineages=(RFC_V1,), page_sizes=ALL_SIZES, variants=VARIANTS, needs=GUESTS)
def whole_ranges_become_shared(scene: Scene) -> None:
    """Private ranges to shared again: host and guest see each other's bytes."""
    test = _of_variant(scene)
    test.start()
    for offset, size in RANGES:
        test.to_private(offset, size)
        test.back(offset, size)


@case("C055", lineages=(RFC_V1,), needs=GUESTS)
def exits_of_a_converting_guest(scene: Scene) -> None:
    """A guest that converts exits with HYPERCALL and IO alone; nr is MAP_GPA_RANGE."""
    machine = conversions(scene, "anonymous").machine
    program = (
        Fill(GPA, PAGE_SIZE, 1),
        Out(PORT, 1),
        MapGpaRange(GPA, 1, private=True),
        Fill(GPA, PAGE_SIZE, 2),
        Out(PORT, 2),
        MapGpaRange(GPA, 1, private=False),
    )
    seen: list[str] = []
    with machine.vm.run(program) as run:
        for left in run.exits():
            match left:
                case HypercallExit():
                    seen.append(f"HYPERCALL {left.nr}")
                    run.resume(machine.hypercall(left))
                case IoExit():
                    seen.append(f"IO {left.value}")
                    run.resume()
                case Halted():
                    break
                case _:
                    raise CaseFailedError(f"KVM_RUN left with {left}")
    call = f"HYPERCALL {KVM_HC_MAP_GPA_RANGE}"
    want = ["IO 1", call, "IO 2", call]
    scene.expect("KVM_RUN", "exits", " ".join(want), " ".join(seen))


@case("C057", lineages=(RFC_V1,))
def slots_divide_the_file(scene: Scene) -> None:
    """A file is bound by as many slots as divide it; others are EINVAL."""
    for slots, want in ((4, OK), (3, "EINVAL")):
        vm = scene.vm()
        file = scene.memory(vm, 4)
        size = file.size // slots
        for slot in range(slots):
            bind = partial(
                vm.set_user_memory_region2,
                slot=slot,
                flags=KVM_MEM_GUEST_MEMFD,
                guest_phys_addr=GPA + slot * size,
                memory_size=size,
                guest_memfd=file,
                guest_memfd_offset=slot * size,
            )
            condition = f"slot {slot} of {slots} over 4 pages"
            scene.expect_call("SET_USER_MEMORY_REGION2", condition, want, bind)


# The matrix of the test's script.

SOURCES: Final = ("anonymous", "anonymous_thp", "shmem")
OF_THE_MACHINE: Final = (
    "anonymous_hugetlb",
    "anonymous_hugetlb_2mb",
    "anonymous_hugetlb_1gb",
    "shared_hugetlb",
)
PRIVATE: Final = ("guest_mem", "hugetlb", "hugetlb_2mb", "hugetlb_1gb")
SIZE_OF: Final = dict(zip(PRIVATE, (*ALL_SIZES[:2], *ALL_SIZES[1:]), strict=True))
SHAPES: Final = ("1slot", "4slots", "1slot-g", "4slots-g")
VCPUS: Final = 4
AROUND_2M: Final = (SIZE_2M - 8 * PAGE_SIZE, DATA)
"""All of it 48 times would be hours of single pages, and tell no more."""


def _rows(sources: tuple[str, ...], private: str) -> tuple[str, ...]:
    return tuple(
        f"{source}-{private}-{shape}" for source in sources for shape in SHAPES
    )


def matrix(scene: Scene) -> None:
    """Four vCPUs at once, for each kind of shared and private memory and slots."""
    source, private, slots, *in_file = scene.variant.split("-")
    test = conversions(
        scene,
        IN_FILE if in_file else source,
        flags=KVM_GUEST_MEMFD_HUGETLB if private == "hugetlb" else None,
        vcpus=VCPUS,
        slots=int(slots[0]),
        fallocate=True,
    )
    test.used = AROUND_2M
    failures: list[BaseException] = []

    def one(vcpu: int) -> None:
        try:
            start, size = test.data(vcpu)
            at, part = start + PAGE_SIZE, size - 2 * PAGE_SIZE
            test.start(vcpu)
            test.to_private(at, part, vcpu)
            test.own_bytes(at, part, 0x22, vcpu)
            test.rest_is(at, part, 0xCC, vcpu)
            test.back(at, part, vcpu)
        except BaseException as failure:  # noqa: BLE001 - raised again below
            failures.append(failure)

    threads = [threading.Thread(target=one, args=(vcpu,)) for vcpu in range(VCPUS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


for _private, _size in SIZE_OF.items():
    for _sources, _needs in (
        (SOURCES, GUESTS),
        (OF_THE_MACHINE, (*GUESTS, Feature.MACHINE_HUGE_PAGES)),
    ):
        case(
            "C058",
            lineages=(RFC_V1,),
            page_sizes=(_size,),
            variants=_rows(_sources, _private),
            needs=_needs,
        )(matrix)
