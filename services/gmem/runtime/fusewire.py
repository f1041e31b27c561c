"""The FUSE wire: what the kernel writes to /dev/fuse, and what it reads back.

Only what a session of regular files needs of `include/uapi/linux/fuse.h`, with the
kernel's names without their FUSE_ prefix. Everything is little endian here because
the machines this runs on are; requests are `IN_HEADER` + body, replies `OUT_HEADER`
+ body, notifications replies with `unique` 0 and the code where the error stands.

A node id is `ino << 1 | view` (ino >= 1), so the root's 1 is never one; a file
handle is the node id, with INTERNAL_FH for files that the session opened for itself.
Both say everything by themselves: a successor understands what it never handed out.
INIT is answered by the keeper, once; all else by whoever serves at the moment.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

ROOT_ID: Final = 1
INTERNAL_FH: Final = 1 << 62
# Bit 63 of `unique` marks a request that was sent again (RESEND).
UNIQUE_RESEND: Final = 1 << 63
# Of any request; the kernel lowers it to its own limit (fs.fuse.max_pages_limit).
MAX_PAGES: Final = 256
MAX_WRITE: Final = MAX_PAGES << 12
MAX_READAHEAD: Final = 1 << 20
# An option of the mount. Readahead comes in pieces of this: one refused page among it
# costs 32 single READs and not 256.
MAX_READ: Final = 32 << 12
# The largest request: a WRITE of MAX_WRITE bytes behind its headers, rounded up. The
# kernel refuses a read(2) with a smaller buffer.
BUFFER_BYTES: Final = MAX_WRITE + (1 << 12)
# Seconds after which the kernel ends a connection that leaves a request unanswered
# (6.14 and later): the last line for a stopped service. Far above the longest wait
# of ours, a FALLOCATE that waits for a silent VMM to be fenced.
REQUEST_TIMEOUT: Final = 120


class Opcode(IntEnum):
    """The requests that get an answer of their own; all others are ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45


class NotifyCode(IntEnum):
    """Notifications we send."""

    INVAL_INODE = 2
    RESEND = 7


class InitFlag(IntFlag):
    """Capabilities of INIT that we ask for, by their bit in flags | flags2 << 32."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39
    REQUEST_TIMEOUT = 1 << 42


class OpenFlag(IntFlag):
    """How an opened file is treated by the kernel."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    NOFLUSH = 1 << 5


# READ and WRITE carry LOCKOWNER when read(2) or write(2) bypassed the page cache
# (O_DIRECT); page faults, readahead and writeback never do.
READ_LOCKOWNER: Final = 1 << 1
WRITE_CACHE: Final = 1 << 0
WRITE_LOCKOWNER: Final = 1 << 1

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
OUT_HEADER: Final = struct.Struct("<IiQ")
INIT_IN: Final = struct.Struct("<IIIII")
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH22x")
ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
ATTR_OUT: Final = struct.Struct("<QII")
ENTRY_OUT: Final = struct.Struct("<QQQQII")
OPEN_OUT: Final = struct.Struct("<QIi")
RELEASE_IN: Final = struct.Struct("<QIIQ")
READ_IN: Final = struct.Struct("<QQIIQII")
WRITE_IN: Final = struct.Struct("<QQIIQII")
WRITE_OUT: Final = struct.Struct("<II")
FALLOCATE_IN: Final = struct.Struct("<QQQII")
IOCTL_IN: Final = struct.Struct("<QIIQII")
IOCTL_OUT: Final = struct.Struct("<iIII")
STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")
DIRENT: Final = struct.Struct("<QQII")
INVAL_INODE_OUT: Final = struct.Struct("<Qqq")

BODY: Final = IN_HEADER.size
WRITE_DATA: Final = BODY + WRITE_IN.size
IOCTL_DATA: Final = BODY + IOCTL_IN.size

DT_REG: Final = 8
S_IFREG: Final = 0o100000
S_IFDIR: Final = 0o040000
WANTED: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.MAX_PAGES
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
    | InitFlag.REQUEST_TIMEOUT
)


@dataclass(frozen=True, slots=True)
class Attributes:
    """What fstat of a file shows; sizes in bytes."""

    ino: int
    size: int
    allocated: int
    block_size: int
    mode: int
    uid: int
    gid: int

    def pack(self) -> bytes:
        """Return struct fuse_attr; times are the epoch's: nothing here has an age."""
        return ATTR.pack(
            self.ino,
            self.size,
            self.allocated // 512,
            *(0,) * 6,
            self.mode,
            1,
            self.uid,
            self.gid,
            0,
            self.block_size,
            0,
        )


@dataclass(frozen=True, slots=True)
class InitReply:
    """The answer to INIT, and what the kernel and we agreed on."""

    body: bytes
    flags: InitFlag
    kernel_minor: int


def nodeid_of(ino: int, view: int) -> int:
    """Return the node id of one view (0 the host's, 1 the guest's) of inode `ino`."""
    assert ino >= 1, ino
    return ino << 1 | view


def answer_init(body: memoryview) -> InitReply:
    """Answer INIT: readahead and WRITEs of 1 MiB, and no WRITEBACK_CACHE.

    With that a short answer would read as zeros.
    """
    _major, minor, _readahead, low, high = INIT_IN.unpack_from(body)
    offered = low | high << 32 if low & InitFlag.INIT_EXT else low
    flags = InitFlag(WANTED & offered)
    timeout = REQUEST_TIMEOUT if flags & InitFlag.REQUEST_TIMEOUT else 0
    reply = INIT_OUT.pack(
        7,
        min(minor, 45),
        MAX_READAHEAD,
        flags & 0xFFFFFFFF,
        64,  # background requests (readahead, writeback) in flight, and the
        48,  # number from which the device counts as congested
        MAX_WRITE,
        1,
        MAX_PAGES,
        0,
        flags >> 32,
        0,
        timeout,
    )
    return InitReply(reply, flags, minor)


def pack_attr(attributes: Attributes) -> bytes:
    """Return the answer to GETATTR, valid for no time: st_blocks changes."""
    return ATTR_OUT.pack(0, 0, 0) + attributes.pack()


def pack_entry(nodeid: int, attributes: Attributes) -> bytes:
    """Return the answer to LOOKUP: valid for no time, so that every open asks."""
    return ENTRY_OUT.pack(nodeid, 0, 0, 0, 0, 0) + attributes.pack()


def pack_open(fh: int, *, mmap: bool = True) -> bytes:
    """Return the answer to OPEN of a view.

    Without KEEP_CACHE each open would drop and write back the whole cache; without
    NOFLUSH a killed service that holds a view of its own is not reaped. DIRECT_IO
    makes a shared mmap ENODEV, because INIT does not ask for DIRECT_IO_ALLOW_MMAP.
    """
    flags = OpenFlag.KEEP_CACHE | OpenFlag.NONSEEKABLE | OpenFlag.NOFLUSH
    if not mmap:
        flags |= OpenFlag.DIRECT_IO
    return OPEN_OUT.pack(fh, flags, 0)


def pack_dirents(names: list[tuple[int, str]], offset: int, size: int) -> bytes:
    """Return at most `size` bytes of directory entries from position `offset` on."""
    out = bytearray()
    for position, (ino, name) in enumerate(names[offset:], start=offset + 1):
        raw = name.encode()
        entry = DIRENT.pack(ino, position, len(raw), DT_REG) + raw
        entry += bytes(-len(entry) % 8)
        if len(out) + len(entry) > size:
            break
        out += entry
    return bytes(out)


def pack_reply(unique: int, error: int, body: bytes = b"") -> bytes:
    """Return a whole reply; `error` is a positive errno or 0."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body


def pack_inval(nodeid: int, offset: int, length: int) -> bytes:
    """Return the notification that drops `length` bytes at `offset` everywhere."""
    body = INVAL_INODE_OUT.pack(nodeid, offset, length)
    size = OUT_HEADER.size + len(body)
    return OUT_HEADER.pack(size, NotifyCode.INVAL_INODE, 0) + body


def pack_resend() -> bytes:
    """Return the notification that queues again what was read and not answered.

    The requests come with UNIQUE_RESEND in their numbers.
    """
    return OUT_HEADER.pack(OUT_HEADER.size, NotifyCode.RESEND, 0)
