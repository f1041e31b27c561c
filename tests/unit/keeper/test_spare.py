"""A successor that waits: spawned in time, let go, replaced, and never for ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmem.keeper import pids
from gmem.keeper.restarts import RESTART_SECONDS, RESTARTS_MAX, ServicePlan
from gmem.keeper.spare import Spare
from gmem.testing.hosts import wait_until

SECONDS_MAX = 30
# Ends with 7 when it gets its line, with 1 when nobody is there to give it any more.
WAITS = ("sh", "-c", "read line && exit 7")
CANNOT_LOAD = ("sh", "-c", "exit 3")


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Spare]:
    spare = Spare(ServicePlan(WAITS, spare=True), tmp_path)
    spare.want(5.0)
    spare.look(5.0)
    yield spare
    spare.close()


def written(run_dir: Path) -> int:
    """The pid of the spare that waits, for people who look; 0: none does."""
    path = run_dir / pids.SPARE
    return int(path.read_text().split()[0]) if path.exists() else 0


def ended(pid: int) -> None:
    """Wait until a child has ended, and leave it for its parent to look at."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def said(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_it_is_spawned_when_it_is_wanted_and_not_before(tmp_path: Path) -> None:
    spare = Spare(ServicePlan(WAITS, spare=True), tmp_path)
    spare.look(1.0)
    assert spare.take() is None
    spare.want(5.0)
    spare.look(4.9)
    assert written(tmp_path) == 0
    spare.look(5.0)
    first = written(tmp_path)
    assert pids.is_alive(tmp_path / pids.SPARE)
    spare.want(6.0)
    spare.look(6.0)
    assert written(tmp_path) == first
    spare.close()


@pytest.mark.parametrize(
    "plan", [ServicePlan(WAITS), ServicePlan(spare=True)], ids=["not-said", "command"]
)
def test_there_is_none_where_nothing_says_so(plan: ServicePlan, tmp_path: Path) -> None:
    spare = Spare(plan, tmp_path)
    spare.want(1.0)
    spare.look(2.0)
    assert spare.take() is None
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_taken_starts_and_no_other_comes_unasked(
    waiting: Spare, tmp_path: Path
) -> None:
    pid = written(tmp_path)
    child = waiting.take()
    assert child is not None
    assert (child.pid, child.wait(SECONDS_MAX)) == (pid, 7)
    waiting.look(1000.0)
    assert waiting.take() is None
    assert list(tmp_path.iterdir()) == []
    waiting.want(1001.0)
    waiting.look(1001.0)
    assert written(tmp_path) not in {0, pid}


def test_one_that_was_killed_is_replaced(
    waiting: Spare, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path)
    os.kill(first, signal.SIGKILL)
    ended(first)
    waiting.look(6.0)
    assert written(tmp_path) not in {0, first}
    lines = [line for line in said(capfd) if line["event"] == "spare_died"]
    assert [(line["pid"], line["status"]) for line in lines] == [(first, -9)]


def test_one_that_was_killed_and_not_missed_yet_is_not_taken(
    waiting: Spare, tmp_path: Path
) -> None:
    pid = written(tmp_path)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert waiting.take() is None
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.iterdir()) == []


def test_one_that_hears_nobody_is_ended_and_not_taken(tmp_path: Path) -> None:
    deaf = f"exec <&-; echo >{tmp_path}/deaf; exec sleep 60"
    spare = Spare(ServicePlan(("sh", "-c", deaf), spare=True), tmp_path)
    spare.want(0.0)
    spare.look(0.0)
    pid = written(tmp_path)
    wait_until((tmp_path / "deaf").exists, "closing its stdin", SECONDS_MAX)
    assert spare.take() is None
    assert not Path(f"/proc/{pid}").exists()


def test_what_cannot_load_is_tried_as_often_as_a_service_and_no_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spare = Spare(ServicePlan(CANNOT_LOAD, spare=True), tmp_path)

    def spawned_until(now: float, seconds: float) -> int:
        """How many were spawned from `now` on; each has ended when looked at."""
        for tick in range(int(seconds * 10)):
            spare.look(now + tick / 10)
            if pid := written(tmp_path):
                ended(pid)
        return [line["event"] for line in said(capfd)].count("spare_spawned")

    spare.want(0.0)
    assert spawned_until(0.0, 600.0) == 1 + RESTARTS_MAX
    assert spare.take() is None
    # After the next takeover it is tried again.
    spare.want(600.0)
    assert spawned_until(600.0, RESTART_SECONDS) == 1 + RESTARTS_MAX


def test_a_command_that_is_not_there_is_tried_no_more_often(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spare = Spare(ServicePlan((str(tmp_path / "missing"),), spare=True), tmp_path)
    spare.want(0.0)
    for now in range(600):
        spare.look(float(now))
    events = [line["event"] for line in said(capfd)]
    assert events == ["cannot_spawn_spare"] * (1 + RESTARTS_MAX) + ["no_spare"]
