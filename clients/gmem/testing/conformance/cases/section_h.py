"""H. guest_memfd_test of mainline: the flags MMAP and INIT_SHARED, and memory policies.

What these lines say of mapping and touching holds for older lineages too, where they
have such a file.
"""

from __future__ import annotations

import mmap
from functools import partial
from typing import Final

from gmem.testing.conformance.guest import Fill, Verify
from gmem.testing.conformance.kvm import (
    IN_PLACE,
    LINEAGES,
    MAINLINE,
    RFC_V2,
    Feature,
    Userspace,
)
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import ALL_SIZES, case
from gmem.testing.conformance.scene import GPA, Scene
from gmem.testing.conformance.toucher import Window
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    Capability,
    VmType,
)
from gmem.uapi.pages import PAGE_SIZE

PAGES: Final = 4
LATEST: Final = (MAINLINE, IN_PLACE)
MADV_COLLAPSE: Final = 25
MPOL_DEFAULT, MPOL_BIND, MPOL_INTERLEAVE, MPOL_NONE = 0, 2, 3, 999
FLAG_BITS: Final = 64


def samples(window: Window, page: int) -> list[int]:
    """Return offsets of the first and last 4K of each page of a window."""
    starts = range(0, window.length, page)
    return sorted({at for one in starts for at in (one, one + page - PAGE_SIZE)})


def fill(scene: Scene, window: Window, value: int) -> None:
    """Write the sampled pages, and read them back."""
    for at in samples(window, scene.page_size):
        scene.expect("store", "shared", OK, window.fill(value, at, PAGE_SIZE))
        other = window.count_other(value, at, PAGE_SIZE)
        scene.expect("load", "shared", 0, other)


@case("C068", lineages=(MAINLINE,))
def single_flags(scene: Scene) -> None:
    """Each single flag bit: a file where the capability has it, else EINVAL."""
    vm = scene.vm(VmType.DEFAULT)
    known = vm.check_extension(Capability.GUEST_MEMFD_FLAGS)
    for bit in range(FLAG_BITS):
        want = OK if known >> bit & 1 else "EINVAL"
        create = partial(scene.created, vm, PAGE_SIZE, 1 << bit)
        scene.expect_call("KVM_CREATE_GUEST_MEMFD", f"flag bit {bit}", want, create)


@case(
    "C071",
    lineages=(*LATEST, RFC_V2),
    page_sizes=ALL_SIZES,
    variants=("page", "all"),
)
def no_mmap_without_the_flag(scene: Scene) -> None:
    """A file that may not be mapped: mmap fails with ENODEV."""
    assert scene.dialect.plain is not None
    file = scene.memory(scene.vm(), PAGES, scene.dialect.plain)
    length = file.size if scene.variant == "all" else PAGE_SIZE
    toucher = scene.toucher(file)
    scene.expect_call("mmap", "no MMAP", "ENODEV", partial(toucher.map, length))


@case("C072", lineages=LINEAGES, page_sizes=ALL_SIZES)
def no_private_mapping(scene: Scene) -> None:
    """mmap MAP_PRIVATE: EINVAL."""
    file = scene.memory(scene.vm(), PAGES)
    do = partial(scene.toucher(file).map, file.size, flags=mmap.MAP_PRIVATE)
    scene.expect_call("mmap", "MAP_PRIVATE", "EINVAL", do)


def fill_and_punch(scene: Scene) -> None:
    """Filled, and its first page punched: that one is 0, others stay; refill is ok."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    fill(scene, window, 0xAA)
    page = scene.page_size
    punch = partial(machine.file.punch_hole, 0, page)
    scene.expect_call("punch hole", "first page", OK, punch)
    for at in samples(window, page):
        value = 0 if at < page else 0xAA
        where = "punched page" if at < page else "other page"
        scene.expect("load", where, 0, window.count_other(value, at, PAGE_SIZE))
    fill(scene, window, 0x55)


case("C073", lineages=LATEST, page_sizes=ALL_SIZES)(fill_and_punch)
case("C081", lineages=(RFC_V2,), page_sizes=ALL_SIZES)(fill_and_punch)


@case("C074", lineages=LINEAGES, page_sizes=ALL_SIZES)
def past_the_end(scene: Scene) -> None:
    """Mapped four times as long: past the end SIGBUS, inside the bytes stay."""
    machine = scene.machine(PAGES)
    toucher = scene.toucher(machine.file)
    window = toucher.map(PAGES * machine.file.size)
    scene.expect("store", "inside", OK, window.store(0, b"A"))
    for at in (machine.file.size, window.length - 1):
        fork = window.of(toucher.fork())
        scene.expect("load", "past i_size", SIGBUS, fork.load(at))
    scene.expect("load", "inside", b"A", window.load(0))
    scene.expect("store", "past i_size", SIGBUS, window.store(machine.file.size, b"A"))


def private_from_the_start(scene: Scene) -> None:
    """A file that can be mapped and starts private: every touch is SIGBUS."""
    machine = scene.machine(PAGES, flags=scene.dialect.private)
    window = scene.window(machine.file)
    for at in samples(window, scene.page_size):
        fork = window.of(window.toucher.fork())
        scene.expect("load", "starts private", SIGBUS, fork.load(at))
    scene.expect("store", "starts private", SIGBUS, window.store(0, b"A"))


case("C075", lineages=LATEST, page_sizes=ALL_SIZES)(private_from_the_start)
case("C082", lineages=(RFC_V2,), page_sizes=ALL_SIZES)(private_from_the_start)


@case("C076", lineages=LATEST, page_sizes=ALL_SIZES, needs=(Feature.NUMA,))
def policies_are_kept(scene: Scene) -> None:
    """mbind of a range is what get_mempolicy says; policy 999 is EINVAL."""
    file = scene.memory(scene.vm(), PAGES)
    window = scene.window(file)

    def policy(condition: str, want: tuple[int, int], offset: int = 0) -> None:
        mode, nodes = file.get_mempolicy(window, offset)
        words = f"{mode} {nodes:#b}"
        scene.expect("get_mempolicy", condition, f"{want[0]} {want[1]:#b}", words)

    page = scene.page_size
    first = range(page)
    policy("never set", (MPOL_DEFAULT, 0))
    for mode, nodes in ((MPOL_INTERLEAVE, 0b11), (MPOL_BIND, 0b10)):
        file.mbind(window, mode, nodes, first)
        policy("set", (mode, nodes))
    policy("another page", (MPOL_DEFAULT, 0), page)
    file.mbind(window, MPOL_DEFAULT, 0, first)
    policy("reset", (MPOL_DEFAULT, 0))
    wrong = partial(file.mbind, window, MPOL_NONE, 0b1, first)
    scene.expect_call("mbind", "policy 999", "EINVAL", wrong)


@case("C077", lineages=LATEST, page_sizes=ALL_SIZES, needs=(Feature.NUMA,))
def policies_place_pages(scene: Scene) -> None:
    """Pages land on the bound nodes; a later policy moves none, a punch does."""
    file = scene.machine(PAGES).file
    window, page = scene.window(file), scene.page_size
    offsets = range(0, file.size, page)

    def bind(*nodes: int) -> None:
        for at, node in zip(offsets, nodes, strict=True):
            file.mbind(window, MPOL_BIND, 1 << node, range(at, at + page))

    def nodes_are(condition: str, *want: int) -> None:
        # A load may map neighbours too: each page is written.
        for at in offsets:
            window.store(at, b"A")
        found = [file.node_of(window, at) for at in offsets]
        scene.expect("node of a page", condition, list(want), found)

    bind(1, 1, 0, 0)
    nodes_are("policy set before", 1, 1, 0, 0)
    bind(0, 0, 1, 1)
    nodes_are("policy set later", 1, 1, 0, 0)
    file.punch_hole(0, file.size)
    nodes_are("punched, policy set before", 0, 0, 1, 1)


@case("C078", lineages=LINEAGES)
def advice(scene: Scene) -> None:
    """MADV_HUGEPAGE: 0; MADV_COLLAPSE: EINVAL; DONTNEED, then the bytes are there."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.fill(0xAA)
    huge = partial(window.madvise, mmap.MADV_HUGEPAGE)
    scene.expect_call("madvise", "HUGEPAGE", OK, huge)
    collapse = partial(window.madvise, MADV_COLLAPSE)
    scene.expect_call("madvise", "COLLAPSE", "EINVAL", collapse)
    scene.expect_call("madvise", "DONTNEED", OK, window.dont_need)
    scene.expect("load", "after DONTNEED", 0, window.count_other(0xAA))


@case("C079", lineages=LATEST, needs=(Feature.GUESTS,))
def a_default_vm_shares(scene: Scene) -> None:
    """Host writes 0xaa and unmaps; guest reads it and writes 0xff; host sees that."""
    vm = scene.vm(VmType.DEFAULT)
    known = vm.check_extension(Capability.GUEST_MEMFD_FLAGS)
    wanted = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    scene.expect("KVM_CAP_GUEST_MEMFD_FLAGS", "default VM", wanted, known & wanted)
    machine = scene.machine(PAGES, vm_type=VmType.DEFAULT, userspace=Userspace)
    machine.boot()
    toucher = scene.toucher(machine.file)
    window = toucher.map(machine.file.size)
    window.fill(0xAA)
    window.munmap()
    size = machine.file.size
    (seen,) = machine.guest(Verify(GPA, size, 0xAA), Fill(GPA, size, 0xFF))
    scene.expect("guest load", "bytes of the host", 0, seen.count)
    found = toucher.map(size).count_other(0xFF)
    scene.expect("host load", "bytes of the guest", 0, found)
