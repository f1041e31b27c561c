"""Plays the steps one after the other, and notices when a service dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from gmem.ctl.demo import steps_in_place, steps_private, steps_rfc_v2, steps_shared
from gmem.ctl.demo.children import ChildEndedError
from gmem.ctl.demo.report import StepReport
from gmem.ctl.demo.stage import Stage, StepFailedError
from gmem.ctl.demo.step import Step
from gmem.ctl.demo.weaker import WEAKER
from gmem.ctl.errors import ServiceDiedError
from gmem.ctl.processes import exit_status
from gmem.ctl.state import HostState, ServiceRecord
from gmem.uapi.errors import KernelError, TransportError
from gmem.uapi.lineage import Lineage

STEPS: Final = (*steps_private.STEPS, *steps_shared.STEPS)
STEPS_OF: Final[Mapping[Lineage, Sequence[Step]]] = {
    Lineage.RFC_V1: STEPS,
    Lineage.RFC_V2: steps_rfc_v2.STEPS,
    Lineage.IN_PLACE: steps_in_place.STEPS,
}
NO_DEMO: Final[Mapping[Lineage, str]] = {
    Lineage.MAINLINE: "MAINLINE has neither 1G pages nor a conversion in place, which "
    "is all that the demo shows",
}
"""Why there are no steps in the other lineages."""

# A dying service takes others along: who died first is clear a moment later.
_SETTLE_SECONDS: Final = 0.5
_CANCEL_SECONDS_MAX: Final = 5.0

T = TypeVar("T")
Listener = Callable[[int, Step, StepReport], None]


async def play(
    stage: Stage,
    heard: Listener,
    reports: list[StepReport],
    steps: Sequence[Step] = STEPS,
) -> None:
    """Play `steps`; append each report to `reports` and tell `heard` of it.

    A step that is refused where it must not be, or that stands on something that is
    not so, ends the play: its report has a check that did not hold. Raises
    ServiceDiedError when a service of the host dies, TransportError when one does not
    answer; anything else is a bug and goes its way.
    """
    async with _deaths(stage.state) as died:
        before = stage.baseline = await _unless_died(stage.snapshot(), stage, died)
        for number, step in enumerate(steps, start=1):
            weaker = WEAKER[stage.backend]
            report = StepReport(step.name, step.aim, before, weaker)
            reports.append(report)
            started = time.monotonic()
            try:
                went_on = await _unless_died(
                    _play_one(stage, step, report), stage, died
                )
            finally:
                report.seconds = round(time.monotonic() - started, 3)
                heard(number, step, report)
            if not went_on or report.after is None:
                return
            before = report.after
        if died.is_set():
            raise service_died(stage)


async def _play_one(stage: Stage, step: Step, report: StepReport) -> bool:
    """Play one step to its end; False when the play cannot go on."""
    went_on = True
    try:
        await step.action(stage, report)
    except (KernelError, StepFailedError, ChildEndedError) as error:
        report.check("the step can go on", held=False, found=error)
        went_on = False
    report.finish(await stage.snapshot(), step.change if went_on else None)
    return went_on


async def _unless_died(playing: Awaitable[T], stage: Stage, died: asyncio.Event) -> T:
    """Await one step, or what comes before it; end it when a service dies."""
    task = asyncio.ensure_future(playing)
    death = asyncio.ensure_future(died.wait())
    try:
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not _may_be_a_death(task):
            return await task
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(death), _SETTLE_SECONDS)
        if died.is_set():
            await asyncio.sleep(_SETTLE_SECONDS)
            raise service_died(stage)
        return await task
    finally:
        death.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_SECONDS_MAX)
        if task.done() and not task.cancelled():
            task.exception()  # Looked at: what the death caused is no news.


def _may_be_a_death(task: asyncio.Future[T]) -> bool:
    """Tell whether a step ended as it does when a service is gone."""
    if task.exception() is not None:
        return isinstance(task.exception(), TransportError)
    return not task.result()


def service_died(stage: Stage) -> ServiceDiedError:
    """Say which service died, and how to clean up."""
    first = _first_to_die(stage.state.dead)
    return ServiceDiedError(
        f"{first.name} (pid {first.pid}) died: clean up with "
        f"{stage.directory.command('down')}",
        service=first.name,
        pid=first.pid,
    )


def _first_to_die(dead: Sequence[ServiceRecord]) -> ServiceRecord:
    """Pick the one that was killed; those that only followed it ended by themselves."""
    assert dead, "no service died"
    for service in dead:
        status = exit_status(service.pid)
        if status is not None and status < 0:
            return service
    # guest_memfd before the keeper, which ends because of it.
    return dead[-1]


@asynccontextmanager
async def _deaths(state: HostState) -> AsyncIterator[asyncio.Event]:
    """Set an event when a service ends, as its pidfd says: no call has to time out.

    Of a host that runs elsewhere no process is seen: there calls do time out.
    """
    died = asyncio.Event()
    loop = asyncio.get_running_loop()
    services = () if state.elsewhere else state.services
    pidfds = []
    for service in services:
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(service.pid))
    if len(pidfds) < len(services) or state.dead:
        died.set()
    for pidfd in pidfds:
        loop.add_reader(pidfd, _note, loop, pidfd, died)
    try:
        yield died
    finally:
        for pidfd in pidfds:
            loop.remove_reader(pidfd)
            os.close(pidfd)


def _note(loop: asyncio.AbstractEventLoop, pidfd: int, died: asyncio.Event) -> None:
    loop.remove_reader(pidfd)
    died.set()
