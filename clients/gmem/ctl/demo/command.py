"""`gmemctl demo`: start a host of its own, play the steps, print, take it down.

With GMEM_TARGETS the host is there already and stays: its services are asked, and the
programs of the demo run as containers beside it (`--programs`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gmem.ctl import launcher, options, stopper
from gmem.ctl.demo import scenario
from gmem.ctl.demo.containers import Containers
from gmem.ctl.demo.report import StepReport, counter_lines
from gmem.ctl.demo.stage import Payload, Stage
from gmem.ctl.demo.step import Step
from gmem.ctl.directories import HostDirectory, locked
from gmem.ctl.errors import ControlError, ExitStatus, ServiceDiedError
from gmem.ctl.output import console, error_values, print_json, status_of
from gmem.ctl.state import HostState
from gmem.runtime.backend import Backend
from gmem.runtime.config import HostShape
from gmem.uapi.errors import TransportError
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import SIZE_1G

NODES = 2
MEMORY_PER_NODE = 8 * SIZE_1G
POOLS = ("1G:4@0", "1G:2@1")


def run(
    directory: HostDirectory,
    payload: Path | None,
    *,
    as_json: bool,
    lineage: Lineage = Lineage.RFC_V1,
    backend: Backend | None = None,
    elsewhere: HostState | None = None,
    programs: Path | None = None,
) -> ExitStatus:
    """Play the demo and print it; return DONE only when every check held.

    It starts a host in `directory`, or plays on the one that runs `elsewhere`, with
    its programs behind sockets in the directory `programs`. Raises ControlError when
    it cannot begin. A service that dies is printed as the end of its step, and leaves
    the rest of the host for `gmemctl down`.
    """
    if lineage in scenario.NO_DEMO:
        offered = " or ".join(scenario.STEPS_OF)
        raise ControlError(f"{scenario.NO_DEMO[lineage]}: use --lineage {offered}")
    # What this Python is, not where a virtual environment points to.
    chosen = Payload.read(payload or Path("/proc/self/exe").resolve())
    screen = None if as_json else console()
    if (elsewhere is None) != (programs is None):
        raise ControlError(
            "--programs goes with a host in containers: say it where GMEM_TARGETS is "
            "set, and only there (deploy/demo.sh does)"
        )
    demo = _Demo(
        directory,
        chosen,
        screen,
        lineage,
        backend=backend,
        elsewhere=elsewhere,
        programs=programs,
    )
    error: ControlError | TransportError | None = None
    try:
        asyncio.run(demo.play())
    except (ServiceDiedError, TransportError) as died:
        error = died
    if as_json:
        print_json(demo.values(error))
    else:
        demo.print_end(error)
    if error is not None:
        return status_of(error)
    return ExitStatus.DONE if demo.held else ExitStatus.REFUSED


def host_shape() -> HostShape:
    """Return the demo's host: two nodes with 1G pools, one larger than the other."""
    pools = [options.parse_pool(pool) for pool in POOLS]
    return options.host_shape(NODES, MEMORY_PER_NODE, pools, SIZE_1G)


class _Demo:
    """One run of the demo: what was played, and where it is shown."""

    def __init__(
        self,
        directory: HostDirectory,
        payload: Payload,
        screen: Console | None,
        lineage: Lineage,
        *,
        backend: Backend | None = None,
        elsewhere: HostState | None = None,
        programs: Path | None = None,
    ) -> None:
        self.directory = directory
        self.payload = payload
        self.screen = screen
        self.lineage = lineage
        self.backend = backend
        self.steps = scenario.STEPS_OF[lineage]
        self.elsewhere = elsewhere
        self.programs = programs
        self.reports: list[StepReport] = []
        self.down_in_order = False

    @property
    def held(self) -> bool:
        """Whether every step was played, every check held, and all ended in order."""
        played = len(self.reports) == len(self.steps) and self.down_in_order
        return played and all(report.held for report in self.reports)

    async def play(self) -> None:
        """Start the host, play, take the host down, whatever the steps came to."""
        self._print(f"payload {self.payload.path}, {self.payload.size} bytes")
        async with self._host() as state:
            containers = None if self.programs is None else Containers(self.programs)
            async with Stage(
                self.directory,
                state,
                self.payload,
                lineage=self.lineage,
                containers=containers,
            ) as stage:
                self._require_backend(stage)
                await scenario.play(stage, self._heard, self.reports, self.steps)

    def _require_backend(self, stage: Stage) -> None:
        if self.backend not in {None, stage.backend}:
            raise ControlError(
                f"--backend {self.backend}: host {stage.state.host} serves views with "
                f"{stage.backend}; leave the option out"
            )

    @asynccontextmanager
    async def _host(self) -> AsyncIterator[HostState]:
        """Have a host: one that stays, or one for this demo."""
        if self.elsewhere is not None:
            yield self.elsewhere
            self.down_in_order = True
            return
        # Whoever crashes here ends the demo: nobody needs a successor.
        plan = launcher.Plan(
            self.directory, host_shape(), spare=False, backend=self.backend
        )
        state = await launcher.start(plan, self._print)
        try:
            yield state
        except (ServiceDiedError, TransportError):
            # The rest of the host stays, to be looked at: down is the next command.
            raise
        except BaseException:
            await asyncio.to_thread(self._kill, state)
            raise
        await asyncio.to_thread(self._down, state)

    def values(self, error: ControlError | TransportError | None) -> dict[str, Any]:
        """Return the whole run as JSON values."""
        payload = self.payload
        values: dict[str, Any] = {
            "host": (self.elsewhere or self.directory).host,
            "lineage": self.lineage.value,
            "skipped": sum(len(report.skipped) for report in self.reports),
            "payload": {
                "path": str(payload.path),
                "size": payload.size,
                "sha256": payload.sha256,
            },
            "steps": [report.values() for report in self.reports],
            "down_in_order": self.down_in_order,
            "held": self.held and error is None,
        }
        if error is not None:
            values["error"] = error_values(error)
        return values

    def print_end(self, error: ControlError | TransportError | None) -> None:
        """Print the summary table, and the sentence about a service that died."""
        assert self.screen is not None
        self.screen.print()
        self.screen.print(_summary(self.reports))
        if error is not None:
            step = self.reports[-1].name if self.reports else "start"
            sys.stderr.write(f"gmemctl: in step {step!r}: {error}\n")
            return
        checks = [check for report in self.reports for check in report.checks]
        held = sum(check.held for check in checks)
        skipped = sum(len(report.skipped) for report in self.reports)
        host = f"host {self.directory.host} is down"
        if self.elsewhere is not None:
            host = f"host {self.elsewhere.host} stays up"
        self._print(
            f"{held} of {len(checks)} checks held in {len(self.reports)} of "
            f"{len(self.steps)} steps"
            + (f", {skipped} skipped" if skipped else "")
            + f"; {host}"
        )

    def _down(self, state: HostState) -> None:
        with locked(self.directory.base):
            try:
                stopper.stop(self.directory, state)
                self.down_in_order = True
            except ControlError as error:
                self._print(str(error))
                stopper.kill(self.directory, state)

    def _kill(self, state: HostState) -> None:
        with locked(self.directory.base):
            stopper.kill(self.directory, state)

    def _heard(self, number: int, step: Step, report: StepReport) -> None:
        if self.screen is None:
            return
        self.screen.print(
            f"\n[bold]{number}. {escape(step.name)}[/]  {escape(step.aim)}"
        )
        for sentence in report.said:
            self._print(f"   {sentence}")
        for check in report.checks:
            word = "[green]ok[/]    " if check.held else "[red]FAILED[/]"
            found = f" ({check.found})" if check.found else ""
            line = f"   {word} {escape(check.sentence + found)}"
            self.screen.print(line, soft_wrap=True)
        for skipped in report.skipped:
            line = (
                f"   [yellow]skipped[/] {escape(f'{skipped.sentence}: {skipped.why}')}"
            )
            self.screen.print(line, soft_wrap=True)
        if report.after is not None:
            for line in counter_lines(report.before, report.after):
                self._print(f"   {line}")

    def _print(self, text: str) -> None:
        if self.screen is not None:
            self.screen.print(text, markup=False, soft_wrap=True)


def _summary(reports: list[StepReport]) -> Table:
    table = Table(title="one conversion, end to end", title_justify="left")
    for column, justify in (("step", "left"), ("checks", "right"), ("s", "right")):
        table.add_column(column, justify="left" if justify == "left" else "right")
    for column in ("1G free", "1G rsvd", "vmemmap saved", "stage 2 1G/2M/4K"):
        table.add_column(column, justify="right")
    table.add_column("")
    for number, report in enumerate(reports, start=1):
        held = sum(check.held for check in report.checks)
        table.add_row(
            f"{number}. {report.name}",
            f"{held}/{len(report.checks)}",
            f"{report.seconds:.2f}",
            *_moves(report),
            "ok" if report.held else "FAILED",
        )
    return table


def _moves(report: StepReport) -> list[str]:
    before, after = report.before, report.after
    if after is None:
        return ["-"] * 4
    levels = f"{after.stage2_1g}/{after.stage2_2m}/{after.stage2_4k}"
    pairs = (
        (before.free, after.free),
        (before.rsvd, after.rsvd),
        (before.vmemmap_saved, after.vmemmap_saved),
    )
    moves = [str(b) if a == b else f"{b} -> {a}" for b, a in pairs]
    return [*moves, levels]
