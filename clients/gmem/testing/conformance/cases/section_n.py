"""N. Huge pages of the in-place conversion, as its branch for them has it.

No selftest of the branch is known: these lines are what the functions do that the list
names. What huge pages repeat of older lines has the numbers of those.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Final

from gmem.testing.conformance.cases.section_d import Reporting
from gmem.testing.conformance.cases.section_j import (
    GUESTS,
    TO_PRIVATE,
    TO_SHARED,
    converted,
    guest_byte,
    guest_writes,
)
from gmem.testing.conformance.kvm import IN_PLACE, Feature, GuestMemfd
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import ALL_SIZES, HUGE, case
from gmem.testing.conformance.scene import Scene
from gmem.testing.conformance.toucher import Window
from gmem.testing.conformance.vm_types import VM_TYPES
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    IN_PLACE_HUGE_PAGES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_ATTRIBUTES2_FORMAT,
    KVM_SET_MEMORY_ATTRIBUTES2,
    VmType,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M, order_of

CREATE: Final = "KVM_CREATE_GUEST_MEMFD"
CONVERT: Final = "KVM_SET_MEMORY_ATTRIBUTES2"
HUGETLB, INIT_SHARED = IN_PLACE_HUGE_PAGES, GUEST_MEMFD_FLAG_INIT_SHARED
MMAP, PRIVATE = GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE
NO_POOL: Final = (1, order_of(SIZE_2M) - 1, order_of(SIZE_2M) + 1, 63)
"""Orders of which no machine has huge pages."""
HOLDS: Final = ("pin", "reference")
WORDS: Final = 16
FLAGS, ERROR_OFFSET, RESERVED = 3, 4, 5
"""Places in struct kvm_memory_attributes2, behind offset, size and attributes."""
INSIDE: Final = 7 * PAGE_SIZE
"""A page inside a huge page, neither its first nor its last."""


def ioctl(
    file: GuestMemfd,
    offset: int,
    size: int,
    attributes: int = PRIVATE,
    others: dict[int, int] | None = None,
) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES2 with exactly these words."""
    words = [offset, size, attributes, *[0] * (WORDS - 3)]
    for place, word in (others or {}).items():
        words[place] = word
    file.ioctl(
        KVM_SET_MEMORY_ATTRIBUTES2,
        bytearray(struct.pack(KVM_MEMORY_ATTRIBUTES2_FORMAT, *words)),
    )


def dies(window: Window, offset: int) -> object:
    """Load in a child, which may die of it."""
    return window.of(window.toucher.fork()).load(offset)


@case("C113", lineages=(IN_PLACE,), page_sizes=HUGE, variants=tuple(VM_TYPES))
def flags_and_page_order(scene: Scene) -> None:
    """HUGETLB with the order of a pool: a file; others, or INIT_SHARED: EINVAL."""
    vm, size = scene.vm(VM_TYPES[scene.variant]), scene.page_size
    order = order_of(size)
    asked = [
        ("HUGETLB", HUGETLB, order, OK),
        ("HUGETLB, MMAP", HUGETLB | MMAP, order, OK),
        ("HUGETLB, INIT_SHARED", HUGETLB | INIT_SHARED, order, "EINVAL"),
        ("HUGETLB, MMAP, INIT_SHARED", HUGETLB | MMAP | INIT_SHARED, order, "EINVAL"),
        ("an order without HUGETLB", 0, order, "EINVAL"),
        ("an order without HUGETLB, MMAP", MMAP, order, "EINVAL"),
        ("HUGETLB, order 0", HUGETLB, 0, "EINVAL"),
        *((f"HUGETLB, order {wrong}", HUGETLB, wrong, "EINVAL") for wrong in NO_POOL),
    ]
    for condition, flags, of, want in asked:
        create = partial(scene.created, vm, size, flags, of)
        scene.expect_call(CREATE, condition, want, create)


@case("C114", lineages=(IN_PLACE,), page_sizes=HUGE, variants=tuple(VM_TYPES))
def sizes_of_huge_pages(scene: Scene) -> None:
    """A size that is no multiple of the huge page, though one of 4K: EINVAL."""
    vm, page = scene.vm(VM_TYPES[scene.variant]), scene.page_size
    for size in (PAGE_SIZE, page - PAGE_SIZE, page + PAGE_SIZE, page + page // 2):
        create = partial(scene.created, vm, size, scene.flags(MMAP))
        scene.expect_call(CREATE, f"size {size:#x}", "EINVAL", create)


@case("C115", lineages=(IN_PLACE,), page_sizes=HUGE)
def parts_of_huge_pages(scene: Scene) -> None:
    """fallocate and PUNCH_HOLE of a part of a huge page: EINVAL each."""
    machine, page = scene.machine(2), scene.page_size
    file, host = machine.file, scene.window(machine.file)
    host.store(0, b"A")
    parts = [(0, PAGE_SIZE), (PAGE_SIZE, page), (0, page + PAGE_SIZE), (page, INSIDE)]
    for offset, size in parts:
        where = f"({offset:#x}, {size:#x})"
        allocate = partial(file.allocate, offset, size)
        scene.expect_call("fallocate", where, "EINVAL", allocate)
        punch = partial(file.punch_hole, offset, size)
        scene.expect_call("punch hole", where, "EINVAL", punch)
    scene.expect("load", "after the refusals", b"A", host.load(0))


@case("C116", lineages=(IN_PLACE,), page_sizes=ALL_SIZES)
def words_of_the_ioctl(scene: Scene) -> None:
    """Wrong words of KVM_SET_MEMORY_ATTRIBUTES2: EINVAL each, and nothing changes."""
    machine = scene.machine(2)
    file, host = machine.file, scene.window(machine.file)
    host.store(0, b"A")
    end, last = file.size, (1 << 64) - PAGE_SIZE
    wrong = {
        "flags": partial(ioctl, file, 0, PAGE_SIZE, others={FLAGS: 1}),
        "reserved": partial(ioctl, file, 0, PAGE_SIZE, others={RESERVED: 1}),
        "last reserved": partial(ioctl, file, 0, PAGE_SIZE, others={WORDS - 1: 1}),
        "attributes": partial(ioctl, file, 0, PAGE_SIZE, PRIVATE | 1),
        "size 0": partial(ioctl, file, 0, 0),
        "wraps": partial(ioctl, file, last, 2 * PAGE_SIZE),
        "offset unaligned": partial(ioctl, file, 1, PAGE_SIZE),
        "size unaligned": partial(ioctl, file, 0, PAGE_SIZE - 1),
        "at i_size": partial(ioctl, file, end, PAGE_SIZE),
        "past i_size": partial(ioctl, file, PAGE_SIZE, end),
    }
    for condition, do in wrong.items():
        scene.expect_call(CONVERT, condition, "EINVAL", do)
    scene.expect("load", "after the refusals", b"A", host.load(0))
    written = partial(ioctl, file, 0, PAGE_SIZE, others={ERROR_OFFSET: 5})
    scene.expect_call(CONVERT, "error_offset written before", OK, written)
    default = scene.vm(VmType.DEFAULT)
    other = scene.created(default, file.size, scene.flags(MMAP))
    do = partial(ioctl, other, 0, PAGE_SIZE, 0)
    scene.expect_call(CONVERT, "a VM without private memory", "EINVAL", do)


@case("C117", lineages=(IN_PLACE,), page_sizes=HUGE, needs=GUESTS)
def one_page_of_a_private_huge_page(scene: Scene) -> None:
    """A 4K page of a private huge page becomes shared: others stay, and all bytes."""
    machine, page = scene.machine(flags=scene.dialect.private), scene.page_size
    machine.boot()
    host = scene.window(machine.file)
    bytes_at = {0: b"A", INSIDE: b"B", INSIDE + PAGE_SIZE: b"C", page - 1: b"D"}
    for at, data in bytes_at.items():
        guest_writes(machine, at, data)
    converted(machine, INSIDE, PAGE_SIZE, private=False)
    scene.expect("load", "made shared", b"B", host.load(INSIDE))
    for at, data in bytes_at.items():
        scene.expect("guest load", "one page is shared", data, guest_byte(machine, at))
        if at != INSIDE:
            scene.expect("load", "beside a shared page", SIGBUS, dies(host, at))
    converted(machine, INSIDE, PAGE_SIZE, private=True)
    for at, data in bytes_at.items():
        scene.expect("guest load", "all private again", data, guest_byte(machine, at))
    scene.expect("load", "private again", SIGBUS, dies(host, INSIDE))


@case("C118", lineages=(IN_PLACE,), page_sizes=HUGE, needs=GUESTS)
def across_two_huge_pages(scene: Scene) -> None:
    """A range across two huge pages: its two 4K pages alone change, either way."""
    machine, page = scene.machine(2), scene.page_size
    machine.boot()
    host = scene.window(machine.file)
    last, first = page - PAGE_SIZE, page
    changed = {last: b"B", first: b"C"}
    others = {last - PAGE_SIZE: b"A", first + PAGE_SIZE: b"D"}
    for at, data in (changed | others).items():
        host.store(at, data)
    converted(machine, last, 2 * PAGE_SIZE, private=True)
    for at, data in others.items():
        scene.expect("load", "beside a private page", data, host.load(at))
    for at, data in changed.items():
        scene.expect("guest load", "private", data, guest_byte(machine, at))
        scene.expect("load", "private page", SIGBUS, dies(host, at))
    converted(machine, last, 2 * PAGE_SIZE, private=False)
    for at, data in (changed | others).items():
        scene.expect("load", "all shared again", data, host.load(at))


@case(
    "C119",
    lineages=(IN_PLACE,),
    page_sizes=HUGE,
    variants=HOLDS,
    needs=(*GUESTS, Feature.PINS),
)
def what_was_done_stays(scene: Scene) -> None:
    """Of three huge pages the second is held: the first is private, the rest shared.

    EAGAIN and the offset of the page that is held; let go, the same call does the rest.
    """
    machine, page = scene.machine(3), scene.page_size
    machine.boot()
    file, host = machine.file, scene.window(machine.file)
    for at, data in ((0, b"A"), (page, b"B"), (2 * page, b"C")):
        host.store(at, data)
    at = page + INSIDE
    with file.pin(at, PAGE_SIZE, plain=scene.variant == "reference"):
        got = machine.convert(0, file.size, private=True)
        want = f"EAGAIN error_offset={at:#x}"
        scene.expect(TO_PRIVATE, "the second huge page is held", want, got)
        scene.expect("load", "before the held one", SIGBUS, dies(host, 0))
        scene.expect("guest load", "before the held one", b"A", guest_byte(machine, 0))
        scene.expect("load", "the held one", b"B", host.load(page))
        scene.expect("load", "behind the held one", b"C", host.load(2 * page))
        # The part of the held huge page before the page that is held can be had.
        converted(machine, page, INSIDE, private=True)
    converted(machine, 0, file.size, private=True)
    for at, data in ((0, b"A"), (page, b"B"), (2 * page, b"C")):
        scene.expect("guest load", "all private", data, guest_byte(machine, at))
        scene.expect("load", "all private", SIGBUS, dies(host, at))


@case(
    "C120",
    lineages=(IN_PLACE,),
    page_sizes=ALL_SIZES,
    variants=HOLDS,
    needs=(Feature.PINS,),
)
def nothing_to_do(scene: Scene) -> None:
    """What is so already: 0, whoever holds it, and nobody loses a mapping or a byte."""
    machine = scene.machine()
    file, host = machine.file, scene.window(machine.file)
    host.store(0, b"A")
    with file.pin(0, PAGE_SIZE, plain=scene.variant == "reference"):
        got = machine.convert(0, file.size, private=False)
        scene.expect(TO_SHARED, "shared already, held", OK, got)
        scene.expect("load", "shared already", b"A", host.load(0))
    for _ in range(2):
        converted(machine, 0, file.size, private=True)
    converted(machine, 0, file.size, private=False)
    scene.expect("load", "shared again", b"A", scene.window(file).load(0))


@case("C121", lineages=(IN_PLACE,), page_sizes=HUGE, needs=(Feature.POOLS,))
def conversions_move_no_counter(scene: Scene) -> None:
    """Split and merged to and fro: the pools count one page that is allocated."""
    pools = Reporting(scene)
    machine = scene.machine()
    file = machine.file
    pools.expect("created", free=0, resv=1)
    file.allocate(0, file.size)
    pools.expect("allocated, shared", free=-1, resv=0)
    for private in (True, False):
        converted(machine, INSIDE, PAGE_SIZE, private=private)
        pools.expect(f"one page, private={private}", free=-1, resv=0)
        converted(machine, 0, file.size, private=private)
        pools.expect(f"all pages, private={private}", free=-1, resv=0)
    file.punch_hole(0, file.size)
    pools.expect("punched", free=0, resv=1)


@case(
    "C122",
    lineages=(IN_PLACE,),
    page_sizes=HUGE,
    variants=HOLDS,
    needs=(Feature.PINS, Feature.POOLS),
)
def punch_of_what_is_held(scene: Scene) -> None:
    """PUNCH_HOLE of two huge pages, the second is held: EAGAIN, and both are there."""
    pools = Reporting(scene)
    machine, page = scene.machine(2), scene.page_size
    file, host = machine.file, scene.window(machine.file)
    punch = partial(file.punch_hole, 0, file.size)
    for at, data in ((0, b"A"), (page, b"B")):
        host.store(at, data)
    with file.pin(page + INSIDE, PAGE_SIZE, plain=scene.variant == "reference"):
        scene.expect_call("punch hole", "the second page is held", "EAGAIN", punch)
        pools.expect("the second page is held", free=-2, resv=0)
        for at, data in ((0, b"A"), (page, b"B")):
            scene.expect("load", "after a refused punch", data, host.load(at))
    scene.expect_call("punch hole", "nobody holds it", OK, punch)
    pools.expect("punched", free=0, resv=2)
    for at in (0, page):
        scene.expect("load", "punched, shared", b"\0", host.load(at))


@case("C123", lineages=(IN_PLACE,), page_sizes=ALL_SIZES)
def blocks_of_the_file(scene: Scene) -> None:
    """The first touch of 4K takes the whole huge page: st_blocks has all of it."""
    machine, page = scene.machine(2), scene.page_size
    file, host = machine.file, scene.window(machine.file)
    scene.expect("fstat", "st_blocks, created", 0, file.fstat().st_blocks)
    host.store(page, b"A")
    scene.expect("fstat", "st_blocks, one page", page // 512, file.fstat().st_blocks)
    converted(machine, 0, file.size, private=True)
    scene.expect("fstat", "st_blocks, private", page // 512, file.fstat().st_blocks)
    file.punch_hole(page, page)
    scene.expect("fstat", "st_blocks, punched", 0, file.fstat().st_blocks)
