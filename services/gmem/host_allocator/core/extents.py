"""A set of frames held as sorted, disjoint, merged runs: exact, and small for TiBs.

Every taker names its order of preference, and all of them are deterministic: the
lowest frames, the highest, or the lowest naturally aligned ones. A run of 4 TiB is one
entry; the cost of a call grows with the number of runs, not of frames.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import pairwise

from gmem.uapi.pages import PgRange


class Extents:
    """Frames as runs; `len` counts frames."""

    __slots__ = ("_starts", "_stops", "_total", "_touched")

    def __init__(self, runs: Iterable[PgRange] = ()) -> None:
        """Hold the frames of `runs`, which are disjoint."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._total = 0
        # Where runs began or begin that have changed since the last drain().
        self._touched: set[int] = set()
        self.add_all(runs)

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._total

    def runs(self) -> list[PgRange]:
        """Return the runs, ascending."""
        return [PgRange(*ends) for ends in zip(self._starts, self._stops, strict=True)]

    def covers(self, frames: PgRange) -> bool:
        """Tell whether every frame of `frames` is in the set."""
        i = bisect_right(self._starts, frames.start) - 1
        return i >= 0 and frames.stop <= self._stops[i]

    def overlap(self, frames: PgRange) -> int:
        """Count the frames that are both in the set and in `frames`."""
        i = bisect_right(self._stops, frames.start)
        common = 0
        while i < len(self._starts) and self._starts[i] < frames.stop:
            start = max(self._starts[i], frames.start)
            common += min(self._stops[i], frames.stop) - start
            i += 1
        return common

    def aligned(self, order: int) -> int:
        """Count the disjoint naturally aligned blocks of 2^order frames in the set."""
        return sum(len(run.rounded_in(order)) >> order for run in self.runs())

    def add(self, frames: PgRange) -> None:
        """Put in frames of which none is in the set; neighbouring runs merge."""
        assert self.overlap(frames) == 0, (frames, "is in the set already")

        i = bisect_left(self._starts, frames.start)
        start, stop = frames.start, frames.stop
        first, last = i, i
        if i > 0 and self._stops[i - 1] == start:
            first, start = i - 1, self._starts[i - 1]
        if i < len(self._starts) and self._starts[i] == stop:
            last, stop = i + 1, self._stops[i]
        if start < stop:
            self._touched.update(self._starts[first:last], (start,))
            self._starts[first:last] = [start]
            self._stops[first:last] = [stop]
        self._total += len(frames)

    def add_all(self, runs: Iterable[PgRange]) -> None:
        """Put in each of `runs`."""
        for run in runs:
            self.add(run)

    def remove(self, frames: PgRange) -> None:
        """Take out frames that all lie in one run of the set."""
        assert self.covers(frames), (frames, "is not in the set")

        i = bisect_right(self._starts, frames.start) - 1
        start, stop = self._starts[i], self._stops[i]
        rest = [(start, frames.start), (frames.stop, stop)]
        rest = [ends for ends in rest if ends[0] < ends[1]]
        self._touched.update([start], (ends[0] for ends in rest))
        self._starts[i : i + 1] = [ends[0] for ends in rest]
        self._stops[i : i + 1] = [ends[1] for ends in rest]
        self._total -= len(frames)

    def discard(self, frames: PgRange) -> int:
        """Take out what of `frames` is in the set; return how many frames that were."""
        if not frames:
            return 0
        common = [run.intersection(frames) for run in self.runs_touching(frames)]
        for run in common:
            self.remove(run)
        return sum(map(len, common))

    def runs_touching(self, frames: PgRange) -> list[PgRange]:
        """Return the runs that share a frame with `frames`, ascending."""
        i = bisect_right(self._stops, frames.start)
        j = bisect_left(self._starts, frames.stop)
        ends = zip(self._starts[i:j], self._stops[i:j], strict=True)
        return [PgRange(start, stop) for start, stop in ends]

    def take_lowest(self, nr_pages: int) -> list[PgRange]:
        """Take out the `nr_pages` lowest frames, which are there."""
        assert nr_pages <= self._total, (nr_pages, self._total)
        taken: list[PgRange] = []
        whole, left = 0, nr_pages
        while left:
            start = self._starts[whole]
            stop = min(self._stops[whole], start + left)
            taken.append(PgRange(start, stop))
            left -= stop - start
            self._touched.update((start, stop))
            if stop == self._stops[whole]:
                whole += 1
            else:
                self._starts[whole] = stop
        del self._starts[:whole], self._stops[:whole]
        self._total -= nr_pages
        return taken

    def highest(self, nr_pages: int) -> list[PgRange]:
        """Return the `nr_pages` highest frames, which are there, highest run first."""
        assert nr_pages <= self._total, (nr_pages, self._total)
        found: list[PgRange] = []
        i, left = len(self._starts), nr_pages
        while left:
            i -= 1
            start = max(self._starts[i], self._stops[i] - left)
            found.append(PgRange(start, self._stops[i]))
            left -= len(found[-1])
        return found

    def take_aligned(self, order: int, nr_folios: int) -> list[PgRange]:
        """Take out up to `nr_folios` aligned blocks of 2^order frames, lowest first."""
        taken: list[PgRange] = []
        left = nr_folios
        for run in self.runs():
            if not left:
                break
            inside = run.rounded_in(order)
            nr = min(left, len(inside) >> order)
            if nr:
                taken.append(PgRange(inside.start, inside.start + (nr << order)))
                left -= nr
        for block in taken:
            self.remove(block)
        return taken

    def drain(self) -> dict[int, int | None]:
        """Return where changed runs begin, and their ends now; None: there is none.

        Of what has changed since the last call; at first, everything.
        """
        touched, self._touched = self._touched, set()
        stops = {start: self._stop_of(start) for start in sorted(touched)}
        assert len(self._starts) == len(self._stops)
        return stops

    def _stop_of(self, start: int) -> int | None:
        i = bisect_left(self._starts, start)
        found = i < len(self._starts) and self._starts[i] == start
        return self._stops[i] if found else None

    def reset(self, runs: Iterable[PgRange]) -> None:
        """Hold the frames of `runs`, which are disjoint, and no others."""
        self._touched.update(self._starts)
        self._starts, self._stops, self._total = [], [], 0
        self.add_all(runs)

    def check(self) -> None:
        """Runs ascend, are not empty, do not touch, and add up."""
        runs = self.runs()
        assert all(len(run) > 0 for run in runs)
        assert all(low.stop < high.start for low, high in pairwise(runs)), runs
        assert sum(map(len, runs)) == self._total
