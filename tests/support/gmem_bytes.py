"""LoadBytes and StoreBytes of a GmemWorld, whose store has one value for each frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.uapi.pages import PAGE_SIZE, PgRange

if TYPE_CHECKING:
    from tests.support.gmem_world import GmemWorld


def load(world: GmemWorld, e: fx.LoadBytes) -> bytes:
    pages = PgRange.around(e.offset, e.size)
    whole = _whole(world, e.inode, pages)
    return whole[e.offset - pages.offset :][: e.size]


def store(world: GmemWorld, e: fx.StoreBytes) -> None:
    pages = PgRange.around(e.offset, len(e.data))
    states = world.tables[e.inode].views[ViewKind.HOST][pages.start : pages.stop]
    assert set(states) == {PageState.QUIESCED}, "a process could have it cached"
    whole = _whole(world, e.inode, pages)
    at = e.offset - pages.offset
    whole = whole[:at] + e.data + whole[at + len(e.data) :]
    for pgoff, at in zip(pages, range(0, len(whole), PAGE_SIZE), strict=True):
        world.store[world.frame(e.inode, pgoff)] = whole[at : at + PAGE_SIZE]


def _whole(world: GmemWorld, number: int, pages: PgRange) -> bytes:
    """Return the bytes of pages; a value that is none stands for zeros."""
    world.perform(fx.Prepare(number, pages))
    values = [world.store.get(world.frame(number, pgoff), 0) for pgoff in pages]
    zeros = bytes(PAGE_SIZE)
    return b"".join(v if isinstance(v, bytes) else zeros for v in values)
