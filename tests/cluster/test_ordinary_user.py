"""A whole host of an ordinary user: no privilege anywhere but in fusermount3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmem.ctl.launcher import log_lines
from gmem.keeper.pids import SPARE
from gmem.testing.watchdog import FuseWatchdog
from tests.support.hosts import wait_until
from tests.support.ordinary_user import ROOT, UserPlace, user_place

pytestmark = pytest.mark.fuse

SMALL = ("--nodes", "1", "--memory", "6G", "--pool", "1G:2", "--pool", "2M:8")
FUSE_BOUND_SECONDS = 90.0
SLOWER = "rewriting guest memory through a mapping is 8 to 10 times slower"
# Writes through a mapping, and again after it was told to; then reads all of it.
WRITER = """
import sys
from pathlib import Path
from gmem.client.sync import GuestMemfdClient
from gmem.memory import open_host_view

with GuestMemfdClient(f"unix:{sys.argv[1]}/guest_memfd.sock") as gmem:
    size = 2 << 20
    made = gmem.create_guest_memfd(
        size=size, page_size=size, lineage="RFC_V2", support_shared=True
    )
    view = gmem.open_view(name=made.name)
    window = open_host_view(view.token, view.broker_path)
    for at in range(0, size, 4096):
        window.write(at, b"before")
    print("wrote", flush=True)
    sys.stdin.readline()
    for at in range(0, size, 4096):
        window.write(at + 8, b"after")
    for at in range(0, size, 4096):
        assert window.read(at, 13) == b"before\\0\\0after", at
    print(gmem.get_capabilities().mapped_source, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def place(reachable_python: None) -> Iterator[UserPlace]:
    with user_place() as made:
        yield made


@contextmanager
def host_of(place: UserPlace) -> Iterator[Path]:
    """Have nobody start a host; end it, and leave nothing."""
    run_dir = place.runtime / "gmem" / "local"
    with FuseWatchdog(bound_seconds=FUSE_BOUND_SECONDS) as watchdog:
        up = place.gmemctl("up", *SMALL)
        try:
            assert up.returncode == 0, up.stderr
            connection = int(ready_of(run_dir)["connection_id"])
            watchdog.watch(connection)
            assert SLOWER in up.stdout
            assert "mounted by fusermount3 as an ordinary user" in up.stdout
            yield run_dir
        finally:
            down = place.gmemctl("down")
            if down.returncode:
                place.gmemctl("down", "--force")
        assert down.returncode == 0, down.stderr
        watchdog.release(connection)
        assert watchdog.aborted == []


def ready_of(run_dir: Path) -> dict[str, Any]:
    lines = log_lines(run_dir / "log" / "keeper.jsonl")
    (ready,) = [line for line in lines if line["event"] == "ready"]
    return ready


def pid_of(run_dir: Path, service: str) -> int:
    if service == "guest_memfd":
        return int((run_dir / "guest_memfd.pid").read_text().split()[0])
    services = json.loads((run_dir / "state.json").read_text())["services"]
    (pid,) = [one["pid"] for one in services if one["name"] == service]
    return int(pid)


def test_a_host_without_any_privilege_converts_memory(place: UserPlace) -> None:
    with host_of(place) as run_dir:
        for service in ("host_allocator", "keeper", "guest_memfd", "vmm-0"):
            status = Path(f"/proc/{pid_of(run_dir, service)}/status").read_text()
            words = dict(line.split(":", 1) for line in status.splitlines())
            assert set(words["Uid"].split()) == {"65534"}
            assert int(words["CapEff"], 16) == int(words["CapPrm"], 16) == 0
        # The way in is gone already: a crash leaves nothing in a mount table.
        assert place.mounts() == []
        assert not (run_dir / "mnt").exists()
        assert ready_of(run_dir)["crash_survival"] == "on"

        example = str(ROOT / "docs" / "examples" / "first_conversion.py")
        done = place.run(sys.executable, example, str(run_dir))
        assert done.returncode == 0, done.stderr
        assert "to private: EINVAL (page_in_use)" in done.stdout
        assert "to private: done" in done.stdout
        assert "exit code -7" in done.stdout
        assert "the first 4K to shared: done" in done.stdout

        told = place.gmemctl("status")
        assert told.returncode == 0
        assert f"local: {SLOWER}" in told.stdout
        assert "reports of clients alone" in told.stdout
        limits = json.loads(place.gmemctl("status", "--json").stdout)["limits"]
        assert limits == {"local": ready_of(run_dir)["limits"]}


def test_a_killed_guest_memfd_is_not_felt(place: UserPlace) -> None:
    with host_of(place) as run_dir:
        writer = subprocess.Popen(
            place.command(sys.executable, "-c", WRITER, str(run_dir)),
            env=place.environment(),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            assert writer.stdout.readline() == "wrote\n"
            wait_until((run_dir / SPARE).exists, "a spare")
            spare = int((run_dir / SPARE).read_text().split()[0])
            first = pid_of(run_dir, "guest_memfd")
            os.kill(first, signal.SIGKILL)
            writer.stdin.write("go on\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "reported\n"
            wait_until(lambda: pid_of(run_dir, "guest_memfd") != first, "a successor")
            assert place.gmemctl("status", "--wait", "30").returncode == 0
            assert pid_of(run_dir, "guest_memfd") == spare
            writer.stdin.write("end\n")
        assert writer.returncode == 0


def test_a_mount_that_a_crash_left_is_taken_away(place: UserPlace) -> None:
    # Whoever wants to unmount is killed: the keeper, then gmemctl.
    script = place.base / "home" / "fusermount3"
    script.write_text(
        '#!/bin/sh\nif [ "$1" = -u ]; then kill -9 $PPID; exit 1; fi\n'
        'exec /usr/bin/fusermount3 "$@"\n'
    )
    script.chmod(0o755)
    up = place.gmemctl("up", *SMALL, PATH=f"{script.parent}:/usr/bin:/bin")
    assert up.returncode == -signal.SIGKILL
    (line,) = place.mounts()
    assert str(place.runtime / "gmem" / "local" / "mnt") in line
    down = place.gmemctl("down", "--force")
    assert down.returncode == 0, down.stderr
    assert place.mounts() == []
    with host_of(place):
        assert place.mounts() == []


def test_a_fusermount3_that_may_not_mount_is_named_and_nothing_is_left(
    reachable_python: None,
) -> None:
    with user_place(setuid=False) as place:
        up = place.gmemctl("up", *SMALL)
        assert up.returncode == 3
        assert "cannot mount FUSE: " in up.stderr
        assert "fusermount3: mount failed: Operation not permitted" in up.stderr
        up = place.gmemctl("up", *SMALL, PATH=str(place.base / "home"))
        assert up.returncode == 3
        assert "install the package fuse3" in up.stderr
