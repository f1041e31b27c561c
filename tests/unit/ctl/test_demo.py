"""The demo's machinery: reports, programs, who died; the story is in tests/cluster."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gmem.api.host_allocator.v1.host_allocator_pb2 import GetStatisticsResponse
from gmem.api.vmm.v1.vmm_pb2 import GetStage2Response
from gmem.ctl.demo import scenario
from gmem.ctl.demo.children import Child, ChildEndedError, describe
from gmem.ctl.demo.command import run as run_demo
from gmem.ctl.demo.dialect import DIALECTS
from gmem.ctl.demo.report import Change, Snapshot, StepReport, counter_lines
from gmem.ctl.demo.stage import Stage
from gmem.ctl.demo.step import Step
from gmem.ctl.directories import HostDirectory
from gmem.ctl.errors import ControlError, ServiceDiedError
from gmem.ctl.processes import exit_status, record, send, spawn, wait_gone
from gmem.ctl.state import HostState, ServiceRecord, boot_id
from gmem.uapi.errors import BadRequest, Contended, Reason, TransportError
from gmem.uapi.lineage import Lineage

START = Snapshot(
    total=6,
    free=6,
    rsvd=0,
    surp=0,
    vmemmap_saved=24570,
    vmemmap_restored=0,
    free_base_pages=100,
)


def report() -> StepReport:
    return StepReport("name", "aim", START)


def test_a_snapshot_picks_the_1g_pool() -> None:
    statistics = GetStatisticsResponse()
    statistics.pools.add(page_size=1 << 21, nr_huge_pages=99)
    statistics.pools.add(page_size=1 << 30, nr_huge_pages=6, free_huge_pages=5)
    statistics.vmemmap.saved_pages = 7
    statistics.nodes.add(node=0, free_base_pages=10)
    statistics.nodes.add(node=1, free_base_pages=20)
    taken = Snapshot.of(statistics, GetStage2Response(entries_1g=1, entries_4k=16))
    assert (taken.total, taken.free, taken.vmemmap_saved) == (6, 5, 7)
    assert taken.free_base_pages == 30
    assert (taken.stage2_1g, taken.stage2_2m, taken.stage2_4k) == (1, 0, 16)
    assert Snapshot.of(statistics, None).stage2_1g == 0


def test_a_change_that_was_promised_is_a_check() -> None:
    one = report()
    one.finish(replace(START, free=5, rsvd=1), Change(free=-1, rsvd=+1))
    assert one.held
    assert [check.held for check in one.checks] == [True, True]


@pytest.mark.parametrize(
    "after",
    [
        START,
        replace(START, free=5, rsvd=2),
        replace(START, free=5, rsvd=1, surp=1),
        replace(START, free=5, rsvd=1, vmemmap_saved=1),
        replace(START, free=5, rsvd=1, stage2_1g=1),
    ],
)
def test_any_other_change_does_not_hold(after: Snapshot) -> None:
    one = report()
    one.finish(after, Change(free=-1, rsvd=+1, stage2_1g=0))
    assert not one.held


def test_a_step_that_did_not_end_does_not_hold() -> None:
    one = report()
    one.check("fine", held=True)
    assert not one.held


def test_a_report_is_json_and_three_lines() -> None:
    one = report()
    one.say("something")
    one.check("a", held=False, found=IN_USE)
    one.finish(replace(START, free=5), None)
    values = json.loads(json.dumps(one.values()))
    assert values["held"] is False
    assert values["before"]["free"] == 6
    assert values["checks"][0]["found"] == str(IN_USE)
    lines = counter_lines(START, replace(START, free=5))
    assert "Free 6 -> 5" in lines[0]
    assert len(lines) == 3


IN_USE = Contended(Reason.PAGE_IN_USE, "pinned", error_offset=0)


class FakeAllocator:
    async def get_statistics(self) -> GetStatisticsResponse:
        statistics = GetStatisticsResponse()
        statistics.pools.add(page_size=1 << 30)
        return statistics


def sleeping_service(log: Path, name: str) -> ServiceRecord:
    child = spawn([sys.executable, "-c", "import time; time.sleep(100)"], "t", log)
    found = record(name, child.pid)
    assert found is not None
    return ServiceRecord(name, found.pid, found.start_time, "")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    names = ("host_allocator", "keeper", "guest_memfd")
    services = tuple(sleeping_service(tmp_path / "log", name) for name in names)
    state = HostState("demo", "t", boot_id(), services)
    made = Stage(HostDirectory(tmp_path, "demo"), state, cast("Any", None))
    made.allocator = cast("Any", FakeAllocator())
    yield made
    for service in services:
        send(service.process, signal.SIGKILL)
    assert wait_gone([service.process for service in services], 20) == []
    assert all(exit_status(service.pid) for service in services)


async def play(stage: Stage, *steps: Step) -> list[StepReport]:
    reports: list[StepReport] = []
    await scenario.play(stage, lambda *_: None, reports, steps)
    return reports


async def fine(_stage: Stage, report: StepReport) -> None:
    report.check("fine", held=True)


async def refused(_stage: Stage, _report: StepReport) -> None:
    raise IN_USE


FINE = Step("fine", "aim", fine, Change())


async def test_steps_are_played_in_order(stage: Stage) -> None:
    reports = await play(stage, FINE, replace(FINE, name="second"))
    assert [one.name for one in reports] == ["fine", "second"]
    assert all(one.held for one in reports)


async def test_an_unexpected_refusal_ends_the_play_as_a_failed_check(
    stage: Stage,
) -> None:
    reports = await play(stage, Step("no", "aim", refused, Change()), FINE)
    [one] = reports
    assert not one.held
    assert one.checks[-1].found == str(IN_USE)


async def test_an_unknown_exception_goes_its_way(stage: Stage) -> None:
    async def bug(_stage: Stage, _report: StepReport) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await play(stage, Step("bug", "aim", bug, Change()))


@pytest.mark.parametrize("victim", ["host_allocator", "keeper", "guest_memfd"])
async def test_a_service_that_dies_ends_its_step_and_is_named(
    stage: Stage, victim: str
) -> None:
    service = stage.state.service(victim)

    async def waits(_stage: Stage, _report: StepReport) -> None:
        os.kill(service.pid, signal.SIGKILL)
        await asyncio.sleep(100)

    reports: list[StepReport] = []
    with pytest.raises(ServiceDiedError) as caught:
        steps = [FINE, Step("waits", "aim", waits, Change()), FINE]
        await scenario.play(stage, lambda *_: None, reports, steps)
    assert len(reports) == 2
    assert f"{victim} (pid {service.pid}) died" in str(caught.value)
    assert "gmemctl down --host demo" in str(caught.value)
    assert str(caught.value).count("\n") == 0


async def test_an_error_that_a_dead_service_causes_is_told_as_its_death(
    stage: Stage,
) -> None:
    service = stage.state.service("guest_memfd")

    async def fails_first(_stage: Stage, _report: StepReport) -> None:
        asyncio.get_running_loop().call_later(0.1, os.kill, service.pid, signal.SIGKILL)
        raise TransportError("no answer", service="vmm")

    with pytest.raises(ServiceDiedError) as caught:
        await play(stage, Step("fails", "aim", fails_first, Change()))
    assert caught.value.service == "guest_memfd"


async def test_a_service_that_does_not_answer_but_lives_is_told_as_such(
    stage: Stage,
) -> None:
    async def silent(_stage: Stage, _report: StepReport) -> None:
        raise TransportError("no answer", service="vmm")

    with pytest.raises(TransportError, match="no answer"):
        await play(stage, Step("silent", "aim", silent, Change()))


async def test_a_program_answers_refuses_and_ends(tmp_path: Path) -> None:
    child = await Child.start("loader", os.environ, tmp_path / "log")
    comm = Path(f"/proc/{child.pid}/comm")
    with pytest.raises(TransportError, match="broker"):
        await child.ask(
            "open", token="x", broker=str(tmp_path / "none"), file="f", size=1
        )
    assert comm.read_text() == "gmem-loader\n"
    assert await child.end() == 0


async def test_a_program_that_dies_is_told_with_its_signal(tmp_path: Path) -> None:
    child = await Child.start("victim", os.environ, tmp_path / "log")
    os.kill(child.pid, signal.SIGBUS)
    with pytest.raises(ChildEndedError, match=r"signal 7 \(SIGBUS\)") as caught:
        await child.ask("touch")
    assert caught.value.status == -7


def test_ends_are_described() -> None:
    assert describe(0) == "ended with exit status 0"
    assert describe(-9) == "died by signal 9 (SIGKILL)"
    assert "kernel" in describe(None)


def test_programs_have_no_grpc_and_no_loop() -> None:
    code = (
        "import sys; import gmem.ctl.demo.loader, gmem.ctl.demo.victim, "
        "gmem.ctl.demo.device; "
        "sys.exit(' '.join({'grpc', 'asyncio', 'google'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_refusal_survives_the_pipe() -> None:
    from gmem.ctl.demo.program import _answer

    def refuse(**_arguments: object) -> dict[str, Any]:
        raise BadRequest(Reason.RANGE_EMPTY, "nothing", size=0)

    answer = _answer(refuse, {})
    assert answer["error"]["reason"] == "RANGE_EMPTY"
    assert answer["error"]["numbers"] == {"size": 0}


def test_every_lineage_has_a_demo_or_says_why_not() -> None:
    assert set(scenario.STEPS_OF) | set(scenario.NO_DEMO) == set(Lineage)
    assert not set(scenario.STEPS_OF) & set(scenario.NO_DEMO)
    assert set(DIALECTS) == set(scenario.STEPS_OF)


def test_a_lineage_without_a_demo_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    directory = HostDirectory(tmp_path, "demo")
    with pytest.raises(ControlError, match=r"MAINLINE has neither.*use --lineage RFC_"):
        run_demo(directory, None, as_json=True, lineage=Lineage.MAINLINE)
    assert list(tmp_path.iterdir()) == []
