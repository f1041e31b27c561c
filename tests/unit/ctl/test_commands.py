"""gmemctl as a program: what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import typer
from typer.testing import CliRunner

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as gm
from gmem.api.host_allocator.v1.host_allocator_pb2 import GetStatisticsResponse, Meminfo
from gmem.ctl import inspection
from gmem.ctl.errors import ControlError, ExitStatus
from gmem.ctl.main import app
from gmem.ctl.output import reporting
from gmem.uapi.errors import Contended, Reason, TransportError
from gmem.uapi.lineage import Lineage

Run: TypeAlias = Callable[..., tuple[int, str, str]]

COMMANDS = [
    "up",
    "status",
    "down",
    "meminfo",
    "inode list",
    "inode show",
    "inode poison",
    "inode unpoison",
    "frame poison",
    "frame unpoison",
    "frame errors",
    "cgroup ls",
    "cgroup show",
    "cgroup create",
    "cgroup set",
    "cgroup delete",
    "pool list",
    "pool resize",
    "pool overcommit",
    "pool demote",
    "vm ls",
    "numastat",
    "page-types",
    "demo",
    "version",
]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("GMEM_RUN_DIR", str(tmp_path))

    def invoke(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_says_its_exit_statuses(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert "--json" in out
    assert "Exit status: 0 done" in out


@pytest.mark.parametrize("command", ["down", "meminfo", "inode list", "inode show 1"])
def test_without_a_host_one_sentence_names_the_way_out(run: Run, command: str) -> None:
    status, out, err = run(*command.split())
    assert (status, out) == (3, "")
    assert err.count("\n") == 1
    assert "no host local" in err
    assert "gmemctl up --host local" in err

    status, out, err = run(*command.split(), "--json")
    assert (status, err) == (3, "")
    assert json.loads(out)["error"]["status"] == 3


def test_status_without_hosts(run: Run) -> None:
    status, _, err = run("status")
    assert status == 3
    assert "gmemctl up" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["up", "--pool", "3G:1"], "3G"),
        (["up", "--memory", "x"], "'x'"),
        (["up", "--pool", "1G:99@0"], "99G"),
        (["up", "--host", "A"], "'A'"),
        (["demo", "--payload", "/nonexistent/file"], "/nonexistent/file"),
        (["demo", "--payload", "/dev/null"], "/dev/null has 0 bytes"),
        (["status", "--host", "../x"], "'../x'"),
        (["cgroup", "set", "/a", "max=1G"], "'max=1G'"),
        (["cgroup", "set", "/a", "hugetlb.3GB.max=1G"], "3G"),
        (["cgroup", "set", "/a", "hugetlb.2MB.max=x"], "'x'"),
        (["inode", "poison", "1", "0", "--kill-policy", "x"], "'x'"),
    ],
)
def test_wrong_use_ends_with_2_and_names_the_value(
    run: Run, words: list[str], named: str, tmp_path: Path
) -> None:
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_dir_too_long_for_sockets_is_refused(run: Run, tmp_path: Path) -> None:
    status, _, err = run("up", "--run-dir", str(tmp_path / ("x" * 100)))
    assert status == 2
    assert "--run-dir" in err


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["up", "--nodes", "0"], ["inode", "show"]]
)
def test_an_unknown_word_is_a_usage_error(run: Run, words: list[str]) -> None:
    assert run(*words)[0] == 2


def test_version_is_that_of_the_distribution(run: Run) -> None:
    status, out, _ = run("version", "--json")
    assert status == 0
    assert json.loads(out)["distribution"] == "gmem-emulator"


IN_USE = Contended(
    Reason.PAGE_IN_USE,
    "pinned",
    lineage=Lineage.RFC_V1,
    error_offset=0x3000,
    holders="nic",
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ControlError("no"), ExitStatus.USAGE),
        (IN_USE, ExitStatus.REFUSED),
        (TransportError("gone", service="vmm"), ExitStatus.UNREACHABLE),
    ],
)
def test_expected_errors_have_a_status_and_no_traceback(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for as_json in (False, True):
        with pytest.raises(typer.Exit) as caught, reporting(as_json):
            raise error
        assert caught.value.exit_code == status
    out, err = capsys.readouterr()
    assert err == f"gmemctl: {error}\n"
    assert json.loads(out)["error"]["sentence"] == str(error)


def test_a_refusal_keeps_its_numbers_in_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), reporting(as_json=True):
        raise IN_USE
    values = json.loads(capsys.readouterr().out)["error"]
    assert (values["reason"], values["errno"]) == ("PAGE_IN_USE", 22)
    assert values["numbers"] == {"error_offset": 0x3000, "holders": "nic"}


def test_an_unknown_exception_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), reporting(as_json=True):
        _ = 1 // 0


def test_meminfo_has_the_lines_of_proc_meminfo() -> None:
    meminfo = Meminfo(
        mem_total_kb=24684092,
        mem_free_kb=1234,
        huge_pages_total=8,
        huge_pages_rsvd=3,
        hugepagesize_kb=2048,
        hugetlb_kb=8388608,
    )
    assert inspection.meminfo_text(meminfo) == (
        "MemTotal:       24684092 kB\n"
        "MemFree:            1234 kB\n"
        "HardwareCorrupted:     0 kB\n"
        "HugePages_Total:       8\n"
        "HugePages_Free:        0\n"
        "HugePages_Rsvd:        3\n"
        "HugePages_Surp:        0\n"
        "Hugepagesize:       2048 kB\n"
        "Hugetlb:         8388608 kB\n"
    )


def test_meminfo_lines_are_as_wide_as_those_of_this_machine() -> None:
    ours = inspection.meminfo_text(Meminfo()).splitlines()
    theirs = {
        line.split(":")[0]: line
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    compared = 0
    for line in ours:
        name = line.split(":")[0]
        if name in theirs and len(theirs[name].split()[1]) < 5:
            assert len(line) == len(theirs[name]), name
            compared += 1
    assert compared


def test_messages_become_json_with_integers() -> None:
    statistics = GetStatisticsResponse(revision=5)
    pool = statistics.pools.add(page_size=1 << 30, nr_huge_pages=4)
    pool.nodes.add(node=1, free_huge_pages=2)
    values = inspection.message_values(statistics)
    assert values["revision"] == 5
    assert values["pools"][0]["page_size"] == 1 << 30
    assert values["pools"][0]["nodes"][0]["free_huge_pages"] == 2
    assert values["pools"][0]["surplus_huge_pages"] == 0


def test_an_inode_is_shown_with_its_runs_and_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inode = gm.GuestMemfd(
        name="hosts/h/guestMemfds/7", inode=7, size=1 << 30, page_size=1 << 30
    )
    inode.fragments.add(offset=0, size=1 << 20, shared=True)
    inode.fragments.add(offset=1 << 20, size=(1 << 30) - (1 << 20))
    inode.nr_fragments = 2
    inode.holds.add(hold=3, kind=gm.HOLD_KIND_PIN, holder="nic", size=4096)
    inspection.print_inode(inode)
    out = capsys.readouterr().out
    assert "hosts/h/guestMemfds/7" in out
    assert "nic" in out
    assert "0x100000" in out
    assert "private" in out


def test_an_inode_may_be_named_by_its_number() -> None:
    assert inspection.inode_name("h", "7") == "hosts/h/guestMemfds/7"
    assert inspection.inode_name("h", "hosts/g/guestMemfds/1").startswith("hosts/g")
    with pytest.raises(ControlError, match="'x'"):
        inspection.inode_name("h", "x")
