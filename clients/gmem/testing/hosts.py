"""Whole emulated hosts for tests: started as gmemctl does, ended and audited after.

    with running_host() as host:
        client = VmmClient(host.target("vmm-0"))

Whatever happens in the block, the host is stopped afterwards, and the end of the block
fails when a process, a socket, a mount or a file of it is left. A watchdog aborts its
FUSE connection when a test hangs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gmem.ctl import launcher, stopper
from gmem.ctl.directories import HostDirectory
from gmem.ctl.processes import exit_status
from gmem.ctl.state import HostState, require_state, spare_of
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape, NodeShape
from gmem.testing.leaks import wait_for_none
from gmem.testing.watchdog import FuseWatchdog
from gmem.uapi.pages import SIZE_1G, SIZE_2M

HOST: Final = "h"
SMALL: Final = HostShape(
    nodes=(NodeShape(memory_size=6 * SIZE_1G, huge_pages={SIZE_1G: 3, SIZE_2M: 8}),)
)
"""One node of 6 GiB: three 1G pages, eight of 2M, the rest base memory."""
FUSE_BOUND_SECONDS: Final = 90.0
"""After that a test that hangs is freed; less than its timeout."""
GONE_SECONDS_MAX: Final = 20.0
FUSE_DEVICE: Final = Path("/dev/fuse")


class HostLeftError(AssertionError):
    """A host that was stopped left something, or hung before."""


@dataclass
class EmulatedHost:
    """One running host; `connection_id` names its FUSE connection, if it has one."""

    directory: HostDirectory
    shape: HostShape
    state: HostState
    watchdog: FuseWatchdog | None
    connection_id: int

    @property
    def backend(self) -> Backend:
        """What it serves views with."""
        return Backend(self.state.backend)

    @property
    def run_dir(self) -> Path:
        """Where its sockets and logs are."""
        return self.directory.path

    def target(self, service: str) -> str:
        """Return the gRPC target of a service: host_allocator, guest_memfd, vmm-0."""
        return self.state.service(service).target

    def pid(self, service: str) -> int:
        """Return the process that plays it now: the keeper restarts guest_memfd."""
        return require_state(self.directory).service(service).pid

    def spare_pid(self) -> int | None:
        """Return the successor of guest_memfd that waits to be started, if any does."""
        spare = spare_of(self.directory)
        return None if spare is None else spare.pid

    def kill(self, service: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a service."""
        os.kill(self.pid(service), number)

    def exit_status(self, service: str) -> int:
        """Wait until a service has ended; return how."""
        status: list[int] = []

        def ended() -> bool:
            status[:] = [s for s in [exit_status(self.pid(service))] if s is not None]
            return bool(status)

        wait_until(ended, f"the end of {service}")
        return status[0]

    def log(self, service: str) -> list[dict[str, Any]]:
        """Return the lines of a service's log."""
        return launcher.log_lines(self.directory.log(service))

    def repair(self) -> None:
        """Start the keeper again, which was killed."""
        self.state = asyncio.run(launcher.repair(self.directory))

    def rearm(self) -> None:
        """Give the FUSE connection its whole time again: another test begins."""
        if self.watchdog is not None:
            self.watchdog.watch(self.connection_id)

    def start_again(self) -> None:
        """Start the host again, whose services have all ended."""
        plan = launcher.Plan(self.directory, self.shape, backend=self.backend)
        self.state = asyncio.run(launcher.start(plan))
        self.connection_id = connection_of(self.directory)
        self.rearm()


def missing_here() -> str:
    """Return what this machine lacks for an emulated host; empty for nothing."""
    if not FUSE_DEVICE.exists():
        return f"needs {FUSE_DEVICE}, which this machine does not have"
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs {FUSE_DEVICE}, which does not open: {error.strerror}"
    if os.geteuid() != 0:
        return f"needs root to mount, runs as uid {os.geteuid()}"
    return ""


@contextmanager
def running_host(
    shape: HostShape = SMALL,
    nr_vmms: int = 1,
    *,
    under: str = "/tmp",  # noqa: S108 - a socket's path has to be short
    restarts_max: int = launcher.RESTARTS_MAX,
    user: tuple[int, int] | None = None,
    spare: bool = True,
    backend: Backend = Backend.FUSE,
) -> Iterator[EmulatedHost]:
    """Start a host below a short path of its own; stop it, and audit what is left.

    With Backend.MEMFD it needs neither root nor /dev/fuse, and enforces less. Raises
    ControlError where it cannot start, HostLeftError where something is left.
    """
    base = Path(tempfile.mkdtemp(prefix="gh-", dir=under))
    directory = HostDirectory(base, HOST)
    try:
        plan = launcher.Plan(
            directory,
            shape,
            nr_vmms,
            restarts_max=restarts_max,
            user=user,
            spare=spare,
            backend=backend,
        )
        with _watchdog(backend) as watchdog:
            state = asyncio.run(launcher.start(plan))
            connection = connection_of(directory)
            host = EmulatedHost(directory, shape, state, watchdog, connection)
            host.rearm()
            try:
                yield host
            finally:
                _stop(directory)
                if watchdog is not None:
                    # Its number may belong to somebody else's connection soon.
                    watchdog.release(host.connection_id)
        left = wait_for_none(base, GONE_SECONDS_MAX)
        left += [f"{path} is left" for path in base.iterdir()]
        _require(not left, "; ".join(left))
    finally:
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def _watchdog(backend: Backend) -> Iterator[FuseWatchdog | None]:
    """Bound the FUSE connection; where there is none no fault can hang."""
    if backend is Backend.MEMFD:
        yield None
        return
    with FuseWatchdog(bound_seconds=FUSE_BOUND_SECONDS) as watchdog:
        yield watchdog
        _require(not watchdog.aborted, "the watchdog had to end a host that hung")


def connection_of(directory: HostDirectory) -> int:
    """Return the number of a host's FUSE connection."""
    lines = launcher.log_lines(directory.log("keeper"))
    (ready,) = [line for line in lines if line["event"] == "ready"]
    return int(str(ready["connection_id"]))


def wait_until(
    condition: Callable[[], bool], what: str, seconds_max: float = GONE_SECONDS_MAX
) -> None:
    """Poll until it holds; only where this process may block."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come in {seconds_max:.0f} s")
        time.sleep(0.01)


def _stop(directory: HostDirectory) -> None:
    """Stop in order where everything lives, at once where something was killed."""
    state = require_state(directory)
    if state.dead:
        stopper.kill(directory, state)
    else:
        stopper.stop(directory, state)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise HostLeftError(sentence)
