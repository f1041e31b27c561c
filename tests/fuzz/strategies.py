"""Scripts as Hypothesis draws them: mostly sensible calls, now and then a wrong one."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from gmem.uapi.pages import PAGE_SIZE, U64_LIMIT
from tests.fuzz import operations as do
from tests.fuzz.operations import Operation
from tests.fuzz.player import CALLS

PAGES: Final = 4
"""A file is at most so long, a window twice as much."""
PARTS_MAX: Final = 20
SHARED: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
ALLOCATE: Final = FALLOC_FL_KEEP_SIZE
PUNCH: Final = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE

_MADV_REMOVE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 9, 22, 23
ADVICE: Final = (
    *(mmap.MADV_DONTNEED, mmap.MADV_DONTNEED, mmap.MADV_NORMAL, mmap.MADV_WILLNEED),
    *(_MADV_REMOVE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE),
)


RARELY: Final = 20
"""How much more often an argument is sensible than odd; a call has some of them."""

Choice: TypeAlias = SearchStrategy[int]
Drawn: TypeAlias = SearchStrategy[Operation]


def _one_of(usual: Iterable[int], *odd: int) -> Choice:
    """Draw one of `usual` nearly always, else one of `odd`.

    One draw for each argument: what Hypothesis spends on drawing is more than a call.
    """
    usual = tuple(usual)
    often = -(-RARELY * len(odd) // len(usual)) or 1
    # The simplest first: Hypothesis shrinks to the left.
    return st.sampled_from((*usual, *(usual * (often - 1)), *odd))


def _pages(least: int, most: int) -> range:
    return range(least * PAGE_SIZE, (most + 1) * PAGE_SIZE, PAGE_SIZE)


# Most things happen to the first of each kind, or hardly any two would meet.
_file = _one_of((0, 0, 0, 1, 2))
_window = _one_of((0, 0, 0, 1, 2))
_vm = _one_of((0, 0, 0, 1))
_slot = _one_of((0, 0, 0, 1, 2))
_offset = _one_of(_pages(0, PAGES), 1, PAGE_SIZE - 1, 1 << 40, -PAGE_SIZE)
_length = _one_of(_pages(1, PAGES), 0, 1, PAGE_SIZE + 1, 1 << 40, -PAGE_SIZE)
_size = _one_of((1, 8, PAGE_SIZE))
_at = _one_of((*_pages(0, PAGES - 1), 17), *_pages(PAGES, PAGES + 1))


def _op(kind: Callable[..., Operation], *arguments: Choice) -> Drawn:
    return st.tuples(*arguments).map(lambda drawn: kind(*drawn))


_SIZES: Final = tuple(pages * PAGE_SIZE for pages in (4, 4, 4, 4, 1, 2, 3))


def _create(file: Choice) -> Drawn:
    return _op(
        do.Create,
        file,
        _vm,
        _one_of(_SIZES, 0, 1, PAGE_SIZE + 1, -PAGE_SIZE, 1 << 28, 1 << 50),
        _one_of(
            (*(SHARED,) * 8, GUEST_MEMFD_FLAG_MMAP, 0),
            *(GUEST_MEMFD_FLAG_INIT_SHARED, 1 << 2, 1 << 31, 1 << 63),
        ),
    )


def _mmap(window: Choice, file: Choice) -> Drawn:
    return _op(
        do.Mmap,
        window,
        file,
        _one_of((0, 0, PAGE_SIZE, 2 * PAGE_SIZE), 1 << 40),
        _one_of((*(2 * PAGES * PAGE_SIZE,) * 8, *_pages(1, PAGES)), 1, PAGE_SIZE + 1),
        _one_of((READ_WRITE,), mmap.PROT_READ),
        _one_of((mmap.MAP_SHARED,), mmap.MAP_PRIVATE),
    )


LOAD: Final = _op(do.Load, _window, _at, _size)
STORE: Final = _op(do.Store, _window, _at, _size, _one_of(range(1, 256)))
PUNCH_HOLE: Final = _op(do.Fallocate, _file, st.just(PUNCH), _offset, _length)
FALLOCATE: Final = _op(
    do.Fallocate,
    _file,
    _one_of((ALLOCATE,), 0, FALLOC_FL_PUNCH_HOLE, 0x10, 0x20, 0x43),
    _offset,
    _length,
)
BIND: Final = _op(
    do.Bind,
    _vm,
    _slot,
    _one_of(
        (KVM_MEM_GUEST_MEMFD,),
        *(KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES, 1 << 3),
        KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY,
    ),
    _one_of(_pages(0, 2 * PAGES), 1, U64_LIMIT - PAGE_SIZE),
    _one_of(_pages(1, 2), 1, PAGE_SIZE - 1, U64_LIMIT - PAGE_SIZE, 1 << 40),
    _one_of((0, 0, 0, 1, 2), do.NO_FILE),
    _one_of(_pages(0, 3), 1, PAGE_SIZE - 1, U64_LIMIT - PAGE_SIZE),
)
SURVEY: Final = _op(do.Survey, _window)
MADVISE: Final = _op(
    do.Madvise, _window, _one_of(ADVICE), _one_of(_pages(0, 3)), _one_of(_pages(0, 6))
)
CALL: Final = st.tuples(_file, st.sampled_from(sorted(CALLS))).map(
    lambda drawn: do.Call(*drawn)
)
_WEIGHTS: Final[tuple[tuple[int, Drawn], ...]] = (
    (8, STORE),
    (6, LOAD),
    (2, SURVEY),
    (4, PUNCH_HOLE),
    (2, FALLOCATE),
    (6, BIND),
    (3, _op(do.Unbind, _vm, _slot)),
    (2, _mmap(_window, _file)),
    (2, MADVISE),
    (1, _create(_file)),
    (1, _op(do.Munmap, _window)),
    (1, _op(do.Close, _file)),
    (1, _op(do.Fstat, _file)),
    (1, CALL),
)
# Not st.one_of: it takes one that is given twice once.
_ANY: Final = st.sampled_from([drawn for n, drawn in _WEIGHTS for _ in range(n)])
_OPERATION: Final = _ANY.flatmap(lambda drawn: drawn)
# A list of lists: Hypothesis draws lists of five on average, however long they may be,
# and what a short script costs to begin and to end is more than its operations.
_PARTS: Final = st.lists(
    st.lists(_OPERATION, min_size=4, max_size=16), min_size=3, max_size=PARTS_MAX
)
_FIRST: Final = st.just(0)
_FIRST_FILE: Final = _create(_FIRST)
_FIRST_WINDOW: Final = _mmap(_FIRST, _FIRST)


@st.composite
def scripts(draw: st.DrawFn) -> list[Operation]:
    """Draw a file and a window first, or hardly anything would be there to play on.

    Read everything last, or hardly anything that went wrong would be seen.
    """
    parts = draw(_PARTS)
    middle = [one for some in parts for one in some]
    last = [do.Survey(window) for window in range(do.WINDOWS)]
    return [draw(_FIRST_FILE), draw(_FIRST_WINDOW), *middle, *last]
