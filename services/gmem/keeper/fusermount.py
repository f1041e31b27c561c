"""A FUSE mount for an ordinary user: by fusermount3, which may mount for everybody.

The program mounts at a path below our run directory and sends the connection's
descriptor over a socket that _FUSE_COMMFD names. The path is only a way in: once the
root is open the mount is taken out of the mount table again, lazily. From then on it is
as one of `mounts`: it lives as long as its descriptors do, and a crash leaves nothing.

Everything raises OSError with what was tried in its text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

from gmem.keeper.mounts import SUBTYPE, mounted_at
from gmem.runtime.fusewire import MAX_READ

PROGRAM: Final = "fusermount3"
POINT_NAME: Final = "mnt"
"""The mount point's name in the run directory, for as long as it is there."""
SECONDS_MAX: Final = 10.0
CONFIGURATION: Final = Path("/etc/fuse.conf")

_OPTIONS: Final = (
    *("rw", "nosuid", "nodev", "noexec", f"subtype={SUBTYPE}", f"fsname={SUBTYPE}"),
    f"max_read={MAX_READ}",
)


def mount(run_dir: Path) -> tuple[int, int]:
    """Make a mount that is in no mount table; return its connection and its root.

    Other users' processes may do system calls on its files where /etc/fuse.conf has
    user_allow_other.
    """
    point = run_dir / POINT_NAME
    clean_stale(run_dir)
    point.mkdir(mode=0o700, parents=True)
    try:
        fuse_fd = _mount(point)
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            return fuse_fd, os.open(point, flags)
        except OSError:
            os.close(fuse_fd)
            raise
    finally:
        clean_stale(run_dir)


def clean_stale(run_dir: Path) -> None:
    """Take away the mount point, and what a crash left mounted at it."""
    point = run_dir / POINT_NAME
    while mounted_at(point):
        _run("-u", "-z", "--", str(point))
    with contextlib.suppress(FileNotFoundError):
        point.rmdir()


def _mount(point: Path) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = [*_OPTIONS, *["allow_other"] * others_allowed()]
    with ours, theirs:
        _run("-o", ",".join(options), "--", str(point), control=theirs)
        # It has ended: what it has sent is there.
        theirs.close()
        flags = socket.MSG_CMSG_CLOEXEC
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, flags)
    if not fds:
        raise OSError(errno.EPROTO, f"{PROGRAM} mounted and sent no descriptor")
    return fds[0]


def _run(*arguments: str, control: socket.socket | None = None) -> None:
    program = shutil.which(PROGRAM)
    if program is None:
        raise OSError(errno.ENOENT, f"there is no {PROGRAM}: install the package fuse3")
    fds = () if control is None else (control.fileno(),)
    environ = {"LC_ALL": "C"}
    if control is not None:
        environ["_FUSE_COMMFD"] = str(control.fileno())
    try:
        done = subprocess.run(
            [program, *arguments],
            env=environ,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_MAX,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{PROGRAM} did not end") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise OSError(errno.EPERM, f"{PROGRAM}: {said.removeprefix(f'{program}: ')}")


def others_allowed() -> bool:
    """Tell whether ordinary users may let other users at their mounts."""
    try:
        lines = CONFIGURATION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines.splitlines())
