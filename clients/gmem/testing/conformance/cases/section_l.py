"""L. Memory failure: what a page that is lost costs whom.

A kernel is told of an error by its own means for tests; an emulated host by RPC alone,
so that no page of the machine is ever touched.
"""

from __future__ import annotations

from typing import Final

from gmem.testing.conformance.guest import Load, MemoryFault, Store
from gmem.testing.conformance.kvm import (
    IN_PLACE,
    LINEAGES,
    RFC_V1,
    RFC_V2,
    Feature,
    KillPolicy,
)
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import HUGE, case
from gmem.testing.conformance.scene import GPA, Machine, Scene
from gmem.testing.conformance.toucher import Window
from gmem.uapi.errors import Errno
from gmem.uapi.flags import KVM_MEMORY_EXIT_FLAG_PRIVATE
from gmem.uapi.pages import PAGE_SIZE

ERRORS: Final = (Feature.MEMORY_ERRORS,)
CALL: Final = "memory_failure"
NOBODY: Final = "nobody"
STATES: Final = ("dirty", "clean", "unmapped")
BAD: Final = PAGE_SIZE
"""Not the first page, so that a neighbour on each side can be looked at."""
PAGES: Final = 4


def _scene(scene: Scene) -> tuple[Machine, Window]:
    machine = scene.machine(PAGES)
    return machine, scene.window(machine.file)


def _failing(scene: Scene, policy: KillPolicy, state: str) -> None:
    """Lose a page that is dirty, clean or not mapped; compare result and signal."""
    machine, window = _scene(scene)
    if state == "clean":
        window.load(BAD)
    else:
        window.store(BAD, b"A")
    if state == "unmapped":
        window.munmap()
    failure = scene.kept(machine.file.memory_failure(BAD, policy))
    scene.expect(CALL, f"{policy.value}, {state}", OK, failure.result)
    want = SIGBUS if state == "dirty" else NOBODY
    killed = window.toucher.died_of()
    scene.expect("signal", f"{policy.value}, {state}", want, killed or failure.named)


@case("C104", lineages=LINEAGES, variants=STATES, needs=ERRORS)
def injected_early(scene: Scene) -> None:
    """Told early: who has the dirty page mapped gets SIGBUS, nobody else; 0."""
    _failing(scene, KillPolicy.EARLY, scene.variant)


@case("C106", lineages=LINEAGES, variants=STATES[:2], needs=ERRORS)
def injected_by_advice(scene: Scene) -> None:
    """MADV_HWPOISON: SIGBUS for a dirty page, nothing for a clean one; 0."""
    _failing(scene, KillPolicy.ADVICE, scene.variant)


@case("C107", lineages=LINEAGES, needs=ERRORS)
def a_lost_page_is_punched_and_mended(scene: Scene) -> None:
    """Load and store are SIGBUS afterwards; a whole punch is 0, unpoison is 0."""
    machine, window = _scene(scene)
    window.store(BAD, b"A")
    failure = scene.kept(machine.file.memory_failure(BAD, KillPolicy.LATE))
    scene.expect(CALL, "late, dirty", OK, failure.result)
    for do in ("load", "store"):
        fork = window.of(window.toucher.fork())
        died = fork.load(BAD) if do == "load" else fork.store(BAD, b"B")
        scene.expect(do, "page with a memory error", SIGBUS, died)
    file = machine.file
    whole = lambda: file.punch_hole(0, file.size)  # noqa: E731 - two arguments
    scene.expect_call("punch hole", "a page has a memory error", OK, whole)
    scene.expect_call("unpoison", "punched", OK, failure.unpoison)
    scene.expect("load", "punched and mended", b"\0", window.load(BAD))


@case("C108", lineages=LINEAGES, needs=(*ERRORS, Feature.GUESTS))
def a_guest_touches_a_lost_page(scene: Scene) -> None:
    """A guest that touches the page leaves with MEMORY_FAULT, EHWPOISON."""
    machine, window = _scene(scene)
    machine.boot()
    window.store(BAD, b"A")
    private = scene.lineage == RFC_V1
    if private:
        # In the first series shared memory is the userspace side's.
        window.dont_need()
        machine.convert(0, machine.file.size, private=True)
        machine.guest(Load(GPA + BAD, 1))
    scene.kept(machine.file.memory_failure(BAD, KillPolicy.LATE))
    left = machine.first_exit(Load(GPA + BAD, 1))
    flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
    want = MemoryFault(Errno.EHWPOISON, flags, GPA + BAD, PAGE_SIZE)
    scene.expect("KVM_RUN", "page with a memory error", want, left)


@case(
    "C124",
    lineages=(RFC_V1, RFC_V2, IN_PLACE),
    page_sizes=HUGE,
    needs=(*ERRORS, Feature.GUESTS),
)
def a_guest_touches_a_lost_huge_page(scene: Scene) -> None:
    """One frame of a private huge page is bad: all of it is EHWPOISON for the guest."""
    machine, page = scene.machine(2), scene.page_size
    machine.boot()
    machine.convert(0, machine.file.size, private=True)
    last = page - PAGE_SIZE
    machine.guest(*(Store(GPA + at, b"A") for at in (0, last, page)))
    failure = scene.kept(machine.file.memory_failure(BAD, KillPolicy.LATE))
    for at in (0, BAD, last):
        left = machine.first_exit(Load(GPA + at, 1))
        flags = KVM_MEMORY_EXIT_FLAG_PRIVATE
        want = MemoryFault(Errno.EHWPOISON, flags, GPA + at, PAGE_SIZE)
        scene.expect("KVM_RUN", "huge page with a memory error", want, left)
    (seen,) = machine.guest(Load(GPA + page, 1))
    scene.expect("guest load", "the next huge page", b"A", seen.data)
    scene.expect_call("unpoison", "in a file", OK, failure.unpoison)
    for at in (0, last):
        (seen,) = machine.guest(Load(GPA + at, 1))
        scene.expect("guest load", "mended", b"A", seen.data)
