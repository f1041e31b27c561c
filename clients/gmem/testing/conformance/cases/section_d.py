"""D. guest_memfd_hugetlb_reporting_test: what the pools count, step by step.

Rows H are another file of the pool, rows G a guest_memfd, of one huge page each. A line
plays its half up to its row, and checks every row on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from gmem.testing.conformance.kvm import (
    IN_PLACE,
    RFC_V1,
    RFC_V2,
    Cgroup,
    Feature,
    Pool,
)
from gmem.testing.conformance.outcomes import OK
from gmem.testing.conformance.registry import HUGE, case
from gmem.testing.conformance.scene import Scene
from gmem.uapi.pages import SIZE_1G, SIZE_2M, format_size

SERIES: Final = (RFC_V1, RFC_V2)
WITH_RSVD: Final = (RFC_V2, IN_PLACE)
"""A cgroup pays for reservations."""
MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9
Step = Callable[[], object]
H_ROWS: Final = ("C032", "C033", "C034", "C035", "C036", "C037", "C038", "C039")
G_ROWS: Final = ("C040", "C041", "C042", "C043", "C044")
H_COUNTS: Final = (
    *((0, 0), (0, 0), (0, 1)),
    *((-1, 0), (-1, 0), (-1, 0), (-1, 0)),
    (0, 0),
)
G_COUNTS: Final = ((0, 0), (0, 1), (-1, 0), (0, 1), (0, 0))
"""What each row adds to free and resv; nothing else ever moves."""


class Reporting:
    """The pools before the first row, and what each row may differ from it."""

    def __init__(self, scene: Scene) -> None:
        """Take the counters."""
        self._scene = scene
        self._base = scene.backend.pools()

    def expect(self, row: str, free: int, resv: int) -> None:
        """Compare both pools; the other size has nothing to move for."""
        for size in (SIZE_2M, SIZE_1G):
            base = self._base[size]
            want = base
            if size == self._scene.page_size:
                want = replace(base, free=base.free + free, resv=base.resv + resv)
            got = self._scene.settled(partial(self._pool, size), want)
            self._scene.expect(row, f"pool of {format_size(size)}", want, got)

    def _pool(self, size: int) -> Pool:
        return self._scene.backend.pools()[size]


class Charges:
    """The same for the files hugetlb.<size>.* of the cgroup, in bytes."""

    def __init__(self, scene: Scene) -> None:
        """Take the counters."""
        self._scene = scene
        self._base = self._counters()

    def expect(self, row: str, free: int, resv: int) -> None:
        """Compare them: what is not free is charged, and so is every promise."""
        size = self._scene.page_size
        usage = self._base.usage - free * size
        rsvd_usage = self._base.rsvd_usage + (resv - free) * size
        want = replace(self._base, usage=usage, rsvd_usage=rsvd_usage)
        got = self._scene.settled(self._counters, want)
        self._scene.expect(row, f"cgroup, {format_size(size)}", want, got)

    def _counters(self) -> Cgroup:
        return self._scene.backend.cgroup(self._scene.page_size)


def hugetlb_rows(scene: Scene, reporting: Reporting | Charges | None = None) -> None:
    """Another file of the pool: created, mapped, written, unmapped, advised, closed."""
    reporting = reporting or Reporting(scene)
    reporting.expect("H0", *H_COUNTS[0])
    file = scene.kept(scene.backend.hugetlb_file(scene.page_size))
    steps: list[Step] = [
        lambda: None,
        file.mmap,
        file.touch,
        file.munmap,
        lambda: file.madvise(MADV_DONTNEED),
        lambda: file.madvise(MADV_REMOVE),
        file.close,
    ]
    _play(scene, reporting, H_ROWS, H_COUNTS, steps)


def guest_memfd_rows(
    scene: Scene, reporting: Reporting | Charges | None = None
) -> None:
    """A guest_memfd of the pool: created, allocated, punched, closed."""
    reporting = reporting or Reporting(scene)
    vm, page = scene.vm(), scene.page_size
    reporting.expect("G0", *G_COUNTS[0])
    if scene.id == G_ROWS[0]:
        return
    file = scene.memory(vm)
    steps: list[Step] = [
        lambda: None,
        lambda: file.allocate(0, page),
        lambda: file.punch_hole(0, page),
        file.close,
    ]
    _play(scene, reporting, G_ROWS, G_COUNTS, steps)


def _play(
    scene: Scene,
    reporting: Reporting | Charges,
    rows: tuple[str, ...],
    counts: tuple[tuple[int, int], ...],
    steps: list[Step],
) -> None:
    last = rows.index(scene.id) if scene.id in rows else len(rows)
    for row, number, step in zip(rows[1:], counts[1:], steps, strict=True):
        if rows.index(row) > last:
            return
        step()
        reporting.expect(row, *number)


for _row in H_ROWS:
    case(
        _row,
        lineages=SERIES if _row != "C033" else (RFC_V2,),
        page_sizes=HUGE,
        needs=(Feature.OWN_POOLS, Feature.HUGETLB_FILES),
    )(hugetlb_rows)
for _row in G_ROWS:
    case(_row, lineages=(*SERIES, IN_PLACE), page_sizes=HUGE, needs=(Feature.POOLS,))(
        guest_memfd_rows
    )


@case(
    "C045",
    lineages=WITH_RSVD,
    page_sizes=HUGE,
    variants=("hugetlb", "guest_memfd"),
    needs=(Feature.OWN_POOLS, Feature.HUGETLB_FILES, Feature.CGROUPS),
)
def cgroup_rows(scene: Scene) -> None:
    """Rows 32 to 44: usage and rsvd of the cgroup follow, limits and peaks do not."""
    rows = hugetlb_rows if scene.variant == "hugetlb" else guest_memfd_rows
    # The first time raises the peaks, so that they stay the second.
    rows(scene)
    rows(scene, Charges(scene))


@case(
    "C046",
    lineages=WITH_RSVD,
    page_sizes=HUGE,
    variants=("allocated", "touched", "converted"),
    needs=(Feature.POOLS,),
)
def everything_comes_back(scene: Scene) -> None:
    """Whatever was done with a file, afterwards each counter is as before."""
    reporting = Reporting(scene)
    machine = scene.machine(2)
    window = scene.window(machine.file)
    machine.file.allocate(0, machine.file.size)
    if scene.variant != "allocated":
        window.store(scene.page_size, b"A")
    if scene.variant == "converted":
        got = machine.convert(0, scene.page_size, private=True)
        scene.expect("CONVERT_PRIVATE", "one of two huge pages", OK, got)
    window.toucher.close()
    machine.vm.close()
    machine.file.close()
    reporting.expect("the end", free=0, resv=0)
