from __future__ import annotations

from collections.abc import Iterator

import pytest

from gmem.guest_memfd import recovery
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.lineage import RULES
from gmem.guest_memfd.core.values import Folio, PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.recovery import Misplaced
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import NodeId, Pfn, PgRange

PAGE = 4096
HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
CLOSED, CLOSING, OPEN, QUIESCED = PageState


@pytest.fixture
def table() -> Iterator[InodeTable]:
    made = InodeTable.create(3, 8 * PAGE, PAGE)
    yield made
    made.close()


@pytest.fixture
def inode() -> Inode:
    """Pages 0 to 3 are shared, 4 to 7 private."""
    options = InodeOptions(size=8 * PAGE, page_size=PAGE)
    made = Inode(3, options, 1, RULES[Lineage.RFC_V1])
    made.faultability.store(PgRange(0, 4), Faultability.ALL)
    return made


def shown(table: InodeTable) -> str:
    """One letter a page: who sees it; lower case while it is being taken away."""
    letters = []
    for page in range(table.nr_pages):
        states = [table.state_of(view, page) for view in ViewKind]
        assert states.count(OPEN) <= 1, page
        seen = {OPEN: "HG", CLOSING: "hg"}
        word = [seen[s][v] for v, s in enumerate(states) if s in seen]
        letters.append("".join(word) or ".")
    return " ".join(letters)


def finished(table: InodeTable, misplaced: list[Misplaced]) -> list[Misplaced]:
    """Finish as the service does; what was invalidated, in order."""
    done: list[Misplaced] = []

    def invalidate(ino: int, view: ViewKind, start: int, stop: int) -> None:
        states = {table.state_of(view, page) for page in range(start, stop)}
        assert states == {CLOSING}
        done.append(Misplaced(ino, view, start, stop))

    def set_state(
        ino: int, view: ViewKind, start: int, stop: int, state: PageState
    ) -> None:
        table.set_state(view, start, stop, state)

    recovery.finish(misplaced, invalidate, set_state)
    return done


def test_what_agrees_is_left_alone(table: InodeTable, inode: Inode) -> None:
    table.set_host(0, 4, OPEN)
    table.set_guest(4, 8, OPEN)
    assert recovery.settle(table, inode) == []
    assert shown(table) == "H H H H G G G G"


def test_what_an_operation_had_withdrawn_is_shown_again(
    table: InodeTable, inode: Inode
) -> None:
    table.set_host(0, 1, CLOSING)
    table.set_host(2, 3, QUIESCED)
    table.set_host(3, 4, OPEN)
    table.set_guest(4, 5, CLOSING)
    assert recovery.settle(table, inode) == []
    assert shown(table) == "H H H H G G G G"


def test_what_was_shown_too_early_is_invalidated_before_it_is_shown_right(
    table: InodeTable, inode: Inode
) -> None:
    # A conversion of pages 2 to 5 was cut off; the journal knows nothing of it.
    table.set_host(0, 2, OPEN)
    table.set_guest(2, 4, OPEN)
    table.set_host(4, 5, OPEN)
    table.set_host(5, 6, CLOSING)
    table.set_guest(6, 8, OPEN)
    misplaced = recovery.settle(table, inode)
    assert shown(table) == "H H g g h h G G"
    assert finished(table, misplaced) == misplaced
    assert set(misplaced) == {Misplaced(3, GUEST, 2, 4), Misplaced(3, HOST, 4, 6)}
    assert shown(table) == "H H H H G G G G"


def test_without_an_inode_the_table_itself_decides(table: InodeTable) -> None:
    table.set_host(0, 2, CLOSING)
    table.set_host(2, 3, QUIESCED)
    table.set_guest(4, 6, OPEN)
    assert recovery.settle(table, None) == []
    assert shown(table) == "H H H . G G . ."


def test_a_poisoned_page_is_shown_nowhere_whoever_showed_it(
    table: InodeTable, inode: Inode
) -> None:
    for index in range(8):
        inode.filemap.insert(index, Folio(Pfn(index), 0, NodeId(0)))
    for page in (1, 2, 5):
        inode.poisoned.add(PgRange(page, page + 1))
    # The errors of 2 and 5 came while nobody served.
    table.set_host(0, 1, OPEN)
    table.set_host(2, 4, OPEN)
    table.set_guest(4, 8, OPEN)
    misplaced = recovery.settle(table, inode)
    assert shown(table) == "H . h H G g G G"
    assert [part.poisoned for part in misplaced] == [True, True]
    finished(table, misplaced)
    assert shown(table) == "H . . H G . G G"
