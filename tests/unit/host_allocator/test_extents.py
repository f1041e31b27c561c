"""Extents against a plain set of frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmem.host_allocator.core.extents import Extents
from gmem.uapi.pages import PgRange

FRAMES = st.frozensets(st.integers(0, 63))


def extents_of(frames: frozenset[int]) -> Extents:
    extents = Extents(PgRange(frame, frame + 1) for frame in frames)
    extents.check()
    return extents


def frames_in(runs: list[PgRange]) -> list[int]:
    return [frame for run in runs for frame in run]


def ranges() -> st.SearchStrategy[PgRange]:
    ends = st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted)
    return ends.map(lambda pair: PgRange(pair[0], pair[1]))


@given(FRAMES)
def test_any_order_of_adding_gives_the_same_runs(frames: frozenset[int]) -> None:
    assert frames_in(extents_of(frames).runs()) == sorted(frames)
    assert len(extents_of(frames)) == len(frames)


@given(FRAMES, ranges())
def test_overlap_counts_common_frames(frames: frozenset[int], other: PgRange) -> None:
    common = frames & set(other)
    extents = extents_of(frames)
    assert extents.overlap(other) == len(common)
    assert extents.discard(other) == len(common)
    assert frames_in(extents.runs()) == sorted(frames - common)
    extents.check()


@given(FRAMES, ranges())
def test_covers_wants_every_frame(frames: frozenset[int], other: PgRange) -> None:
    if len(other):
        assert extents_of(frames).covers(other) == (set(other) <= frames)


@given(FRAMES, st.data())
def test_take_lowest_takes_the_lowest(
    frames: frozenset[int], data: st.DataObject
) -> None:
    nr = data.draw(st.integers(0, len(frames)))
    extents = extents_of(frames)
    assert frames_in(extents.take_lowest(nr)) == sorted(frames)[:nr]
    assert frames_in(extents.runs()) == sorted(frames)[nr:]
    extents.check()


@given(FRAMES, st.data())
def test_highest_names_the_highest(frames: frozenset[int], data: st.DataObject) -> None:
    nr = data.draw(st.integers(0, len(frames)))
    found = sorted(frames_in(extents_of(frames).highest(nr)))
    assert found == sorted(frames)[len(frames) - nr :]


@given(FRAMES, st.integers(0, 3), st.integers(0, 20))
def test_take_aligned_takes_the_lowest_aligned(
    frames: frozenset[int], order: int, nr: int
) -> None:
    size = 1 << order
    blocks = [
        start
        for start in range(0, 64, size)
        if set(range(start, start + size)) <= frames
    ]
    extents = extents_of(frames)
    assert extents.aligned(order) == len(blocks)

    taken = extents.take_aligned(order, nr)
    expected = [f for start in blocks[:nr] for f in range(start, start + size)]
    assert frames_in(taken) == expected
    assert frames_in(extents.runs()) == sorted(frames - set(expected))
    extents.check()


def test_a_frame_is_in_only_once() -> None:
    extents = Extents([PgRange(0, 4)])
    with pytest.raises(AssertionError, match="in the set already"):
        extents.add(PgRange(3, 5))
    with pytest.raises(AssertionError, match="not in the set"):
        extents.remove(PgRange(3, 5))


def test_four_tib_are_one_run() -> None:
    frames = (4 << 40) >> 12
    extents = Extents([PgRange(0, frames)])
    assert extents.aligned(18) == 4096
    assert extents.take_aligned(18, 4096) == [PgRange(0, frames)]
    assert len(extents) == 0


def test_adding_no_frames_adds_nothing() -> None:
    extents = Extents([PgRange(5, 5), PgRange(2, 4)])
    assert extents.runs() == [PgRange(2, 4)]
