"""K. guest_memfd_conversions_test of in-place conversion.

It repeats lines 87 to 91, which section J has; here is what it adds. The test is about
4K pages; what it says holds for those of huge pages too.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from gmem.testing.conformance.cases.section_e import RANGES, conversions
from gmem.testing.conformance.cases.section_j import (
    TO_PRIVATE,
    converted,
    guest_byte,
)
from gmem.testing.conformance.kvm import IN_PLACE, Feature
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import ALL_SIZES, case
from gmem.testing.conformance.scene import Scene
from gmem.uapi.pages import PAGE_SIZE

GUESTS: Final = (Feature.GUESTS,)
PAGES: Final = 8
FOLIOS: Final = tuple(str(page) for page in range(PAGES))


@case("C100", lineages=(IN_PLACE,), page_sizes=ALL_SIZES, needs=GUESTS)
def truncated_in_both_states(scene: Scene) -> None:
    """A punched shared page reads 0; a punched private one too, and stays SIGBUS."""
    machine = scene.machine()
    machine.boot()
    file, host = machine.file, scene.window(machine.file)
    punch = partial(file.punch_hole, 0, file.size)
    host.store(0, b"A")
    scene.expect_call("punch hole", "shared", OK, punch)
    scene.expect("load", "punched, shared", b"\0", host.load(0))
    host.store(0, b"A")
    converted(machine, 0, file.size, private=True)
    scene.expect("guest load", "private", b"A", guest_byte(machine, 0))
    scene.expect_call("punch hole", "private", OK, punch)
    scene.expect("guest load", "punched, private", b"\0", guest_byte(machine, 0))
    scene.expect("load", "punched, private", SIGBUS, host.load(0))


@case(
    "C100",
    lineages=(IN_PLACE,),
    page_sizes=ALL_SIZES,
    variants=tuple(f"folio-{n}" for n in FOLIOS),
)
def pages_that_nobody_touched(scene: Scene) -> None:
    """Of eight pages one is there and converted to and fro; the others read 0."""
    page = scene.page_size
    only = int(scene.variant.removeprefix("folio-")) * page
    machine = scene.machine(PAGES)
    host = scene.window(machine.file)
    host.store(only, b"A")
    for private in (True, False):
        converted(machine, 0, machine.file.size, private=private)
    for at in range(0, machine.file.size, page):
        want = b"A" if at == only else b"\0"
        scene.expect("load", "shared again", want, host.load(at))


@case("C101", lineages=(IN_PLACE,), page_sizes=ALL_SIZES)
def a_forked_child_loses_the_page_too(scene: Scene) -> None:
    """A forked child writes the page; it is converted; the child's touch is SIGBUS."""
    machine = scene.machine()
    host = scene.window(machine.file)
    reader, writer = (host.of(host.toucher.fork()) for _ in range(2))
    for child in (reader, writer):
        scene.expect("store", "shared, in a child", OK, child.store(0, b"A"))
    got = machine.convert(0, PAGE_SIZE, private=True)
    scene.expect(TO_PRIVATE, "mapped by a child", OK, got)
    scene.expect("load", "private, in a child", SIGBUS, reader.load(0))
    scene.expect("store", "private, in a child", SIGBUS, writer.store(0, b"B"))


@case("C103", lineages=(IN_PLACE,), page_sizes=ALL_SIZES, needs=GUESTS)
def conversions_in_place(scene: Scene) -> None:
    """Lines 47 to 52 with memory of the file itself, and without MADV_DONTNEED."""
    test = conversions(scene, IN_PLACE)
    for offset, size in RANGES:
        test.start()
        test.to_private(offset, size)
        test.own_bytes(offset, size, 0x22)
        test.host_sees_old(offset, size, 0x11)
        test.rest_is(offset, size, 0xCC)
        test.back(offset, size)
