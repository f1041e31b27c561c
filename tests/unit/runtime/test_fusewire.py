from __future__ import annotations

import struct

import pytest

from gmem.guest_memfd.core.values import ViewKind
from gmem.runtime import fusewire as wire
from gmem.runtime.fusewire import InitFlag


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("IN_HEADER", 40),
        ("OUT_HEADER", 16),
        ("INIT_OUT", 64),
        ("ATTR", 88),
        ("ATTR_OUT", 16),
        ("ENTRY_OUT", 40),
        ("OPEN_OUT", 16),
        ("READ_IN", 40),
        ("WRITE_IN", 40),
        ("WRITE_OUT", 8),
        ("FALLOCATE_IN", 32),
        ("STATFS_OUT", 80),
        ("RELEASE_IN", 24),
        ("DIRENT", 24),
        ("INVAL_INODE_OUT", 24),
    ],
)
def test_structures_have_the_size_of_the_uapi_header(layout: str, size: int) -> None:
    assert getattr(wire, layout).size == size


def init_in(*, flags: int, minor: int = 45) -> memoryview:
    low, high = flags & 0xFFFFFFFF, flags >> 32
    return memoryview(struct.pack("<IIIII44x", 7, minor, 131072, low, high))


def test_init_takes_what_it_wants_of_what_is_offered_and_never_writeback_cache() -> (
    None
):
    everything = (1 << 63) - 1
    reply = wire.answer_init(init_in(flags=everything))
    assert reply.flags == wire.WANTED
    fields = wire.INIT_OUT.unpack(reply.body)
    assert fields[:3] == (7, 45, 1 << 20)
    assert not fields[3] & 1 << 16, "WRITEBACK_CACHE"
    assert (fields[6], fields[8]) == (1 << 20, 256), "max_write, max_pages"
    assert fields[12] == wire.REQUEST_TIMEOUT


def test_init_of_an_old_kernel_gets_no_flag_it_does_not_know() -> None:
    offered = InitFlag.ASYNC_READ | InitFlag.BIG_WRITES | InitFlag.MAX_PAGES
    # Without INIT_EXT the second word of flags is not there.
    reply = wire.answer_init(init_in(flags=offered | 1 << 39, minor=31))
    assert reply.flags == offered
    assert wire.INIT_OUT.unpack(reply.body)[1] == 31
    assert wire.INIT_OUT.unpack(reply.body)[12] == 0


def test_node_ids_say_inode_and_view_and_are_never_the_root() -> None:
    seen = {wire.nodeid_of(ino, view) for ino in (1, 2, 3) for view in ViewKind}
    assert len(seen) == 6
    assert wire.ROOT_ID not in seen
    assert wire.nodeid_of(5, ViewKind.GUEST) >> 1 == 5


def test_directory_entries_are_aligned_and_bounded() -> None:
    names = [(2, "inode-1"), (4, "inode-22"), (6, "inode-3")]
    packed = wire.pack_dirents(names, 0, 4096)
    assert len(packed) % 8 == 0
    assert packed.count(b"inode-") == 3
    assert wire.pack_dirents(names, 0, 70).count(b"inode-") == 2
    assert wire.pack_dirents(names, 2, 4096).count(b"inode-") == 1
    assert wire.pack_dirents(names, 3, 4096) == b""
