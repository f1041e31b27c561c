"""Histories, one per seed: faults first, then none, and at the end nothing is left."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from gmem.effects import Op
from gmem.uapi.errors import KernelError, NoSuchObject
from gmem.uapi.lineage import Lineage
from tests.sim import checkers, error_checkers
from tests.sim.machines import Machine
from tests.sim.options import Options
from tests.sim.workload import Workload
from tests.sim.world import World

STEPS_MAX: Final = 40_000


@dataclass(frozen=True, slots=True)
class History:
    """What became of one seed; `failure` is empty where every invariant held."""

    seed: int
    lineage: Lineage
    options: Options
    steps: int
    trace_hash: str
    marks: Counter[str]
    failure: str

    @property
    def replay(self) -> str:
        """The command that runs the same history again."""
        return f"python -m tests.sim --lineage {self.lineage} --seed {self.seed}"


def run(
    seed: int,
    show: Callable[[str], None] | None = None,
    *,
    options: Options | None = None,
    lineage: Lineage | None = None,
) -> History:
    """Run one history to its end, or to the first invariant that does not hold.

    `options` and `lineage` None: of the seed. `show` gets a line for each effect.
    """
    world = World(seed, options, lineage)
    drawn = world.options
    world.print = show
    failure = ""
    try:
        _safety_then_liveness(world)
    except Exception as error:  # noqa: BLE001 - whatever a core raises is the finding
        frames = traceback.extract_tb(error.__traceback__)
        *_, last = [frame for frame in frames if frame.name != "broken"]
        where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
        failure = f"{type(error).__name__}: {error} ({where})"
        world.abandon()
    return History(
        seed,
        world.lineage,
        drawn,
        world.steps,
        world.trace_hash,
        world.marks,
        failure,
    )


def _safety_then_liveness(world: World) -> None:
    workload = Workload(world)

    host = workload.host
    host.on_converted += [
        partial(checkers.split_iff_some_page_is_shared, host),
        partial(error_checkers.what_was_converted_is_shown, host),
    ]
    host.on_refused = partial(checkers.what_came_before_a_refusal_is_converted, host)
    workload.begin()
    _drain(workload)

    world.options = world.options.healed()
    workload.give_base_memory()
    _drain(workload)
    _require_finished(workload)
    for machine in list(workload.machines):
        workload.run("settle", _settle(workload, machine))
    _drain(workload)
    _require_finished(workload)
    if world.random.random() < 0.5:
        # Then nothing is lost any more.
        workload.forget_errors()
        _drain(workload)
        _require_finished(workload)
    for machine in list(workload.machines):
        workload.run("end", workload.end(machine))
    _drain(workload)
    workload.forget_errors()
    _drain(workload)
    _require_nothing_left(workload)


def _drain(workload: Workload) -> None:
    """Go on until nothing is under way any more."""
    world = workload.world
    while world.step():
        if world.steps > STEPS_MAX:
            world.broken(f"not finished after {STEPS_MAX} steps: {_unfinished(world)}")
        if world.chance(world.options.poison):
            workload.strike()
        if world.changed:
            world.changed = False
            checkers.check(workload.host)


def _require_finished(workload: Workload) -> None:
    world = workload.world
    if world.tasks or workload.running:
        world.broken(f"never finished: {_unfinished(world)}")
    checkers.everything_is_at_rest(workload.host)


def _unfinished(world: World) -> str:
    return ", ".join(
        f"#{task.number} {task.name} in {type(task.effect).__name__}"
        for task in world.tasks.values()
    )


def _settle(workload: Workload, machine: Machine) -> Op[None]:
    """Without faults, every conversion of a whole VM must succeed."""
    while workload.holds:
        # Some went with their client.
        with suppress(NoSuchObject):
            yield from workload.unpin(machine)
    if not machine.slots or not all(file.open for file in machine.files):
        return
    for private in (True, False, True):
        workload.forget(machine, machine.all_gfns)
        try:
            yield from workload.set_attributes(
                machine, machine.all_gfns, private=private
            )
        except KernelError as error:
            workload.world.broken(f"a conversion was refused after all: {error}")


def _require_nothing_left(workload: Workload) -> None:
    _require_finished(workload)
    host = workload.host
    if host.guest_memfd.handles:
        host.world.broken(f"reservations {host.guest_memfd.handles} are left")
    if host.guest_memfd.numbers:
        host.world.broken(f"inodes {host.guest_memfd.numbers} are left")
    host.allocator.unreserve(host.hog)
    expected = host.errors.without_lost_folios(workload.at_boot)
    at_end = host.allocator.statistics().levels()
    if replace(at_end, meminfo=expected.meminfo) != expected:
        host.world.broken(f"{expected} expected, {at_end} at the end")
