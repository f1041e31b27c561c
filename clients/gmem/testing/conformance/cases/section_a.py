"""A. guest_memfd_test: the file by itself, then bound to a memslot.

Lines 70 (the newer selftest) repeat those of the file by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from gmem.testing.conformance.kvm import (
    IN_PLACE,
    LINEAGES,
    MAINLINE,
    RFC_V1,
    RFC_V2,
    Feature,
    GuestMemfd,
)
from gmem.testing.conformance.outcomes import OK, SIGBUS, outcome_of
from gmem.testing.conformance.registry import ALL_SIZES, Body, case
from gmem.testing.conformance.scene import GPA, Scene
from gmem.uapi.pages import PAGE_SIZE

PAGES: Final = 4
SERIES: Final = (RFC_V1, RFC_V2)
FAILS: Final = "fails"
PRIVATE_MEMORY: Final = (Feature.PRIVATE_MEMORY,)


def file_of(scene: Scene) -> GuestMemfd:
    """Make the file of these lines: four pages, not bound."""
    return scene.memory(scene.vm(), PAGES)


def read_and_write(scene: Scene) -> None:
    """read, write, pread, pwrite on the file: each fails."""
    file = file_of(scene)
    fd = file.fileno()
    calls: Mapping[str, Callable[[], object]] = {
        "read": partial(os.read, fd, 1),
        "write": partial(os.write, fd, b"A"),
        "pread": partial(os.pread, fd, 1, 0),
        "pwrite": partial(os.pwrite, fd, b"A", 0),
    }
    for call, do in calls.items():
        got = outcome_of(do)
        scene.expect(call, "on the file", FAILS, got if got == OK else FAILS)


def stat_of_the_file(scene: Scene) -> None:
    """fstat: st_size as created, st_blksize the page size."""
    found = file_of(scene).fstat()
    scene.expect("fstat", "st_size", PAGES * scene.page_size, found.st_size)
    scene.expect("fstat", "st_blksize", scene.page_size, found.st_blksize)


def allocate_all(scene: Scene) -> None:
    """fallocate(KEEP_SIZE) of the whole file: 0."""
    file = file_of(scene)
    scene.expect_call(
        "fallocate", "whole file", OK, lambda: file.allocate(0, file.size)
    )


def punch_unaligned_offset(scene: Scene) -> None:
    """PUNCH_HOLE one byte before the second page: EINVAL."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "punch hole",
        "offset unaligned",
        "EINVAL",
        lambda: file.punch_hole(page - 1, page),
    )


def allocate_at_the_end(scene: Scene) -> None:
    """Allocating at i_size: EINVAL."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "fallocate", "at i_size", "EINVAL", lambda: file.allocate(file.size, page)
    )


def allocate_past_the_end(scene: Scene) -> None:
    """Allocating one page behind i_size: EINVAL."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "fallocate",
        "past i_size",
        "EINVAL",
        lambda: file.allocate(file.size + page, page),
    )


def punch_at_the_end(scene: Scene) -> None:
    """PUNCH_HOLE at i_size: 0."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "punch hole", "at i_size", OK, lambda: file.punch_hole(file.size, page)
    )


def punch_past_the_end(scene: Scene) -> None:
    """PUNCH_HOLE one page behind i_size: 0."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "punch hole", "past i_size", OK, lambda: file.punch_hole(file.size + page, page)
    )


def punch_unaligned_length(scene: Scene) -> None:
    """PUNCH_HOLE of a page less one byte: EINVAL."""
    file, page = file_of(scene), scene.page_size
    scene.expect_call(
        "punch hole",
        "length unaligned",
        "EINVAL",
        lambda: file.punch_hole(page, page - 1),
    )


def punch_a_page(scene: Scene) -> None:
    """PUNCH_HOLE of an allocated page: 0."""
    file, page = file_of(scene), scene.page_size
    file.allocate(0, file.size)
    scene.expect_call("punch hole", "one page", OK, lambda: file.punch_hole(page, page))


def allocate_a_punched_page(scene: Scene) -> None:
    """Allocating a page that was punched: 0."""
    file, page = file_of(scene), scene.page_size
    file.allocate(0, file.size)
    file.punch_hole(page, page)
    scene.expect_call(
        "fallocate", "punched page", OK, lambda: file.allocate(page, page)
    )


def punch_unaligned(scene: Scene) -> None:
    """PUNCH_HOLE with an offset or a length that is no multiple: EINVAL each."""
    file, p = file_of(scene), scene.page_size
    ranges = [(0, 1), (0, p - 1), (0, p + 1), (1, 1), (1, p - 1), (1, p), (1, p + 1)]
    for offset, length in [*ranges, (p, 1), (p, p - 1), (p, p + 1)]:
        punch = partial(file.punch_hole, offset, length)
        scene.expect_call("punch hole", f"({offset}, {length})", "EINVAL", punch)


def two_files(scene: Scene) -> None:
    """Two files have sizes and inode numbers of their own."""
    vm, page = scene.vm(), scene.page_size
    one = scene.memory(vm, 1)
    first = one.fstat()
    two = scene.memory(vm, 2).fstat()
    again = one.fstat()
    scene.expect("fstat", "st_size of the first", page, first.st_size)
    scene.expect("fstat", "st_size of the second", 2 * page, two.st_size)
    scene.expect("fstat", "the first after the second", page, again.st_size)
    scene.expect("fstat", "st_ino of the first", first.st_ino, again.st_ino)
    same = "the same" if first.st_ino == two.st_ino else "another"
    scene.expect("fstat", "st_ino of the second", "another", same)


BY_ITSELF: Final[Mapping[str, Body]] = {
    "C001": read_and_write,
    "C002": stat_of_the_file,
    "C003": allocate_all,
    "C004": punch_unaligned_offset,
    "C005": allocate_at_the_end,
    "C006": allocate_past_the_end,
    "C007": punch_at_the_end,
    "C008": punch_past_the_end,
    "C009": punch_unaligned_length,
    "C010": punch_a_page,
    "C011": allocate_a_punched_page,
    "C012": punch_unaligned,
}
for _number, _body in BY_ITSELF.items():
    case(_number, lineages=SERIES, page_sizes=ALL_SIZES)(_body)
case("C014", lineages=SERIES)(two_files)
_REPEATED: Final[Mapping[str, Body]] = {**BY_ITSELF, "C014": two_files}


@case(
    "C070",
    lineages=(MAINLINE, IN_PLACE),
    page_sizes=ALL_SIZES,
    variants=tuple(_REPEATED),
)
def as_in_the_first_series(scene: Scene) -> None:
    """Lines 1 to 12 and 14 again."""
    _REPEATED[scene.variant](scene)


@case("C013", lineages=SERIES, page_sizes=ALL_SIZES)
@case("C069", lineages=(MAINLINE, IN_PLACE), page_sizes=ALL_SIZES)
def sizes_below_a_page(scene: Scene) -> None:
    """Creating a file of 1 to 4095 bytes: EINVAL each."""
    vm, flags = scene.vm(), scene.flags()
    # Every one of them once for 4K; the check of huge sizes is one of the same kind.
    sizes = range(1, PAGE_SIZE) if scene.page_size == PAGE_SIZE else (1, 2048, 4095)
    for size in sizes:
        create = partial(scene.created, vm, size, flags)
        scene.expect_call("KVM_CREATE_GUEST_MEMFD", f"size {size}", "EINVAL", create)


@case("C015", lineages=LINEAGES, page_sizes=ALL_SIZES)
def map_and_unmap(scene: Scene) -> None:
    """mmap MAP_SHARED and munmap: both succeed."""
    file = file_of(scene)
    toucher = scene.toucher(file)
    scene.expect_call("munmap", "whole file", OK, toucher.map(file.size).munmap)


@case("C016", lineages=LINEAGES, page_sizes=ALL_SIZES)
def drop_what_was_never_there(scene: Scene) -> None:
    """MADV_DONTNEED with nothing faulted in: 0."""
    window = scene.window(file_of(scene))
    scene.expect_call("madvise", "DONTNEED, nothing there", OK, window.dont_need)


@case("C017", lineages=(RFC_V1,), page_sizes=ALL_SIZES)
def touch_before_the_bind(scene: Scene) -> None:
    """A store to a file that is bound to no memslot: SIGBUS."""
    window = scene.window(file_of(scene))
    scene.expect("store", "not bound", SIGBUS, window.store(0, b"A"))


@case("C018", lineages=LINEAGES, page_sizes=ALL_SIZES)
def touch_a_bound_file(scene: Scene) -> None:
    """A bound file keeps what the host wrote."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    for offset in range(0, machine.file.size, scene.page_size):
        scene.expect("store", "bound", OK, window.store(offset, b"A"))
        scene.expect("load", "bound", b"A", window.load(offset))


@case("C019", lineages=(RFC_V1,), page_sizes=ALL_SIZES, needs=PRIVATE_MEMORY)
def to_private_while_mapped(scene: Scene) -> None:
    """To private while a page is faulted in: EINVAL."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.store(0, b"A")
    got = machine.convert(0, machine.file.size, private=True)
    scene.expect("SET_MEMORY_ATTRIBUTES", "a page is mapped", "EINVAL", got)


@case("C020", lineages=LINEAGES, page_sizes=ALL_SIZES)
def drop_keeps_data(scene: Scene) -> None:
    """MADV_DONTNEED drops page table entries, and the data stay."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.store(0, b"A")
    scene.expect_call("madvise", "DONTNEED", OK, window.dont_need)
    scene.expect("load", "after DONTNEED", b"A", window.load(0))


@case("C021", lineages=(RFC_V1,), page_sizes=ALL_SIZES, needs=PRIVATE_MEMORY)
def to_private_after_drop(scene: Scene) -> None:
    """MADV_DONTNEED, then to private: 0; a store is SIGBUS."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.store(0, b"A")
    window.dont_need()
    got = machine.convert(0, machine.file.size, private=True)
    scene.expect("SET_MEMORY_ATTRIBUTES", "nothing mapped", OK, got)
    scene.expect("store", "private page", SIGBUS, window.store(0, b"B"))


@case("C022", lineages=(RFC_V1,), page_sizes=ALL_SIZES, needs=PRIVATE_MEMORY)
def to_shared_is_zeroed(scene: Scene) -> None:
    """Private and shared again: the host reads 0."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.store(0, b"A")
    window.dont_need()
    for private in (True, False):
        got = machine.convert(0, machine.file.size, private=private)
        scene.expect("SET_MEMORY_ATTRIBUTES", f"private={private}", OK, got)
    scene.expect("load", "shared again", b"\0", window.load(0))


@case("C024", lineages=LINEAGES, page_sizes=ALL_SIZES)
def delete_the_memslot(scene: Scene) -> None:
    """KVM_SET_USER_MEMORY_REGION2 with size 0: 0; the memory stays."""
    machine = scene.machine(PAGES)
    window = scene.window(machine.file)
    window.store(0, b"A")
    delete = partial(
        machine.vm.set_user_memory_region2, slot=0, guest_phys_addr=GPA, memory_size=0
    )
    scene.expect_call("SET_USER_MEMORY_REGION2", "size 0", OK, delete)
    scene.expect("load", "after the delete", b"A", window.load(0))
