"""The watchdog ends what hangs, and the audit finds what is left."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gmem.testing.leaks import leftovers, wait_for_none
from gmem.testing.watchdog import FuseWatchdog, connection_id
from tests.support.requirements import require_root

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
CLOEXEC = 1
# Generous: what is asserted is that the wait ends, not how fast.
SECONDS_MAX = 30


@dataclass(frozen=True)
class SilentMount:
    """A FUSE file system whose server never answers; nothing in any mount table."""

    server_fd: int
    root_fd: int

    def start_a_client(self) -> subprocess.Popen[bytes]:
        """Start a process that asks the server, and so sleeps in the kernel."""
        code = f"import os; os.stat('x', dir_fd={self.root_fd})"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            pass_fds=[self.root_fd],
            stderr=subprocess.PIPE,
        )


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    assert isinstance(result, int)
    return result


@contextmanager
def silent_mount() -> Iterator[SilentMount]:
    require_root()
    server_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    context_fd = _system_call(SYS_FSOPEN, b"fuse", CLOEXEC)
    options = {"fd": server_fd, "rootmode": "40000", "user_id": 0, "group_id": 0}
    for key, value in options.items():
        words = (key.encode(), str(value).encode())
        _system_call(SYS_FSCONFIG, context_fd, FSCONFIG_SET_STRING, *words, 0)
    _system_call(SYS_FSCONFIG, context_fd, FSCONFIG_CMD_CREATE, None, None, 0)
    root_fd = _system_call(SYS_FSMOUNT, context_fd, CLOEXEC, 0)
    os.close(context_fd)
    try:
        yield SilentMount(server_fd, root_fd)
    finally:
        # Closing the server's end aborts the connection: nobody hangs after this.
        os.close(server_fd)
        os.close(root_fd)


@pytest.mark.fuse
def test_a_process_that_waits_for_a_silent_server_is_freed() -> None:
    with silent_mount() as mount, FuseWatchdog(bound_seconds=0.5) as watchdog:
        connection = connection_id(mount.root_fd)
        with mount.start_a_client() as client:
            watchdog.watch(connection)
            _, stderr = client.communicate(timeout=SECONDS_MAX)
    assert watchdog.aborted == [connection]
    assert b"OSError" in stderr or b"Error:" in stderr


@pytest.mark.fuse
def test_a_released_connection_is_left_alone() -> None:
    with silent_mount() as mount, FuseWatchdog(bound_seconds=0.2) as watchdog:
        watchdog.watch(connection_id(mount.root_fd))
        watchdog.release(connection_id(mount.root_fd))
        with mount.start_a_client() as client:
            with pytest.raises(subprocess.TimeoutExpired):
                client.wait(timeout=1)
            client.kill()
    assert watchdog.aborted == []


@pytest.mark.fuse
def test_the_end_of_the_test_process_aborts_at_once() -> None:
    code = (
        "import sys, os, time; sys.path.insert(0, '.')\n"
        "from gmem.testing.watchdog import FuseWatchdog\n"
        "FuseWatchdog(3600).watch(int(sys.argv[1]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with silent_mount() as mount, mount.start_a_client() as client:
        connection = str(connection_id(mount.root_fd))
        subprocess.run([sys.executable, "-c", code, connection], check=False)
        _, stderr = client.communicate(timeout=SECONDS_MAX)
    assert b"Error" in stderr


@pytest.mark.fuse
def control_mounts() -> list[str]:
    """The mounts of its kind that this process sees; others come and go meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if " - fusectl " in line]


def test_nobody_else_sees_the_watchdogs_mount() -> None:
    require_root()
    before = control_mounts()
    with FuseWatchdog(bound_seconds=1):
        assert control_mounts() == before


def test_the_audit_names_processes_and_sockets(tmp_path: Path) -> None:
    assert leftovers(tmp_path) == []
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    with socket.socket(socket.AF_UNIX) as listener, subprocess.Popen(command) as child:
        listener.bind(str(tmp_path / "a.sock"))
        _wait_for_command_line(child)
        left = leftovers(tmp_path)
        child.kill()
    assert any(f"process {child.pid} still runs" in line for line in left)
    assert f"socket {tmp_path / 'a.sock'} is still open" in left


def test_the_audit_tells_neighbours_apart(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)", f"{tmp_path}0"]
    with subprocess.Popen(command) as child:
        _wait_for_command_line(child)
        assert leftovers(tmp_path) == []
        child.kill()


def _wait_for_command_line(child: subprocess.Popen[bytes]) -> None:
    """Popen returns in the midst of execve(2), before /proc shows the arguments."""
    while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
        assert child.poll() is None


def test_the_audit_waits_for_what_is_ending(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(0.3)", str(tmp_path)]
    began = time.monotonic()
    with subprocess.Popen(command):
        assert wait_for_none(tmp_path, seconds_max=SECONDS_MAX) == []
    assert time.monotonic() - began < SECONDS_MAX
