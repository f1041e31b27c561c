from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.page_store import PageStore
from gmem.guest_memfd.view.node import ParkedRead, ReadVerdict, ViewNode, Wait, Watch

PAGE = 4096
HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
CLOSED, CLOSING, OPEN, QUIESCED = PageState


@pytest.fixture
def store() -> Iterator[PageStore]:
    made = PageStore.create(1024)
    yield made
    made.close()


@pytest.fixture
def node(store: PageStore) -> Iterator[ViewNode]:
    """Pages 0 to 7 have folios, frames 100 to 107; the rest of 16 are holes."""
    table = InodeTable.create(1, 16 * PAGE, PAGE)
    for pgoff in range(8):
        table.attach(pgoff, 100 + pgoff)
    yield ViewNode(table, store)
    table.close()


def outcome(verdict: ReadVerdict) -> str:
    if verdict.data:
        return "data"
    return verdict.wait.name if verdict.wait else errno.errorcode[verdict.error]


@pytest.mark.parametrize(
    ("state", "folio", "hole", "several"),
    [
        (OPEN, "data", "FOLIO", "data"),
        (QUIESCED, "QUIESCED", "QUIESCED", "EIO"),
        (CLOSING, "EIO", "EIO", "EIO"),
        (CLOSED, "EIO", "EIO", "EIO"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_reads_follow_table_v4(
    node: ViewNode, state: PageState, folio: str, hole: str, several: str
) -> None:
    node.set_state(HOST, 0, 16, state)
    assert outcome(node.read(HOST, 0, PAGE)) == folio
    assert outcome(node.read(HOST, 8 * PAGE, PAGE)) == hole
    assert outcome(node.read(HOST, 0, 8 * PAGE)) == several
    assert outcome(node.read(HOST, 0, 9 * PAGE)) == "EIO"
    assert outcome(node.read(HOST, 15 * PAGE, 2 * PAGE)) == "EIO"


def test_a_hole_of_the_guest_view_is_refused_at_once(node: ViewNode) -> None:
    node.set_state(GUEST, 0, 16, OPEN)
    assert outcome(node.read(GUEST, 0, PAGE)) == "data"
    assert outcome(node.read(GUEST, 8 * PAGE, PAGE)) == "EIO"
    assert outcome(node.read(HOST, 0, PAGE)) == "EIO"


@pytest.mark.parametrize("writeback", [True, False], ids=["writeback", "write(2)"])
@pytest.mark.parametrize("state", list(PageState), ids=lambda state: state.name)
def test_writes_follow_table_v4(
    node: ViewNode, store: PageStore, state: PageState, writeback: bool
) -> None:
    node.set_state(HOST, 0, 16, state)
    data = memoryview(b"new" + bytes(PAGE - 3))
    stored = node.write(HOST, 0, data, writeback=writeback)
    if state is CLOSED:
        assert (stored.stored, stored.error, stored.to_closed) == (0, errno.EIO, True)
        assert bytes(store.window(100, 1)[:3]) == bytes(3)
    else:
        assert (stored.stored, stored.error) == (PAGE, 0)
        assert bytes(store.window(100, 1)[:3]) == b"new"

    to_hole = node.write(HOST, 8 * PAGE, data, writeback=writeback)
    assert to_hole.stored == 0
    if state is not CLOSED:
        assert to_hole.error == (errno.EIO if writeback else errno.EINVAL)
        assert to_hole.to_hole


def test_a_refused_page_of_a_write_costs_only_itself(
    node: ViewNode, store: PageStore
) -> None:
    node.set_state(HOST, 0, 16, CLOSING)
    node.set_state(HOST, 1, 2, CLOSED)
    data = memoryview(b"".join(bytes([65 + n]) * PAGE for n in range(3)))
    assert node.write(HOST, 0, data, writeback=True).error == errno.EIO
    firsts = [store.window(100 + n, 1)[0] for n in range(3)]
    assert firsts == [65, 0, 67]


def test_what_a_write_leaves_of_a_page_is_zeroed_first(
    node: ViewNode, store: PageStore
) -> None:
    store.array(100, 3).fill(7)
    node.set_state(HOST, 0, 16, OPEN)
    node.write(HOST, PAGE - 2, memoryview(b"x" * (PAGE + 4)), writeback=False)
    assert bytes(store.window(100, 3)) == (
        bytes(PAGE - 2) + b"x" * (PAGE + 4) + bytes(PAGE - 2)
    )
    assert node.table.uptodate[:4].tolist() == [1, 1, 1, 0]


def test_a_write_past_the_end_is_cut_and_one_beyond_it_refused(node: ViewNode) -> None:
    node.set_state(HOST, 0, 16, OPEN)
    node.table.attach(15, 200)
    long = memoryview(bytes(2 * PAGE))
    assert node.write(HOST, 15 * PAGE, long, writeback=False).stored == PAGE
    beyond = node.write(HOST, 16 * PAGE, long, writeback=False)
    assert (beyond.stored, beyond.error) == (0, errno.EINVAL)


def test_a_page_nobody_has_filled_is_zeroed_once(
    node: ViewNode, store: PageStore
) -> None:
    node.set_state(HOST, 0, 16, OPEN)
    store.array(100, 1).fill(7)
    (data,) = node.read(HOST, 0, PAGE).data
    assert bytes(data) == bytes(PAGE)
    store.array(100, 1).fill(8)
    (data,) = node.read(HOST, 0, PAGE).data
    assert data[0] == 8


def test_data_is_the_store_itself_in_one_piece_per_folio(store: PageStore) -> None:
    table = InodeTable.create(1, 4 << 20, 2 << 20)
    table.attach(0, 512)
    table.attach(512, 0)
    node = ViewNode(table, store)
    node.set_state(HOST, 0, 1024, OPEN)
    data = node.read(HOST, 510 * PAGE, 4 * PAGE).data
    assert [len(piece) for piece in data] == [2 * PAGE, 2 * PAGE]
    store.window(1022, 1)[0] = 9
    assert data[0][0] == 9
    table.close()


def park(node: ViewNode, unique: int, pgoff: int, view: ViewKind = HOST) -> ParkedRead:
    parked = ParkedRead(unique, 1, view, pgoff, pgoff * PAGE, PAGE, 0.0)
    node.parked[unique] = parked
    return parked


@pytest.mark.parametrize("state", [CLOSING, CLOSED], ids=lambda state: state.name)
def test_closing_claims_the_parked_reads_of_exactly_the_range(
    node: ViewNode, state: PageState
) -> None:
    node.set_state(HOST, 0, 16, OPEN)
    node.set_state(GUEST, 0, 16, OPEN)
    inside, below, above = park(node, 1, 9), park(node, 2, 8), park(node, 3, 11)
    other_view = park(node, 4, 9, GUEST)
    assert node.set_state(HOST, 9, 11, state) == [inside]
    assert list(node.parked.values()) == [below, above, other_view]
    node.check()


def test_opening_leaves_reads_parked_until_they_are_claimed_once(
    node: ViewNode,
) -> None:
    node.set_state(HOST, 0, 16, QUIESCED)
    parked = park(node, 1, 3)
    assert node.set_state(HOST, 0, 16, OPEN) == [parked]
    assert node.claim(parked)
    assert not node.claim(parked)


def test_a_watch_notes_answers_and_holds_single_reads(node: ViewNode) -> None:
    node.set_state(HOST, 0, 16, OPEN)
    node.set_state(GUEST, 0, 16, OPEN)
    watch = Watch(HOST, 2, 6)
    node.watches.append(watch)
    node.read(HOST, 0, 4 * PAGE)
    node.read(GUEST, 2 * PAGE, PAGE)
    assert watch.answered == {0, 1, 2, 3}

    watch.hold = True
    assert node.read(HOST, 3 * PAGE, PAGE).wait is Wait.HELD
    assert outcome(node.read(HOST, 3 * PAGE, 2 * PAGE)) == "EIO"
    assert outcome(node.read(HOST, 6 * PAGE, PAGE)) == "data"
    assert outcome(node.read(HOST, 5 * PAGE, PAGE, held=False)) == "data"
    assert 5 in watch.answered
