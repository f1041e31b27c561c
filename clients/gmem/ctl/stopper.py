"""Ending a host so that nothing of it is left: processes, sockets, directory."""

from __future__ import annotations

import signal
from typing import Final

from gmem.ctl.directories import HostDirectory
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.processes import ProcessRecord, exit_status, send, wait_gone
from gmem.ctl.state import HostState, ServiceRecord

STOP_SECONDS_MAX: Final = 20.0
"""How long one service may take to end in order: its calls, then its operations."""

KILL_SECONDS_MAX: Final = 20.0
"""How long a killed process may take: it may have to write pages back first."""


def stop(directory: HostDirectory, state: HostState) -> None:
    """End a host in order: first who asks, then who is asked (SIGTERM).

    Raises ControlError when something does not end: it still runs then, and `kill`
    ends it.
    """
    slow = []
    for service in _in_order(state):
        if send(service.process, signal.SIGTERM):
            slow += wait_gone([service.process], STOP_SECONDS_MAX)
    others = state.others() if state.current else []
    for process in others:
        send(process, signal.SIGTERM)
    # One that was stuck in a call to a dead service comes free when all others ended.
    left = wait_gone([*slow, *others], STOP_SECONDS_MAX)
    if left:
        raise ControlError(
            f"{_named(left)} did not end within {STOP_SECONDS_MAX:.0f} s: "
            f"{directory.command('down', '--force')}",
            ExitStatus.UNREACHABLE,
        )
    _clean(directory, state)


def kill(directory: HostDirectory, state: HostState) -> None:
    """End a host at once (SIGKILL), after a crash; only processes that are its own.

    Raises ControlError when a process survives that: it sleeps in the kernel.
    """
    # The keeper first: it would start guest_memfd again.
    in_order = sorted(_in_order(state), key=lambda service: service.name != "keeper")
    services = [service.process for service in in_order]
    for process in services:
        send(process, signal.SIGKILL)
    # Guest processes end with their vmm; what the services had begun is found now.
    others = state.others() if state.current else []
    for process in others:
        send(process, signal.SIGKILL)
    left = wait_gone([*services, *others], KILL_SECONDS_MAX)
    if left:
        raise ControlError(
            f"{_named(left)} sleeps in the kernel and did not take SIGKILL within "
            f"{KILL_SECONDS_MAX:.0f} s: look at /proc/PID/stack, then try again",
            ExitStatus.UNREACHABLE,
        )
    _clean(directory, state)


def _in_order(state: HostState) -> list[ServiceRecord]:
    """Return the services that run, callers before those they call."""
    return list(reversed(state.running))


def _clean(directory: HostDirectory, state: HostState) -> None:
    for service in state.services:
        exit_status(service.pid)  # Collects it, where it is a child of ours.
    directory.remove()


def _named(processes: list[ProcessRecord]) -> str:
    return ", ".join(f"{process.name} (pid {process.pid})" for process in processes)
