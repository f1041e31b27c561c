"""Starting a host: four kinds of process, each when those it asks are there.

    host_allocator  ->  keeper  ->  guest_memfd  ->  vmm-0, vmm-1, ...

Most of a start is the interpreter's, so those that come later are spawned with the
first and *held*: they have everything loaded, and wait for a line on their stdin. When
it closes instead, because we ended, they end.

Each is a session of its own (a Ctrl-C at the terminal ends gmemctl, not the host) and
writes JSON lines to `<run>/log/<service>.jsonl`. What cannot start says why in its log:
that reason becomes the sentence, and everything started so far is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from gmem.client import HostAllocatorClient
from gmem.client.health import check_health
from gmem.ctl import stopper
from gmem.ctl.directories import HostDirectory, locked
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.processes import record, spawn, wait_gone
from gmem.ctl.state import (
    RESTARTED,
    HostState,
    ServiceRecord,
    boot_id,
    read_state,
    require_state,
    write_state,
)
from gmem.keeper.restarts import HELD
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape
from gmem.uapi.errors import TransportError

READY_SECONDS_MAX: Final = 60.0
ENDING_SECONDS_MAX: Final = 10.0
RESTARTS_MAX: Final = 5
_POLL_SECONDS: Final = 0.02
_REASON_CHARS_MAX: Final = 600

_Child: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True, slots=True)
class Plan:
    """A host that is to be started."""

    directory: HostDirectory
    shape: HostShape
    nr_vmms: int = 1
    user: tuple[int, int] | None = None
    """uid and gid of all services but the keeper; None: our own."""
    restarts_max: int = RESTARTS_MAX
    """How often the keeper starts guest_memfd again in half a minute."""
    spare: bool = True
    """Whether the keeper has a successor of guest_memfd loaded beforehand."""
    backend: Backend | None = None
    """How views are served; None: by FUSE."""


@dataclass(frozen=True, slots=True)
class _Service:
    """One process that is to be started; `target` is empty where it has no gRPC."""

    name: str
    arguments: tuple[str, ...]
    target: str


async def start(
    plan: Plan, tell: Callable[[str], None] = lambda _sentence: None
) -> HostState:
    """Start the host and wait until every service answers; `tell` hears each step.

    Raises ControlError when the host runs already, when something of it is left that
    still runs, or when a service cannot start: then nothing is left behind.
    """
    directory = plan.directory
    directory.require_short()
    with locked(directory.base):
        clean_leftovers(directory, tell)
        directory.create()
        uid, gid = plan.user or (-1, -1)
        if plan.user is not None:
            directory.give_to(uid, gid)
        state = HostState(
            directory.host,
            secrets.token_hex(16),
            boot_id(),
            uid=uid,
            gid=gid,
            restarts_max=plan.restarts_max,
            spare=plan.spare,
            backend=(plan.backend or Backend.FUSE).value,
        )
        write_state(directory, state)
        directory.shape.write_text(plan.shape.model_dump_json(indent=2) + "\n")
        return await _start_all(directory, state, plan.nr_vmms, tell)


async def _start_all(
    directory: HostDirectory,
    state: HostState,
    nr_vmms: int,
    tell: Callable[[str], None],
) -> HostState:
    names = _names(nr_vmms)
    held: dict[str, _Child] = {}
    try:
        for name in names:
            if name != "keeper":
                held[name] = _spawn(
                    directory, state, _service(directory, state, name, held=True)
                )
        for name in names:
            child = held.pop(name, None)
            state = await _start_one(directory, state, name, held=child)
            tell(f"{name} answers, pid {state.services[-1].pid}")
            for limit in limits(directory) if name == "keeper" else ():
                tell(f"  {limit}")
    except BaseException:
        for child in held.values():
            child.kill()
            child.wait()
        current = read_state(directory)
        stopper.kill(directory, current or state)
        raise
    return state


async def restart_service(directory: HostDirectory, name: str) -> HostState:
    """Start a service again that has ended, with the run directory that it had.

    It finds its journal there, and goes on where it was. Raises ControlError while it
    runs, and for what has no journal.
    """
    with locked(directory.base):
        state = require_state(directory)
        service = state.service(name)
        if not service.target:
            raise ControlError(f"{name} cannot be started alone: up --repair can")
        if name == RESTARTED and state.service("keeper").process.alive:
            return await _wait_restarted(directory)
        if service.process.alive:
            raise ControlError(f"{name} runs, pid {service.pid}: end it first")
        return await _start_one(directory, state, name)


async def repair(
    directory: HostDirectory, tell: Callable[[str], None] = lambda _sentence: None
) -> HostState:
    """Start a keeper again that has ended; guest_memfd gives it everything back.

    Raises ControlError when guest_memfd has ended as well: nobody has the views then.
    """
    with locked(directory.base):
        state = require_state(directory)
        if state.service("keeper").process.alive:
            tell("the keeper runs: nothing to repair")
            return state
        if not state.service(RESTARTED).process.alive:
            raise ControlError(
                f"keeper and guest_memfd of host {state.host} have both ended, and the "
                f"memory with them: {directory.command('down', '--force')}, then up"
            )
        state = await _start_one(directory, state, "keeper", take_back=True)
        tell(f"keeper has everything back, pid {state.service('keeper').pid}")
        return state


async def _wait_restarted(directory: HostDirectory) -> HostState:
    """Return when the keeper's own start of guest_memfd answers."""
    deadline = asyncio.get_running_loop().time() + READY_SECONDS_MAX
    while asyncio.get_running_loop().time() < deadline:
        state = require_state(directory)
        service = state.service(RESTARTED)
        if service.process.alive:
            with contextlib.suppress(TransportError):
                if await check_health(service.target):
                    return state
        await asyncio.sleep(_POLL_SECONDS)
    raise ControlError(
        f"guest_memfd does not answer after {READY_SECONDS_MAX:.0f} s: "
        f"{reason_in(directory.log('keeper'))}",
        ExitStatus.UNREACHABLE,
    )


def clean_leftovers(
    directory: HostDirectory, tell: Callable[[str], None] = lambda _sentence: None
) -> None:
    """Remove what a crash left of an earlier host of the name.

    Raises ControlError while any process of it runs.
    """
    directory.require_ours()
    state = read_state(directory)
    if state is not None:
        _require_ended(directory, state)
    if directory.path.exists():
        directory.remove()
        tell(f"removed {directory.path}, left by a host that is gone")


def _require_ended(directory: HostDirectory, state: HostState) -> None:
    left = [service.process for service in state.running]
    running = bool(left)
    if state.current and not running:
        # What ends with a service of its own accord may need a moment.
        left = wait_gone(state.others(), ENDING_SECONDS_MAX)
    if not left:
        return
    pids = ", ".join(f"{process.name} {process.pid}" for process in left)
    if state.dead or not running:
        raise ControlError(
            f"host {state.host} is broken, and still runs {pids}: "
            f"{directory.command('down', '--force')}, then up again"
        )
    raise ControlError(
        f"host {state.host} runs already ({pids}): look with gmemctl status, "
        f"or end it with {directory.command('down')}"
    )


def _names(nr_vmms: int) -> list[str]:
    vmms = [f"vmm-{number}" for number in range(nr_vmms)]
    return ["host_allocator", "keeper", "guest_memfd", *vmms]


async def _start_one(
    directory: HostDirectory,
    state: HostState,
    name: str,
    *,
    take_back: bool = False,
    held: _Child | None = None,
) -> HostState:
    """Start one service; return the state with it, written before it answers."""
    if name == "keeper":
        service = await _keeper(directory, state, take_back=take_back)
    else:
        service = _service(directory, state, name)
    child = held or _spawn(directory, state, service)
    process = record(name, child.pid)
    if process is not None:
        # Written at once: should this very process be killed now, `down` finds it.
        state = state.with_service(
            ServiceRecord(name, process.pid, process.start_time, service.target)
        )
        write_state(directory, state)
    if held is not None:
        _let_go(held)
    await _wait_ready(directory, service, child)
    return state


def _spawn(directory: HostDirectory, state: HostState, service: _Service) -> _Child:
    name = service.name
    user = None if state.uid < 0 or name == "keeper" else (state.uid, state.gid)
    return spawn(
        [sys.executable, "-m", *service.arguments],
        state.tag,
        directory.log(name),
        user,
        stdin=subprocess.PIPE if HELD[0] in service.arguments else subprocess.DEVNULL,
    )


def _let_go(child: _Child) -> None:
    """Let a held service start."""
    assert child.stdin is not None
    # One that could not even load its modules has ended: its log says why.
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(b"\n")


async def _keeper(
    directory: HostDirectory, state: HostState, *, take_back: bool
) -> _Service:
    what: tuple[str, ...] = ("--backend", state.backend)
    if take_back:
        what += ("--take-back",)
    elif state.backend != Backend.MEMFD:
        nr_pages = await _store_pages(state.service("host_allocator").target)
        what += ("--store-pages", str(nr_pages))
    user: tuple[str, ...] = ()
    if state.uid >= 0:
        user = ("--service-uid", str(state.uid), "--service-gid", str(state.gid))
    arguments = (
        *("gmem.keeper", "--run-dir", str(directory.path), *what, *user),
        *("--restarts-max", str(state.restarts_max)),
        *(("--spare",) if state.spare else ()),
        *("--service-log", str(directory.log(RESTARTED)), "--"),
        *(sys.executable, "-m", *_service(directory, state, RESTARTED).arguments),
    )
    return _Service("keeper", arguments, "")


def _service(
    directory: HostDirectory, state: HostState, name: str, *, held: bool = False
) -> _Service:
    kind = name.partition("-")[0]
    arguments = (
        *(f"gmem.{kind}", "--run-dir", str(directory.path)),
        *("--host", directory.host, "--name", name, "--backend", state.backend),
        *(HELD if held else ()),
    )
    return _Service(name, arguments, f"unix:{directory.socket(name)}.sock")


async def _store_pages(target: str) -> int:
    """Return the frames of the host: the page store has a place for each."""
    async with HostAllocatorClient(target, client="gmemctl") as allocator:
        statistics = await allocator.get_statistics()
    return max(node.first_pfn + node.nr_pages for node in statistics.nodes)


async def _wait_ready(
    directory: HostDirectory, service: _Service, child: subprocess.Popen[bytes]
) -> None:
    """Return when the service answers. Raises ControlError with its own reason."""
    log = directory.log(service.name)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READY_SECONDS_MAX
    while loop.time() < deadline:
        if child.poll() is not None:
            raise ControlError(
                f"{service.name} cannot start: {reason_in(log)} "
                f"(exit status {child.returncode})",
                ExitStatus.UNREACHABLE,
            )
        if await _answers(service, log, child.pid):
            return
        await asyncio.sleep(_POLL_SECONDS)
    raise ControlError(
        f"{service.name} does not answer after {READY_SECONDS_MAX:.0f} s: "
        f"{reason_in(log)}",
        ExitStatus.UNREACHABLE,
    )


async def _answers(service: _Service, log: Path, pid: int) -> bool:
    """Ask for gRPC health; the keeper, which has no gRPC, says ready in its log."""
    if not service.target:
        ready = {"ready", "taken_back"}
        return any(
            line.get("event") in ready and line.get("pid") == pid
            for line in log_lines(log)
        )
    if not _listens(service):
        return False
    try:
        return await check_health(service.target)
    except TransportError:
        return False


def _listens(service: _Service) -> bool:
    """Tell whether its socket is there: asking earlier only costs it time."""
    if not service.target.startswith("unix:"):
        return True
    return Path(service.target.removeprefix("unix:")).exists()


def limits(directory: HostDirectory) -> list[str]:
    """Return what the keeper said is slower or missing, for want of a privilege."""
    log = directory.log("keeper")
    if not log.exists():
        return []
    ready = [line for line in log_lines(log) if line.get("event") == "ready"]
    found = ready[-1].get("limits") if ready else None
    return [str(limit) for limit in found] if isinstance(found, list) else []


def log_lines(log: Path) -> list[dict[str, object]]:
    """Return the JSON lines of a log; other lines as an `event` of their own."""
    lines: list[dict[str, object]] = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(text)
        except ValueError:
            values = {"event": text.strip()}
        if isinstance(values, dict) and values.get("event"):
            lines.append(values)
    return lines


def reason_in(log: Path) -> str:
    """Return the last reason that a service gave in its log, as one line."""
    lines = log_lines(log)
    errors = [line["error"] for line in lines if line.get("error")]
    last = errors or [line["event"] for line in lines] or ["it said nothing"]
    reason = " ".join(str(last[-1]).split())
    return reason[:_REASON_CHARS_MAX]
