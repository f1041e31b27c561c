"""B. guest_memfd_pin_test, and C. guest_memfd_sharing_test, of the first series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gmem.testing.conformance.guest import Fill, Verify
from gmem.testing.conformance.kvm import (
    RFC_V1,
    Feature,
    GuestMemfd,
    HasFileno,
    Userspace,
)
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import case
from gmem.testing.conformance.scene import Machine, Scene
from gmem.testing.conformance.toucher import Window
from gmem.uapi.pages import PAGE_SIZE

PIN_GPA: Final = 0x5000_0000
PIN_SLOT: Final = 10
PINNED: Final = (Feature.PRIVATE_MEMORY, Feature.PINS)
GUESTS: Final = (Feature.PRIVATE_MEMORY, Feature.GUESTS)
CALL: Final = "SET_MEMORY_ATTRIBUTES"
SHARING_PAGES: Final = 64


def _written(scene: Scene) -> tuple[Machine, Window]:
    """Bind one page where the test has it, and write to it."""
    machine = scene.machine(gpa=PIN_GPA, slot=PIN_SLOT)
    window = scene.window(machine.file)
    window.store(0, b"A")
    return machine, window


@case("C025", lineages=(RFC_V1,), needs=(Feature.PRIVATE_MEMORY,))
def to_and_fro_without_a_pin(scene: Scene) -> None:
    """Not pinned: private, then shared: both 0."""
    machine, window = _written(scene)
    window.dont_need()
    for private in (True, False):
        got = machine.convert(0, PAGE_SIZE, private=private)
        scene.expect(CALL, f"not pinned, private={private}", OK, got)


@case("C026", lineages=(RFC_V1,), needs=PINNED)
def to_private_while_pinned(scene: Scene) -> None:
    """Pinned for long, and not mapped: to private is EINVAL."""
    machine, window = _written(scene)
    with machine.file.pin(0, PAGE_SIZE):
        window.dont_need()
        got = machine.convert(0, PAGE_SIZE, private=True)
        scene.expect(CALL, "a page is pinned", "EINVAL", got)


@case("C027", lineages=(RFC_V1,), needs=PINNED)
def to_private_after_the_pin(scene: Scene) -> None:
    """Unpinned again: to private is 0."""
    machine, window = _written(scene)
    with machine.file.pin(0, PAGE_SIZE):
        window.dont_need()
    got = machine.convert(0, PAGE_SIZE, private=True)
    scene.expect(CALL, "unpinned again", OK, got)


def _share(scene: Scene, machine: Machine, window: Window) -> None:
    """Host fills 0x22 and guest reads it; guest fills 0x11 and host reads it."""
    size = machine.file.size
    scene.expect("host fill", "shared", OK, window.fill(0x22))
    (seen,) = machine.guest(Verify(machine.gpa, size, 0x22))
    scene.expect("guest load", "bytes that are not the host's", 0, seen.count)
    machine.guest(Fill(machine.gpa, size, 0x11))
    found = window.count_other(0x11)
    scene.expect("host load", "bytes that are not the guest's", 0, found)


def _sharing(
    scene: Scene, backing: Callable[[GuestMemfd], HasFileno]
) -> tuple[Machine, Window]:
    """Boot a VM with the userspace side that `backing` gives; map it elsewhere too."""
    sides: list[HasFileno] = []

    def userspace(file: GuestMemfd) -> Userspace:
        sides.append(backing(file))
        return Userspace(sides[0])

    machine = scene.machine(SHARING_PAGES, userspace=userspace)
    machine.boot()
    return machine, scene.toucher(sides[0]).map(machine.file.size)


def _anonymous(scene: Scene) -> tuple[Machine, Window]:
    return _sharing(scene, lambda file: scene.memfd(file.size))


@case("C028", lineages=(RFC_V1,), needs=GUESTS)
def share_anonymous_memory(scene: Scene) -> None:
    """Behind userspace_addr is anonymous memory: both see each other's bytes."""
    _share(scene, *_anonymous(scene))


@case("C029", lineages=(RFC_V1,), needs=GUESTS)
def share_after_a_toggle(scene: Scene) -> None:
    """Private and shared again without any madvise: 0, and both still see them."""
    machine, window = _anonymous(scene)
    _share(scene, machine, window)
    for private in (True, False):
        got = machine.convert(0, machine.file.size, private=private)
        scene.expect(CALL, f"anonymous memory, private={private}", OK, got)
    _share(scene, machine, window)


@case("C030", lineages=(RFC_V1,), needs=GUESTS)
def share_the_file_itself(scene: Scene) -> None:
    """Behind userspace_addr is the guest_memfd: both see each other's bytes."""
    _share(scene, *_sharing(scene, lambda file: file))
