"""The end of things: inodes, sessions, services and keepers that go, or are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gmem.guest_memfd.core.values import PageState, ViewKind
from tests.support.view_world import (
    PAGE,
    MakeWorld,
    Remote,
    World,
    parked,
    python_environment,
    revoke,
    set_state,
    touch_without_waiting,
    wait_for,
)

pytestmark = pytest.mark.fuse

HOST = ViewKind.HOST
SIGBUS = -signal.SIGBUS


def test_a_removed_inode_fails_closed(world: World) -> None:
    client = world.client(world.add())
    client.ask("store", args=[0, "x"])
    revoke(world, 0, 64)
    world.server.ask("remove", ino=1)
    assert client.ask("read", args=[0]) == "EFAULT"
    assert client.call("fstat") == "ESTALE"
    assert not (world.dir / "inode-1").exists()


def test_stop_ends_threads_and_what_is_parked(world: World) -> None:
    client = world.client(world.add())
    world.server.ask("policy", name="never")
    touch_without_waiting(client)
    wait_for(parked(world))
    world.server.ask("stop")
    assert client.exit_status() == SIGBUS
    assert world.server.ask("threads") == ["MainThread"]
    world.end()
    assert world.keeper.returncode == 0


def test_a_killed_service_is_stood_in_for_until_a_successor_takes_over(
    world: World,
) -> None:
    client = world.client(world.add())
    client.ask("store", args=[0, "cached"])
    world.kill()
    # What is there is answered; a hole and fstat wait for who comes next.
    client.ask("store", args=[1, "more"])
    touch_without_waiting(client, 9)
    world.serve()
    assert client.answer() == "\0"
    assert client.call("fstat")["st_size"] == 64 * PAGE
    revoke(world, 0, 1)
    assert world.server.ask("get", ino=1, pgoff=0, count=6) == "cmored"
    world.end()
    events = [line["event"] for line in world.log()]
    assert events[:7] == [
        *("ready", "handed_over", "attached", "service_lost"),
        *("handed_over", "stood_in", "taken_over"),
    ]


def test_a_stand_in_answers_what_is_there_and_stores_what_comes_back(
    world: World,
) -> None:
    client = world.client(world.add())
    client.ask("fill", args=[0, 32 * PAGE, "dirty"])
    set_state(world, 40, 41, PageState.CLOSED)
    world.kill()
    # Nobody but the keeper is there: pages go out, and come in again.
    assert client.call("sync_and_forget", 0, 32 * PAGE) is None
    assert client.ask("load", args=[31 * PAGE, 5]) == "dirty"
    assert client.ask("read", args=[40 * PAGE]) == "EFAULT"
    world.serve()
    assert world.server.ask("get", ino=1, pgoff=31, count=5) == "dirty"


def test_a_service_that_stays_away_fails_closed_and_the_keeper_says_so(
    make_world: MakeWorld,
) -> None:
    world = make_world(take_over_seconds=0.5)
    client = world.client(world.add())
    client.ask("store", args=[0, "cached"])
    world.kill()
    assert world.keeper.wait(20) == 3
    lines = world.log()
    events = [line["event"] for line in lines]
    assert events[3:] == ["service_lost", "gave_up", "service_died"]
    assert "no service came in 0.5 s" in lines[-2]["error"]
    assert "fail closed" in lines[-1]["error"]
    assert client.ask("load", args=[0, 6]) == "cached"
    assert client.call("fstat") == "ENOTCONN"
    touch_without_waiting(client, 9)
    assert client.exit_status() == SIGBUS


@pytest.mark.parametrize("mounted", [True, False], ids=["at a path", "nowhere"])
def test_a_service_killed_inside_an_invalidation_is_reaped_and_loses_nothing(
    make_world: MakeWorld, mounted: bool
) -> None:
    world = make_world(mounted=mounted)
    world.add(size=512 * PAGE)
    fd = world.server.ask("open_view", ino=1, view=HOST)
    client = world.client(fd, length=512 * PAGE)
    client.ask("fill", args=[0, 512 * PAGE, "dirty"])
    client.tell("hammer", args=[[at * PAGE for at in range(512)], "write"])
    world.server.tell("invalidate_all", ino=1, ranges=[[0, 512]] * 6)
    time.sleep(0.02)
    world.kill()
    world.serve()
    client.tell("fds")
    rounds = client.answer()["rounds"]
    client.answer()
    last = chr((rounds - 1) & 0x7F | 0x80)
    for at in range(0, 512, 51):
        assert client.ask("load", args=[at * PAGE, 5]) == last + "irty"


def test_a_killed_keeper_is_not_missed_until_the_service_ends(world: World) -> None:
    client = world.client(world.add())
    world.keeper.kill()
    world.keeper.wait()
    assert client.ask("load", args=[0]) == "\0"
    revoke(world, 0, 1)
    world.kill()
    wait_for(lambda: client.call("fstat") == "ENOTCONN")
    touch_without_waiting(client, 9)
    assert client.exit_status() == SIGBUS
    clean_up_after(world)


def clean_up_after(world: World) -> None:
    """What the next start does with a mount and a socket that a crash left."""
    assert f" {world.dir} " in Path("/proc/mounts").read_text()
    with World(world.run_dir.parent) as second:
        path = second.add()
        assert second.client(path).ask("load", args=[0]) == "\0"


def test_a_terminated_keeper_takes_the_views_along(world: World) -> None:
    client = world.client(world.add())
    client.ask("store", args=[0, "cached"])
    world.keeper.terminate()
    assert world.keeper.wait(20) == 0
    assert client.call("fstat") == "ENOTCONN"
    assert f" {world.dir} " not in Path("/proc/mounts").read_text()
    touch_without_waiting(client, 9)
    assert client.exit_status() == SIGBUS


WITHOUT_SYS_ADMIN = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "gmem.keeper", *sys.argv[1:]])
"""


def run_keeper(*command: str, run_dir: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir), "--store-pages", "16"],
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, json.loads(done.stderr.splitlines()[-1])


def test_a_keeper_without_privileges_says_what_it_needs(tmp_path: Path) -> None:
    command = (sys.executable, "-c", WITHOUT_SYS_ADMIN)
    status, line = run_keeper(*command, run_dir=tmp_path)
    assert (status, line["event"]) == (1, "cannot_start")
    assert "CAP_SYS_ADMIN" in line["error"]


def test_a_second_keeper_of_a_host_does_not_start(world: World) -> None:
    command = (sys.executable, "-m", "gmem.keeper")
    status, line = run_keeper(*command, run_dir=world.run_dir)
    assert (status, line["event"]) == (1, "cannot_start")
    assert "another process listens" in line["error"]
    assert world.client(world.add()).ask("load", args=[0]) == "\0"


def test_the_mount_is_tuned_and_only_its_owner_gets_a_second_service(
    world: World,
) -> None:
    bdi = Path(f"/sys/class/bdi/0:{world.connection}")
    assert (bdi / "max_ratio").read_text().strip() == "100"
    assert (bdi / "strict_limit").read_text().strip() == "0"
    assert (bdi / "read_ahead_kb").read_text().strip() == "1024"
    second = Remote("tests.support.view_server", str(world.run_dir))
    second.tell("options")
    with pytest.raises(EOFError):
        second.answer()
    second.end()
