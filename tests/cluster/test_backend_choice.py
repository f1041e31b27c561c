"""Who chooses plain memfds: a flag or a variable, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gmem.ctl.demo.weaker import DIED, IOCTL
from gmem.guest_memfd.__main__ import EXIT_NO_KEEPER
from gmem.runtime.backend import BACKEND_VARIABLE
from tests.support.gmemctl import Ended, Gmemctl, gmemctl
from tests.support.hosts import wait_until
from tests.support.ordinary_user import NOBODY, status_of
from tests.support.requirements import require_fuse, require_root

SMALL = ("--nodes", "1", "--memory", "1G", "--pool", "2M:1")
UNREACHABLE = 3


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    with gmemctl() as made:
        yield made


def backends(ctl: Gmemctl) -> list[str]:
    services = ctl("status", "--json").json["services"]
    return [one["backend"] for one in services if one["service"] == "guest_memfd"]


# Where FUSE cannot be mounted.


def require_refusal(ended: Ended, *words: str) -> None:
    assert ended.status == UNREACHABLE
    assert "keeper cannot start" in ended.err
    for word in (*words, "--backend memfd", "reads as zeros"):
        assert word in ended.err


def test_without_the_right_to_mount_up_fails_and_names_the_flag(ctl: Gmemctl) -> None:
    require_fuse()
    require_root()
    if shutil.which("setpriv") is None:
        pytest.skip("needs the program setpriv")
    prefix = ("setpriv", "--bounding-set=-sys_admin")
    ended = ctl("up", *SMALL, prefix=prefix)
    require_refusal(ended, "cannot mount FUSE", "CAP_SYS_ADMIN")
    assert ctl.leftovers() == []
    # Said, it works there: nothing of it needs the right.
    said = ctl("up", *SMALL, "--backend", "memfd", prefix=prefix)
    assert said.status == 0, said.err
    assert backends(ctl) == ["memfd"]
    assert ctl("down").status == 0
    assert ctl.leftovers() == []


def test_without_the_device_up_fails_and_names_the_flag(ctl: Gmemctl) -> None:
    require_root()
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    bare = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && "
    devices = "mknod -m 666 /dev/urandom c 1 9 && mkdir -m 1777 /dev/shm && "
    prefix = ("unshare", "--mount", "sh", "-c", f'{bare}{devices}exec "$@"', "sh")
    ended = ctl("up", *SMALL, prefix=prefix)
    require_refusal(ended, "/dev/fuse")
    assert ctl.leftovers() == []


# Who says it.


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_flag_or_the_variable_chooses(
    ctl: Gmemctl, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    words: tuple[str, ...] = ()
    if by == "flag":
        words = ("--backend", "memfd")
    else:
        monkeypatch.setenv(BACKEND_VARIABLE, "memfd")
    assert ctl("up", *SMALL, *words).status == 0
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert backends(ctl) == ["memfd"]
    table = ctl("status").out.splitlines()
    (line,) = [line for line in table if " guest_memfd " in line]
    assert line.split()[4] == "memfd"
    assert ctl("down").status == 0


def test_another_word_is_refused(ctl: Gmemctl) -> None:
    ended = ctl("up", "--backend", "tmpfs")
    assert ended.status == 2
    assert "tmpfs" in ended.err
    assert ctl.leftovers() == []


def test_a_service_of_another_backend_than_its_keeper_does_not_start(
    tmp_path: Path,
) -> None:
    run_dir = ("--run-dir", str(tmp_path))
    keeper = subprocess.Popen(
        [sys.executable, "-m", "gmem.keeper", "--backend", "memfd", *run_dir]
    )
    try:
        wait_until((tmp_path / "keeper.sock").exists, "the keeper")
        ended = subprocess.run(
            [sys.executable, "-m", "gmem.guest_memfd", *run_dir],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    finally:
        keeper.terminate()
        keeper.wait()
    assert ended.returncode == EXIT_NO_KEEPER
    assert "the keeper has the backend memfd, and this service was told fuse" in (
        ended.stderr + ended.stdout
    )


# Without any right.


@dataclass(frozen=True)
class Nobodys(Gmemctl):
    """Commands of a user without a right: of nobody, where this is root."""

    prefix: tuple[str, ...] = ()

    def __call__(self, *words: str, prefix: tuple[str, ...] = ()) -> Ended:
        return super().__call__(*words, prefix=(*self.prefix, *prefix))


@pytest.fixture
def nobody(request: pytest.FixtureRequest) -> Iterator[Nobodys]:
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        request.getfixturevalue("reachable_python")
        if shutil.which("setpriv") is None:
            pytest.skip("needs the program setpriv")
        ids = (f"--reuid={NOBODY[0]}", f"--regid={NOBODY[1]}")
        prefix = ("setpriv", *ids, "--clear-groups", "--no-new-privs")
    with gmemctl() as made:
        if prefix:
            os.chown(made.base, *NOBODY)
        yield Nobodys(made.base, prefix)


def test_an_ordinary_user_runs_a_whole_host(nobody: Nobodys) -> None:
    up = nobody("up", *SMALL, "--backend", "memfd", "--vmms", "2")
    assert up.status == 0, up.err
    pids = nobody.pids("local")
    assert sorted(pids) == ["guest_memfd", "host_allocator", "keeper", "vmm-0", "vmm-1"]
    for pid in pids.values():
        status = status_of(pid)
        assert "0" not in status["Uid"].split()
        assert int(status["CapEff"], 16) == 0
    assert nobody("down").status == 0
    assert nobody.leftovers() == []


@pytest.mark.parametrize("lineage", ["RFC_V1", "RFC_V2"])
def test_the_demo_holds_without_a_right_and_says_what_it_skips(
    nobody: Nobodys, lineage: str
) -> None:
    ended = nobody("demo", "--json", "--backend", "memfd", "--lineage", lineage)
    values = ended.json
    failed = [
        f"{step['name']}: {check['sentence']} ({check['found']})"
        for step in values["steps"]
        for check in step["checks"]
        if not check["held"]
    ]
    assert failed == []
    assert (ended.status, values["held"]) == (0, True)
    skipped = [one for step in values["steps"] for one in step["skipped"]]
    wanted = {"RFC_V1": [DIED], "RFC_V2": [DIED, IOCTL]}[lineage]
    assert [one["sentence"] for one in skipped] == wanted
    assert all(one["why"] for one in skipped)
    assert values["skipped"] == len(wanted)
    assert nobody.leftovers() == []
