"""A FUSE mount in no mount table, made with the new mount API; and its end.

Needs CAP_SYS_ADMIN and /dev/fuse; who lacks them has `fusermount`. Everything raises
OSError with the system call that failed in its text. No path of the mount is ever
looked up: that would ask a server that may not be there.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from gmem.runtime.fusewire import MAX_READ

SUBTYPE: Final = "gmem"
"""The mounts of this project show as file system type `fuse.gmem`."""

# These numbers are the same on all architectures (asm-generic/unistd.h).
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 2, 4, 8
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _AT_NO_AUTOMOUNT = 0x1000, 0x4000, 0x800
_STATX_SIZE, _STATX_DEV_AT = 256, 136
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_FORCE, _MNT_DETACH = 1, 2

_CONTROL = Path("/sys/fs/fuse/connections")

_libc = ctypes.CDLL(None, use_errno=True)


def mount_detached(fuse_fd: int) -> int:
    """Make a FUSE mount for the connection `fuse_fd`; return an O_PATH fd of its root.

    It exists as long as a descriptor of it does, and in no mount table. noexec: a
    PROT_EXEC mapping is EPERM, as on a real guest_memfd.
    """
    context = _call("fsopen", _SYS_FSOPEN, b"fuse", _FSOPEN_CLOEXEC)
    options = {
        "source": SUBTYPE,
        "subtype": SUBTYPE,
        "fd": str(fuse_fd),
        "rootmode": "40000",
        "user_id": str(os.getuid()),
        "group_id": str(os.getgid()),
        "max_read": str(MAX_READ),
    }
    try:
        for key, value in options.items():
            _configure(context, _FSCONFIG_SET_STRING, key, value)
        _configure(context, _FSCONFIG_SET_FLAG, "allow_other", None)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None)
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        return _call("fsmount", _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def attach(mount_fd: int, mount_point: Path) -> None:
    """Show the mount at a path as well; its descriptor stays good."""
    _call(
        f"move_mount to {mount_point}",
        _SYS_MOVE_MOUNT,
        mount_fd,
        b"",
        _AT_FDCWD,
        os.fsencode(mount_point),
        _MOVE_MOUNT_F_EMPTY_PATH,
    )


def detach(mount_point: Path, *, force: bool) -> None:
    """Take the mount away from a path; with `force` its connection is aborted too."""
    flags = _MNT_DETACH | (_MNT_FORCE if force else 0)
    if _libc.umount2(os.fsencode(mount_point), flags) != 0:
        raise _error(f"umount2 {mount_point}")


def mounted_at(mount_point: Path) -> bool:
    """Tell whether a mount of this project lies at exactly this path."""
    wanted = os.fsencode(mount_point)
    # The backslash first: it begins the other escapes.
    for character in b"\\ \t\n":
        wanted = wanted.replace(bytes([character]), b"\\%03o" % character)
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        kind = rest.split()[0].decode()
        if fields.split()[4] == wanted and kind == f"fuse.{SUBTYPE}":
            return True
    return False


def device_of(mount_fd: int) -> tuple[int, int]:
    """Return major and minor of the mount's st_dev, without asking its server."""
    buffer = (ctypes.c_uint32 * (_STATX_SIZE // 4))()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT
    if _libc.statx(mount_fd, b"", flags, 0, ctypes.byref(buffer)) != 0:
        raise _error("statx")
    return buffer[_STATX_DEV_AT // 4], buffer[_STATX_DEV_AT // 4 + 1]


def abort_connection(connection_id: int, scratch: Path) -> None:
    """End a FUSE connection: everything that waits on it fails, and every new touch.

    Through the fuse control file system where the machine shows it, which is all that
    an ordinary user may do; else mounted over the directory `scratch` in a mount
    namespace of our own: nobody else sees it. Closing the descriptor would not
    do: a thread killed inside an invalidation holds it too, for as long as nobody
    answers. This process stays in the new namespace: do it last.
    """
    usual = _CONTROL / str(connection_id) / "abort"
    if usual.exists():
        usual.write_text("1")
        return
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    # Before the mount: a shared root would show it to everybody.
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "make private")
    target = os.fsencode(scratch)
    _check(_libc.mount(b"none", target, b"fusectl", 0, None), "mount fusectl")
    (scratch / str(connection_id) / "abort").write_text("1")


def _configure(context: int, command: int, key: str | None, value: str | None) -> None:
    _call(
        f"fsconfig {key or 'create'}",
        _SYS_FSCONFIG,
        context,
        command,
        None if key is None else key.encode(),
        None if value is None else value.encode(),
        0,
    )


def _call(name: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise _error(name)
    return result


def _check(result: int, name: str) -> None:
    if result != 0:
        raise _error(name)


def _error(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")
