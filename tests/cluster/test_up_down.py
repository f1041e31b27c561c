"""gmemctl up, status, down: real services, and nothing left of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.hosts import wait_until
from tests.support.requirements import require_fuse, require_root
from tests.support.view_world import python_environment

SMALL = ("--nodes", "2", "--memory", "8G", "--pool", "1G:2@1", "--pool", "2M:8")
SERVICES = ["host_allocator", "keeper", "guest_memfd", "vmm-0", "vmm-1"]


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    require_fuse()
    require_root()
    with gmemctl() as made:
        yield made


def test_a_host_goes_up_answers_and_goes_down(ctl: Gmemctl) -> None:
    up = ctl("up", *SMALL, "--vmms", "2", "--json")
    assert (up.status, up.err) == (0, "")
    services = up.json["services"]
    assert [service["service"] for service in services] == SERVICES
    assert [service["state"] for service in services if service["target"]] == [
        "serving"
    ] * 4

    status = ctl("status")
    assert status.status == 0
    for service in services:
        assert f"{service['pid']}" in status.out

    meminfo = ctl("meminfo")
    assert "HugePages_Total:       8\n" in meminfo.out
    assert "MemTotal:" in meminfo.out
    statistics = ctl("meminfo", "--json").json
    pools = {pool["page_size"]: pool["nodes"] for pool in statistics["pools"]}
    assert [node["nr_huge_pages"] for node in pools[1 << 30]] == [0, 2]
    assert [node["nr_huge_pages"] for node in pools[1 << 21]] == [4, 4]
    assert ctl("inode", "list", "--json").json == {"inodes": []}

    unknown = ctl("inode", "show", "7")
    assert unknown.status == 1
    assert unknown.err.startswith("gmemctl: ENOENT (inode_unknown)")
    assert unknown.err.count("\n") == 1

    down = ctl("down")
    assert (down.status, down.err) == (0, "")
    assert ctl.leftovers() == []


def test_logs_are_json_lines(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    for name in SERVICES[:4]:
        log = ctl.base / "local" / "log" / f"{name}.jsonl"
        lines = [line for line in log.read_text().splitlines() if line != "ready"]
        assert "ready" in [json.loads(line)["event"] for line in lines]


def test_a_second_up_says_that_the_host_runs(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    before = ctl.pids("local")
    again = ctl("up", *SMALL)
    assert again.status == 2
    assert "runs already" in again.err
    assert "gmemctl down --host local" in again.err
    assert ctl.pids("local") == before


def test_two_hosts_do_not_know_each_other(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL, "--host", "a").status == 0
    assert ctl("up", *SMALL, "--host", "b").status == 0
    assert len(ctl("status", "--json").json["services"]) == 8
    assert ctl("down", "--host", "a").status == 0
    assert ctl("status", "--host", "b").status == 0
    assert ctl("down", "--host", "b").status == 0
    assert ctl.leftovers() == []


@pytest.mark.parametrize("service", ["host_allocator", "keeper", "vmm-0"])
@pytest.mark.parametrize("force", [False, True], ids=["down", "force"])
def test_down_leaves_nothing_when_a_service_was_killed(
    ctl: Gmemctl, service: str, force: bool
) -> None:
    assert ctl("up", *SMALL).status == 0
    os.kill(ctl.pids("local")[service], signal.SIGKILL)

    status = ctl("status")
    assert status.status == 3
    assert "dead" in status.out
    again = ctl("up", *SMALL)
    assert again.status == 2
    assert "is broken" in again.err
    assert "gmemctl down --host local --force" in again.err

    down = ctl("down", *(["--force"] if force else []))
    assert (down.status, down.err) == (0, "")
    assert ctl.leftovers() == []


@pytest.mark.parametrize("force", [False, True], ids=["down", "force"])
def test_a_killed_guest_memfd_comes_back_and_down_leaves_nothing(
    ctl: Gmemctl, force: bool
) -> None:
    assert ctl("up", *SMALL).status == 0
    first = ctl.pids("local")
    os.kill(first["guest_memfd"], signal.SIGKILL)
    wait_until(lambda: ctl("status").status == 0, "a whole host", 60.0)
    second = ctl.pids("local")
    assert second["guest_memfd"] != first["guest_memfd"]
    assert second["keeper"] == first["keeper"]
    assert ctl("inode", "list", "--json").json == {"inodes": []}

    down = ctl("down", *(["--force"] if force else []))
    assert (down.status, down.err) == (0, "")
    assert ctl.leftovers() == []


@pytest.mark.parametrize("force", [False, True], ids=["down", "force"])
def test_status_tells_of_a_spare_and_down_ends_it(ctl: Gmemctl, force: bool) -> None:
    assert ctl("up", *SMALL).status == 0
    before = ctl.pids("local")

    def spares() -> dict[str, int]:
        found: dict[str, int] = ctl("status", "--json").json["spares"]
        return found

    wait_until(lambda: "local" in spares(), "a spare", 60.0)
    spare = spares()["local"]
    # It is no service: it is not asked, and nothing is bad without it.
    assert spare not in before.values()
    assert ctl.pids("local") == before
    sentence = f"local: spare process {spare} waits to succeed guest_memfd"
    assert sentence in ctl("status").out.splitlines()

    down = ctl("down", *(["--force"] if force else []))
    assert (down.status, down.err) == (0, "")
    assert ctl.leftovers() == []


def test_up_without_a_spare_says_so_to_the_keeper(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL, "--no-spare").status == 0
    command = Path(f"/proc/{ctl.pids('local')['keeper']}/cmdline").read_bytes()
    assert b"--spare" not in command.split(b"\0")
    assert ctl("status", "--json").json["spares"] == {}


def test_down_force_ends_a_service_that_is_being_started_again(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    os.kill(ctl.pids("local")["guest_memfd"], signal.SIGKILL)
    assert ctl("down", "--force").status == 0
    assert ctl.leftovers() == []


def test_repair_starts_a_killed_keeper_again(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    idle = ctl("up", "--repair")
    assert (idle.status, "nothing to repair" in idle.out) == (0, True)
    os.kill(ctl.pids("local")["keeper"], signal.SIGKILL)
    assert ctl("up", "--repair").status == 0
    first = ctl.pids("local")
    # The new one can do what the old one could.
    os.kill(first["guest_memfd"], signal.SIGKILL)
    wait_until(lambda: ctl("status").status == 0, "a whole host", 60.0)
    assert ctl.pids("local")["keeper"] == first["keeper"]
    assert ctl("down").status == 0
    assert ctl.leftovers() == []


def test_repair_says_when_nobody_has_the_views_any_more(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    pids = ctl.pids("local")
    for service in ("keeper", "guest_memfd"):
        os.kill(pids[service], signal.SIGKILL)
    repair = ctl("up", "--repair")
    assert repair.status == 2
    assert "have both ended" in repair.err
    assert ctl("down", "--force").status == 0


def test_up_cleans_what_a_crash_of_everything_left(ctl: Gmemctl) -> None:
    assert ctl("up", *SMALL).status == 0
    # It ends a moment after its keeper.
    wait_until(lambda: bool(ctl("status", "--json").json["spares"]), "a spare", 60.0)
    for pid in ctl.pids("local").values():
        os.kill(pid, signal.SIGKILL)
    assert list(ctl.base.glob("local/*.sock"))
    up = ctl("up", *SMALL)
    assert up.status == 0
    assert "left by a host that is gone" in up.out
    assert ctl("down").status == 0
    assert ctl.leftovers() == []


def test_a_keeper_that_may_not_mount_says_so_and_nothing_is_left(ctl: Gmemctl) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv (util-linux) to take a capability away")
    without = (setpriv, "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
    up = ctl("up", *SMALL, prefix=without)
    assert up.status == 3
    assert "keeper cannot start: " in up.err
    assert "CAP_SYS_ADMIN" in up.err
    assert up.err.count("\n") == 1
    assert ctl.leftovers() == []


def test_an_interrupted_up_leaves_nothing(ctl: Gmemctl) -> None:
    child = subprocess.Popen(
        ctl.command("up", *SMALL),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ctl.environ,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("host_allocator answers")
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) != 0
    child.stdout.close()
    assert ctl.leftovers() == []


def test_down_finds_what_a_killed_up_had_started(ctl: Gmemctl) -> None:
    with subprocess.Popen(
        ctl.command("up", *SMALL), stdout=subprocess.PIPE, text=True, env=ctl.environ
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("host_allocator answers")
        child.kill()
    assert ctl("down", "--force").status == 0
    assert ctl.leftovers() == []


def test_a_run_dir_too_long_for_sockets_starts_nothing(ctl: Gmemctl) -> None:
    long = ctl.base / ("x" * 90)
    up = ctl("up", *SMALL, "--run-dir", str(long))
    assert up.status == 2
    assert "UNIX socket" in up.err
    assert not Path(long).exists()


@pytest.mark.parametrize("kind", ["host_allocator", "guest_memfd", "vmm"])
def test_a_service_that_is_held_ends_with_whoever_holds_it(
    kind: str, tmp_path: Path
) -> None:
    arguments = ("--run-dir", str(tmp_path), "--start-on-stdin", "1")
    held = subprocess.Popen(
        [sys.executable, "-m", f"gmem.{kind}", *arguments],
        stdin=subprocess.PIPE,
        env=python_environment(),
    )
    with pytest.raises(subprocess.TimeoutExpired):
        held.wait(0.5)
    assert held.stdin is not None
    held.stdin.close()
    assert held.wait(60) == 0
    assert list(tmp_path.iterdir()) == []
