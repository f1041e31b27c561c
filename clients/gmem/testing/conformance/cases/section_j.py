"""J. guest_memfd_conversions_test of the second series: contents are kept."""

from __future__ import annotations

from typing import Final

from gmem.testing.conformance.guest import Load, Store
from gmem.testing.conformance.kvm import IN_PLACE, RFC_V2, Feature
from gmem.testing.conformance.outcomes import OK, SIGBUS
from gmem.testing.conformance.registry import ALL_SIZES, case
from gmem.testing.conformance.scene import Machine, Scene
from gmem.testing.conformance.toucher import Died, Window
from gmem.uapi.flags import KVM_MEMORY_ATTRIBUTE_PRIVATE
from gmem.uapi.pages import PAGE_SIZE

GUESTS: Final = (Feature.GUESTS,)
KEEPING: Final = (RFC_V2, IN_PLACE)
"""In-place conversion repeats some of these lines, and the others hold there too."""
PAGES: Final = 4
TO_PRIVATE: Final = "convert to private"
TO_SHARED: Final = "convert to shared"


def converted(machine: Machine, offset: int, size: int, *, private: bool) -> None:
    """Convert, which has to succeed."""
    call = TO_PRIVATE if private else TO_SHARED
    got = machine.convert(offset, size, private=private)
    machine.scene.expect(call, "nobody holds it", OK, got)


def guest_byte(machine: Machine, offset: int) -> bytes:
    """Return a byte as the guest reads it."""
    (result,) = machine.guest(Load(machine.gpa + offset, 1))
    return result.data


def guest_writes(machine: Machine, offset: int, data: bytes) -> None:
    """Have the guest write."""
    machine.guest(Store(machine.gpa + offset, data))


def pages_of(scene: Scene) -> tuple[int, int, list[int]]:
    """Return pages of the file, the size converted at once, and where each begins.

    Of huge pages it is the 4K pages inside the first that are converted one by one.
    """
    huge = scene.page_size > PAGE_SIZE
    return (1 if huge else PAGES), PAGE_SIZE, [n * PAGE_SIZE for n in range(PAGES)]


def to_and_fro(scene: Scene) -> None:
    """Host and guest hand a page to each other; what one wrote the other reads."""
    machine = scene.machine()
    machine.boot()
    size, file = machine.file.size, machine.file
    host = scene.window(file)
    scene.expect("store", "shared", OK, host.store(0, b"A"))
    scene.expect("guest load", "shared", b"A", guest_byte(machine, 0))
    guest_writes(machine, 0, b"B")
    converted(machine, 0, size, private=True)
    scene.expect("load", "private, mapped before", SIGBUS, host.load(0))
    scene.expect("guest load", "private", b"B", guest_byte(machine, 0))
    guest_writes(machine, 0, b"C")
    converted(machine, 0, size, private=False)
    scene.expect("load", "shared again", b"C", scene.window(file).load(0))


def starts_private(scene: Scene) -> None:
    """Host SIGBUS, guest writes; shared: the host reads it."""
    machine = scene.machine(flags=scene.dialect.private)
    machine.boot()
    host = scene.window(machine.file)
    scene.expect("load", "starts private", SIGBUS, host.load(0))
    guest_writes(machine, 0, b"A")
    converted(machine, 0, machine.file.size, private=False)
    scene.expect("load", "made shared", b"A", scene.window(machine.file).load(0))


def before_allocation(scene: Scene) -> None:
    """Private before any page is there: host SIGBUS afterwards."""
    machine = scene.machine(PAGES)
    host = scene.window(machine.file)
    converted(machine, 0, machine.file.size, private=True)
    scene.expect("load", "private hole", SIGBUS, host.load(0))


def one_of_four(scene: Scene) -> None:
    """Of four pages one is converted; the others stay shared, with their bytes."""
    pages, size, offsets = pages_of(scene)
    machine = scene.machine(pages)
    host = scene.window(machine.file)
    for number, at in enumerate(offsets):
        host.store(at, bytes([number + 1]))
    for at in offsets:
        converted(machine, at, size, private=True)
        for number, other in enumerate(offsets):
            if other != at:
                want = bytes([number + 1])
                scene.expect("load", "beside a private page", want, host.load(other))
        fork = host.of(host.toucher.fork())
        scene.expect("load", "private page", SIGBUS, fork.load(at))
        converted(machine, at, size, private=False)
        for number, other in enumerate(offsets):
            want = bytes([number + 1])
            scene.expect("load", "all shared again", want, host.load(other))


def held(scene: Scene) -> None:
    """A page is held: EAGAIN with its offset; let go: 0."""
    pages, size, offsets = pages_of(scene)
    machine = scene.machine(pages)
    host = scene.window(machine.file)
    for at in offsets:
        host.store(at, b"A")
        with machine.file.pin(at, size, plain=scene.variant == "reference"):
            got = machine.convert(0, PAGES * size, private=True)
            want = f"EAGAIN error_offset={at:#x}"
            scene.expect(TO_PRIVATE, "a page is held", want, got)
            scene.expect("load", "after a refusal", b"A", host.load(at))
        converted(machine, 0, PAGES * size, private=True)
        converted(machine, 0, PAGES * size, private=False)


def _died_in_a_fork(window: Window, offset: int) -> bytes | Died:
    return window.of(window.toucher.fork()).load(offset)


def punch_keeps_sharing(scene: Scene) -> None:
    """A punched shared page can be faulted again, a punched private one is SIGBUS."""
    page = scene.page_size
    machine = scene.machine(2)
    host = scene.window(machine.file)
    host.store(0, b"A")
    converted(machine, page, page, private=True)
    machine.file.allocate(page, page)
    for at in (0, page):
        do = lambda at=at: machine.file.punch_hole(at, page)  # noqa: E731 - two arguments
        scene.expect_call("punch hole", "one of two pages", OK, do)
    scene.expect("load", "punched, shared", b"\0", host.load(0))
    scene.expect("load", "punched, private", SIGBUS, _died_in_a_fork(host, page))


for _number, _body in {
    "C087": to_and_fro,
    "C088": starts_private,
    "C091": one_of_four,
}.items():
    case(_number, lineages=KEEPING, page_sizes=ALL_SIZES, needs=GUESTS)(_body)
case("C089", lineages=KEEPING, page_sizes=ALL_SIZES)(before_allocation)
case(
    "C092",
    lineages=KEEPING,
    page_sizes=ALL_SIZES,
    variants=("pin", "reference"),
    needs=(Feature.PINS,),
)(held)
case("C093", lineages=KEEPING, page_sizes=ALL_SIZES)(punch_keeps_sharing)


@case("C094", lineages=(RFC_V2,), page_sizes=ALL_SIZES, needs=GUESTS)
def attributes_have_no_say(scene: Scene) -> None:
    """Attributes of the VM that contradict the file change nothing for anybody."""
    machine, page = scene.machine(2), scene.page_size
    machine.boot()
    host = scene.window(machine.file)
    converted(machine, page, page, private=True)
    for at, data in ((0, b"A"), (page, b"B")):
        guest_writes(machine, at, data)
    for attributes in (KVM_MEMORY_ATTRIBUTE_PRIVATE, 0):
        machine.vm.set_memory_attributes(
            address=machine.gpa, size=machine.file.size, attributes=attributes
        )
        for at, data in ((0, b"A"), (page, b"B")):
            got = guest_byte(machine, at)
            scene.expect("guest load", "attributes contradict", data, got)
        scene.expect("load", "attributes contradict, shared", b"A", host.load(0))
        died = _died_in_a_fork(host, page)
        scene.expect("load", "attributes contradict, private", SIGBUS, died)


@case("C096", lineages=KEEPING, page_sizes=ALL_SIZES)
def punch_private(scene: Scene) -> None:
    """A private page that is allocated can be punched: 0."""
    machine = scene.machine(flags=scene.dialect.private)
    file = machine.file
    file.allocate(0, file.size)
    do = lambda: file.punch_hole(0, file.size)  # noqa: E731 - two arguments
    scene.expect_call("punch hole", "private, allocated", OK, do)


@case(
    "C097",
    lineages=KEEPING,
    page_sizes=ALL_SIZES,
    variants=tuple(
        f"{kind}-{held}"
        for kind in ("shared", "private")
        for held in ("pinned", "unpinned")
    ),
    needs=(Feature.PINS, Feature.POOLS),
)
def closed_while_pinned(scene: Scene) -> None:
    """Everything closed, a pin still held and let go: the counters are as before."""
    kind, pinned = scene.variant.split("-")
    before = scene.backend.pools()
    machine, page = scene.machine(2), scene.page_size
    host = scene.window(machine.file)
    for at in (0, page):
        host.store(at, b"A")
    if kind == "private":
        # What is held has to stay shared: it is the other page that is converted.
        converted(machine, 0, page, private=True)
    hold = None
    if pinned == "pinned":
        hold = scene.kept(machine.file.pin(page, PAGE_SIZE))
    host.toucher.close()
    machine.vm.close()
    machine.file.close()
    if hold is not None:
        hold.close()
    after = scene.settled(scene.backend.pools, before)
    scene.expect("pools", "all closed", before, after)
