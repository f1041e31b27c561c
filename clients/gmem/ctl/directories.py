"""Where a host's files are: one directory per host below one per user."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gmem.ctl.errors import ControlError
from gmem.keeper import fusermount, pids

SUN_PATH_MAX: Final = 107
"""Bytes of a UNIX socket's path (struct sockaddr_un, without the final zero)."""

# The longest socket name in a host's directory.
_LONGEST_SOCKET = "host_allocator.sock"
_LOCK_ATTEMPTS_MAX = 10


@dataclass(frozen=True, slots=True)
class HostDirectory:
    """`<base>/<host>`: sockets, logs, the host's shape and the state file."""

    base: Path
    host: str

    @property
    def path(self) -> Path:
        """The directory itself."""
        return self.base / self.host

    @property
    def state(self) -> Path:
        """Which processes make up the host."""
        return self.path / "state.json"

    @property
    def shape(self) -> Path:
        """Nodes, memory and pools at boot, for host_allocator."""
        return self.path / "host.json"

    @property
    def service_pid(self) -> Path:
        """Pid and start time of the guest_memfd service, written by the keeper."""
        return self.path / pids.SERVICE

    @property
    def spare_pid(self) -> Path:
        """The same of a successor that waits to be started; missing without one."""
        return self.path / pids.SPARE

    def log(self, service: str) -> Path:
        """Return where a service's JSON lines go."""
        return self.path / "log" / f"{service}.jsonl"

    def socket(self, name: str) -> Path:
        """Return the path of a socket, e.g. `vmm-0.sock`."""
        return self.path / name

    def command(self, verb: str, *more: str) -> str:
        """Return the command line that does `verb` with this very host."""
        words = ["gmemctl", verb, "--host", self.host]
        if self.base != base_directory(None, os.environ):
            words += ["--run-dir", shlex.quote(str(self.base))]
        return " ".join([*words, *more])

    def require_short(self) -> None:
        """Raise ControlError where a socket's path would be too long for the kernel."""
        longest = os.fsencode(self.path / _LONGEST_SOCKET)
        if len(longest) > SUN_PATH_MAX:
            raise ControlError(
                f"{os.fsdecode(longest)} has {len(longest)} bytes, and a UNIX socket's "
                f"path at most {SUN_PATH_MAX}: give a shorter --run-dir or GMEM_RUN_DIR"
            )

    def create(self) -> None:
        """Make it, for this user alone; it must not exist."""
        self.path.mkdir(mode=0o700)
        self.log("x").parent.mkdir(mode=0o700)

    def give_to(self, uid: int, gid: int) -> None:
        """Let services that run as another user make their sockets here."""
        # They must get through the base, which stays unreadable for them.
        self.base.chmod(self.base.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
        os.chown(self.path, uid, gid)

    def require_ours(self) -> None:
        """Raise ControlError for a directory that no `up` made: it is never removed."""
        if not self.path.exists() or self.state.exists():
            return
        # An `up` that was killed before it wrote the state file.
        if {entry.name for entry in self.path.iterdir()} - {"log", "state.new"}:
            raise ControlError(
                f"{self.path} is no run directory of gmemctl: "
                "move it away, or give another --run-dir or --host"
            )

    def remove(self) -> None:
        """Remove it with all it holds, and the default base when that is empty.

        A mount that a keeper was killed over goes too; ControlError where it stays.
        """
        try:
            fusermount.clean_stale(self.path)
        except OSError as error:
            raise ControlError(
                f"{self.path} is not removed: {error.strerror}"
            ) from error
        shutil.rmtree(self.path, ignore_errors=False)
        if self.base in _default_bases(os.environ):
            with contextlib.suppress(OSError):
                self.base.rmdir()


def base_directory(option: Path | None, environ: Mapping[str, str]) -> Path:
    """Choose --run-dir, GMEM_RUN_DIR, XDG_RUNTIME_DIR/gmem or /tmp/gmem-UID."""
    if option is not None:
        return option.absolute()
    if given := environ.get("GMEM_RUN_DIR"):
        return Path(given).absolute()
    return _default_bases(environ)[0]


@contextmanager
def locked(base: Path) -> Iterator[None]:
    """Hold `base` against every other `up` and `down`; make it where it is missing.

    The lock is on the directory itself, so that nothing is left behind. Raises
    ControlError where the directory is another user's or cannot be made.
    """
    fd = _lock(base)
    try:
        yield
    finally:
        os.close(fd)


def _default_bases(environ: Mapping[str, str]) -> list[Path]:
    # Not tempfile's directory: a second terminal must find what the first one started.
    fallback = Path("/tmp") / f"gmem-{os.getuid()}"  # noqa: S108 - checked by _lock
    runtime = environ.get("XDG_RUNTIME_DIR")
    return [Path(runtime) / "gmem", fallback] if runtime else [fallback]


def _lock(base: Path) -> int:
    for _ in range(_LOCK_ATTEMPTS_MAX):
        fd = _open(base)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # A `down` may have removed it while this one waited.
        with contextlib.suppress(FileNotFoundError):
            if base.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)
    raise ControlError(f"{base} comes and goes: look who removes it")


def _open(base: Path) -> int:
    """Open the base directory, made where it is missing; only our own will do."""
    try:
        base.mkdir(parents=True, mode=0o700, exist_ok=True)
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ControlError(
            f"{base} cannot be used ({error.strerror}): "
            "give another --run-dir or GMEM_RUN_DIR"
        ) from error
    status = os.fstat(fd)
    # Whoever may write there could put a socket of his own in a service's place.
    if status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH:
        os.close(fd)
        raise ControlError(
            f"{base} belongs to uid {status.st_uid} with mode "
            f"{stat.filemode(status.st_mode)}: give a --run-dir of your own"
        )
    return fd
