"""The state file of a host: which processes it is made of, and where they answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from gmem.ctl.directories import HostDirectory
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.processes import ProcessRecord, tagged
from gmem.runtime.backend import Backend

VERSION: Final = 1
RESTARTED: Final = "guest_memfd"
"""The service that the keeper starts again after a crash."""


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One service process of a host."""

    name: str
    pid: int
    start_time: int
    target: str
    """gRPC target; empty for the keeper, which has none."""

    @property
    def process(self) -> ProcessRecord:
        """Return how to tell the process from all others."""
        return ProcessRecord(self.name, self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class HostState:
    """What `up` wrote down; services in the order in which they were started."""

    host: str
    tag: str
    boot_id: str
    """A start time means nothing after a reboot of the machine."""
    services: tuple[ServiceRecord, ...] = ()
    uid: int = -1
    """As whom all services but the keeper run; -1: as whoever said `up`."""
    gid: int = -1
    restarts_max: int = 5
    """How often the keeper starts guest_memfd again in half a minute."""
    spare: bool = True
    """Whether the keeper has a successor of guest_memfd loaded beforehand."""
    backend: str = Backend.FUSE.value
    """How guest_memfd serves views; not known of a host that somebody else runs."""

    @property
    def elsewhere(self) -> bool:
        """Whether somebody else runs it: no process of it is known here."""
        return not self.tag

    @property
    def current(self) -> bool:
        """Whether it was written since this machine booted."""
        return self.boot_id == boot_id()

    @property
    def running(self) -> tuple[ServiceRecord, ...]:
        """The services that live."""
        if not self.current:
            return ()
        return tuple(service for service in self.services if service.process.alive)

    @property
    def dead(self) -> tuple[ServiceRecord, ...]:
        """The services that ended without `down`; none that this machine cannot see."""
        if self.elsewhere:
            return ()
        running = self.running
        return tuple(service for service in self.services if service not in running)

    def service(self, name: str) -> ServiceRecord:
        """Return one service. Raises ControlError where there is none."""
        for service in self.services:
            if service.name == name:
                return service
        names = ", ".join(service.name for service in self.services) or "none"
        raise ControlError(f"host {self.host} has no {name!r}; its services: {names}")

    def others(self) -> list[ProcessRecord]:
        """Find processes of this `up` that are not in the list: their children."""
        known = {service.pid for service in self.services}
        return [found for found in tagged(self.tag) if found.pid not in known]

    def restarted(self, directory: HostDirectory) -> HostState:
        """Return the state with the guest_memfd service that serves now.

        The keeper starts it again after a crash, and writes down who it is.
        """
        found = _written_down(directory.service_pid)
        if found is None:
            return self
        services = [
            replace(one, pid=found.pid, start_time=found.start_time)
            if one.name == RESTARTED
            else one
            for one in self.services
        ]
        return replace(self, services=tuple(services))

    def with_service(self, service: ServiceRecord) -> HostState:
        """Return the state with one more service, or with that one in its old place."""
        names = [other.name for other in self.services]
        if service.name not in names:
            return replace(self, services=(*self.services, service))
        at = names.index(service.name)
        rest = self.services[at + 1 :]
        return replace(self, services=(*self.services[:at], service, *rest))


def spare_of(directory: HostDirectory) -> ProcessRecord | None:
    """Return the successor of guest_memfd that waits to be started, if one lives."""
    found = _written_down(directory.spare_pid)
    return found if found is not None and found.alive else None


def boot_id() -> str:
    """Return what the kernel drew at random when it booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def read_state(directory: HostDirectory) -> HostState | None:
    """Return the state of a host; None where there is none.

    Raises ControlError for a file that is not ours or of another version.
    """
    try:
        values = json.loads(directory.state.read_text(encoding="utf-8"))
        return _from_json(values).restarted(directory)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ControlError(
            f"{directory.state} is no state file of this version ({error!r}): "
            f"remove {directory.path} when none of its processes runs"
        ) from error


def write_state(directory: HostDirectory, state: HostState) -> None:
    """Replace the state file as a whole: a reader sees the old or the new one."""
    text = json.dumps({"version": VERSION, **asdict(state)}, indent=2)
    fresh = directory.state.with_suffix(".new")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(directory.state)


def require_state(directory: HostDirectory) -> HostState:
    """Return the state of a host that is up. Raises ControlError."""
    state = read_state(directory)
    if state is None:
        raise ControlError(
            f"no host {directory.host} below {directory.base}: "
            f"start it with {directory.command('up')}",
            ExitStatus.UNREACHABLE,
        )
    return state


def _written_down(path: Path) -> ProcessRecord | None:
    """Return the process that a keeper wrote down, alive or not; None: it has none."""
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    pid, start_time = (int(word) for word in text.split())
    return ProcessRecord(RESTARTED, pid, start_time)


def _from_json(values: dict[str, Any]) -> HostState:
    if values.pop("version") != VERSION:
        raise ValueError("another version")
    services = tuple(ServiceRecord(**service) for service in values.pop("services"))
    return HostState(services=services, **values)
