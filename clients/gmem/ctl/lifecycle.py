"""The commands up, status and down."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gmem.client import GuestMemfdClient
from gmem.client.health import check_health
from gmem.ctl import launcher, stopper
from gmem.ctl.directories import HostDirectory, locked
from gmem.ctl.elsewhere import host_elsewhere
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.output import print_json, print_table
from gmem.ctl.state import (
    RESTARTED,
    HostState,
    ServiceRecord,
    read_state,
    require_state,
    spare_of,
)
from gmem.uapi.errors import TransportError

_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One line of `gmemctl status`."""

    host: str
    service: str
    pid: int
    state: str
    """`serving`, `running` (no gRPC), `silent` (alive, no answer), `dead`; between a
    crash and the next start by the keeper `restarting`."""
    target: str
    backend: str = ""
    """Of `guest_memfd`: what it serves views with; empty where that is not known."""

    @property
    def good(self) -> bool:
        """Whether the service does what it is there for."""
        return self.state in {"serving", "running"}


def up(plan: launcher.Plan, *, as_json: bool) -> None:
    """Start a host and print its services. Raises ControlError."""
    tell = _quiet if as_json else _tell
    state = asyncio.run(launcher.start(plan, tell))
    # People have heard of limits already.
    _print_statuses(
        asyncio.run(_statuses([state])),
        _limits(plan.directory.base, [state]) if as_json else {},
        _spares(plan.directory.base, [state]),
        as_json=as_json,
    )


def repair(directory: HostDirectory, *, as_json: bool) -> None:
    """Start the keeper of a host again and print its services. Raises ControlError."""
    tell = _quiet if as_json else _tell
    state = asyncio.run(launcher.repair(directory, tell))
    _print_statuses(
        asyncio.run(_statuses([state])),
        _limits(directory.base, [state]),
        _spares(directory.base, [state]),
        as_json=as_json,
    )


def status(base: Path, host: str | None, *, wait_seconds: float, as_json: bool) -> bool:
    """Print the services of one host or of all; tell whether every one is good.

    Waits until they are, `wait_seconds` at most. Raises ControlError when there is no
    such host.
    """
    found = host_elsewhere(os.environ, host)
    if found is not None:
        states = [found]
    elif host is not None:
        states = [require_state(HostDirectory(base, host))]
    else:
        states = _all_states(base)
        if not states:
            raise ControlError(
                f"no host below {base}: start one with gmemctl up",
                ExitStatus.UNREACHABLE,
            )
    statuses = asyncio.run(_good_statuses(states, wait_seconds))
    here = [] if found is not None else states
    limits, spares = _limits(base, here), _spares(base, here)
    _print_statuses(statuses, limits, spares, as_json=as_json)
    return all(one.good for one in statuses)


def down(directory: HostDirectory, *, force: bool, as_json: bool) -> None:
    """End a host. Raises ControlError when there is none, or something stays."""
    require_state(directory)
    with locked(directory.base):
        state = require_state(directory)
        (stopper.kill if force else stopper.stop)(directory, state)
    if as_json:
        services = [asdict(service) for service in state.services]
        print_json({"host": state.host, "ended": services})
    else:
        _tell(f"host {state.host} is down; {directory.path} is removed")


async def _good_statuses(
    states: list[HostState], wait_seconds: float
) -> list[ServiceStatus]:
    """Ask until every service is good, or time is up; return what they said last."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    while True:
        statuses = await _statuses(states)
        if all(one.good for one in statuses) or loop.time() >= deadline:
            return statuses
        await asyncio.sleep(_POLL_SECONDS)


async def _statuses(states: list[HostState]) -> list[ServiceStatus]:
    asked = [_status(state, service) for state in states for service in state.services]
    return list(await asyncio.gather(*asked))


async def _status(state: HostState, service: ServiceRecord) -> ServiceStatus:
    seen = state.elsewhere or service in state.running
    word = await _state_word(service) if seen else _word_of_dead(state, service)
    backend = await _backend(state, service, word) if service.name == RESTARTED else ""
    return ServiceStatus(
        state.host, service.name, service.pid, word, service.target, backend
    )


async def _backend(state: HostState, service: ServiceRecord, word: str) -> str:
    """Return what the host was started with, or what its service says."""
    if state.backend or word != "serving":
        return state.backend
    async with GuestMemfdClient(service.target, client="gmemctl") as guest_memfd:
        return (await guest_memfd.get_capabilities()).data_plane


def _word_of_dead(state: HostState, service: ServiceRecord) -> str:
    if service.name == RESTARTED and state.service("keeper") in state.running:
        return "restarting"
    return "dead"


async def _state_word(service: ServiceRecord) -> str:
    if not service.target:
        return "running"
    try:
        return "serving" if await check_health(service.target) else "stopping"
    except TransportError:
        return "silent"


def _all_states(base: Path) -> list[HostState]:
    if not base.is_dir():
        return []
    names = sorted(entry.name for entry in base.iterdir())
    found = [read_state(HostDirectory(base, name)) for name in names]
    return [state for state in found if state is not None]


def _limits(base: Path, states: list[HostState]) -> dict[str, list[str]]:
    """Return what each host lacks for want of a privilege, if it lacks anything."""
    found = {
        state.host: launcher.limits(HostDirectory(base, state.host)) for state in states
    }
    return {host: sentences for host, sentences in found.items() if sentences}


def _spares(base: Path, states: list[HostState]) -> dict[str, int]:
    """Return the pids of the spares that wait now, by host; they are no services."""
    here = [state.host for state in states if state.current]
    found = {host: spare_of(HostDirectory(base, host)) for host in here}
    return {host: spare.pid for host, spare in found.items() if spare is not None}


def _print_statuses(
    statuses: list[ServiceStatus],
    limits: dict[str, list[str]],
    spares: dict[str, int],
    *,
    as_json: bool,
) -> None:
    if as_json:
        services = [asdict(one) for one in statuses]
        print_json({"services": services, "limits": limits, "spares": spares})
        return
    columns = ("HOST", "SERVICE", "PID", "STATE", "BACKEND", "TARGET")
    rows = [
        (s.host, s.service, s.pid or "-", s.state, s.backend or "-", s.target or "-")
        for s in statuses
    ]
    print_table(columns, rows)
    for host, pid in spares.items():
        _tell(f"{host}: spare process {pid} waits to succeed {RESTARTED}")
    for host, sentences in limits.items():
        for sentence in sentences:
            _tell(f"{host}: {sentence}")


def _tell(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


_quiet: Callable[[str], None] = lambda _sentence: None  # noqa: E731 - a value, not a verb
