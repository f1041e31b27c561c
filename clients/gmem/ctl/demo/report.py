"""What the demo reports: counters before and after, and checks that held or did not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gmem.api.host_allocator.v1.host_allocator_pb2 import GetStatisticsResponse
from gmem.api.vmm.v1.vmm_pb2 import GetStage2Response
from gmem.uapi.pages import SIZE_1G


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters at one moment: the 1G pool, vmemmap, stage 2 by level."""

    total: int
    free: int
    rsvd: int
    surp: int
    vmemmap_saved: int
    vmemmap_restored: int
    """Since the host booted; only grows."""
    free_base_pages: int
    stage2_1g: int = 0
    stage2_2m: int = 0
    stage2_4k: int = 0

    @classmethod
    def of(
        cls, statistics: GetStatisticsResponse, stage2: GetStage2Response | None
    ) -> Snapshot:
        """Pick the counters; `stage2` None means that there is no VM."""
        pool = next(pool for pool in statistics.pools if pool.page_size == SIZE_1G)
        levels = stage2 or GetStage2Response()
        return cls(
            total=pool.nr_huge_pages,
            free=pool.free_huge_pages,
            rsvd=pool.resv_huge_pages,
            surp=pool.surplus_huge_pages,
            vmemmap_saved=statistics.vmemmap.saved_pages,
            vmemmap_restored=statistics.vmemmap.restored_pages_total,
            free_base_pages=sum(node.free_base_pages for node in statistics.nodes),
            stage2_1g=levels.entries_1g,
            stage2_2m=levels.entries_2m,
            stage2_4k=levels.entries_4k,
        )

    def state(self) -> dict[str, int]:
        """Return all but what only grows: what must be the same in the end."""
        values = asdict(self)
        del values["vmemmap_restored"]
        return values


@dataclass(frozen=True, slots=True)
class Change:
    """By how much a step must change the counters, exactly; None: not said."""

    free: int = 0
    rsvd: int = 0
    total: int = 0
    surp: int = 0
    vmemmap_saved: int = 0
    stage2_1g: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be so."""

    sentence: str
    held: bool
    found: str = ""
    """What was found, where it says more than the sentence."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that cannot hold on this backend."""

    sentence: str
    why: str


@dataclass(slots=True)
class StepReport:
    """What one step did; filled while it runs."""

    name: str
    aim: str
    before: Snapshot
    weaker: Mapping[str, str] = field(default_factory=dict)
    """Checks that cannot hold here, and why."""
    after: Snapshot | None = None
    said: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether it ran to its end and every check held."""
        return self.after is not None and all(check.held for check in self.checks)

    def say(self, sentence: str) -> None:
        """Note what happened."""
        self.said.append(sentence)

    def check(self, sentence: str, held: object, found: object = "") -> None:
        """Note whether `sentence` is so, or that it cannot be."""
        if sentence in self.weaker:
            self.skipped.append(Skipped(sentence, self.weaker[sentence]))
            return
        self.checks.append(Check(sentence, bool(held), str(found)))

    def finish(self, after: Snapshot, change: Change | None) -> None:
        """Take the counters after the step, and compare with what it must change."""
        self.after = after
        for name, wanted in _wanted(change).items():
            moved = getattr(after, name) - getattr(self.before, name)
            # A counter that stands still as it must is not worth a line.
            if wanted or moved:
                sentence = f"{LABELS[name]} changes by {wanted:+d}"
                self.check(sentence, moved == wanted, f"{moved:+d}")

    def values(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        values = {**asdict(self), "held": self.held}
        del values["weaker"]
        return values


LABELS = {
    "total": "HugePages_Total",
    "free": "HugePages_Free",
    "rsvd": "HugePages_Rsvd",
    "surp": "HugePages_Surp",
    "vmemmap_saved": "vmemmap pages saved",
    "vmemmap_restored": "vmemmap pages restored since boot",
    "free_base_pages": "free base pages",
    "stage2_1g": "stage 2, 1G",
    "stage2_2m": "stage 2, 2M",
    "stage2_4k": "stage 2, 4K",
}


def counter_lines(before: Snapshot, after: Snapshot) -> list[str]:
    """Write all counters before and after, in three lines."""

    def row(heading: str, *fields: tuple[str, str]) -> str:
        moves = [
            f"{word} {getattr(before, name)} -> {getattr(after, name)}"
            for word, name in fields
        ]
        return f"{heading:<15}{'  '.join(moves)}"

    pool = (("Total", "total"), ("Free", "free"), ("Rsvd", "rsvd"), ("Surp", "surp"))
    vmemmap = (("saved", "vmemmap_saved"), ("restored so far", "vmemmap_restored"))
    levels = (("1G", "stage2_1g"), ("2M", "stage2_2m"), ("4K", "stage2_4k"))
    return [
        row("HugePages 1G", *pool),
        row("vmemmap", *vmemmap),
        row("stage 2", *levels),
    ]


def _wanted(change: Change | None) -> dict[str, int]:
    values = {} if change is None else asdict(change)
    return {name: value for name, value in values.items() if value is not None}
