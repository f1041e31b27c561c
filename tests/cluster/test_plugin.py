"""The pytest plugin as users have it: other runs of pytest, on hosts of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.requirements import require_fuse, require_root

pytestmark = pytest.mark.fuse

SECONDS_MAX = 100
HEAD = """
import os, signal, socket, subprocess
import pytest
from gmem.testing.conformance.toucher import Died
from gmem.testing.plugin import GPA
"""
LEAVING = """
from gmem.testing import audit

kept = []
patient = audit.GONE_SECONDS_MAX

@pytest.fixture(autouse=True)
def patience():
    audit.GONE_SECONDS_MAX = patient

def leave(thing=None):
    audit.GONE_SECONDS_MAX = 0.5  # It will not go.
    kept.append(thing)

def test_inode(gmem_audit, gmem_vm):
    leave(gmem_vm.create_guest_memfd(4096, 0))

def test_inode_is_there_and_is_not_mine(gmem_audit, gmem_host):
    kept.pop().close()

def test_descriptor(gmem_audit):
    leave(socket.socket())

def test_process(gmem_audit):
    leave(subprocess.Popen(["sleep", "60"]))

def test_file(gmem_audit, gmem_host):
    (gmem_host.run_dir / "mine").write_text("")
    leave()

def test_mount_and_socket(gmem_audit, gmem_host):
    there = gmem_host.run_dir / "mount"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", there], check=True)
    leave(socket.socket(socket.AF_UNIX))
    kept[-1].bind(str(gmem_host.run_dir / "mine.sock"))

def test_nothing(gmem_audit, gmem_host, gmem_inode, guest_memory):
    guest_memory.store(0, b"A")

def test_tidy_up(gmem_host):
    subprocess.run(["umount", gmem_host.run_dir / "mount"], check=True)
    for thing in filter(None, kept):
        thing.kill() if hasattr(thing, "kill") else thing.close()
        thing.wait() if hasattr(thing, "wait") else None
    (gmem_host.run_dir / "mine.sock").unlink()
"""


@dataclass
class Run:
    """One run of pytest over one file."""

    directory: Path
    status: int
    out: str

    def outcomes(self) -> dict[str, str]:
        """How each test ended: passed, failed, error or skipped."""
        report = ET.parse(self.directory / "report.xml").getroot()
        found: dict[str, str] = {}
        for test in report.iter("testcase"):
            words = {child.tag for child in test} & {"failure", "error", "skipped"}
            found[str(test.get("name"))] = ", ".join(sorted(words)) or "passed"
        return found

    @property
    def artifacts(self) -> list[Path]:
        return sorted((self.directory / "gmem-artifacts").glob("*"))


def run(directory: Path, text: str, *options: str) -> Run:
    require_fuse()
    require_root()
    (directory / "test_mine.py").write_text(HEAD + textwrap.dedent(text))
    (directory / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "--junitxml=report.xml", *options],
        cwd=directory,
        env={name: v for name, v in os.environ.items() if name != "PYTEST_ADDOPTS"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    return Run(directory, ended.returncode, ended.stdout + ended.stderr)


def test_fixtures_give_what_they_say_in_every_lineage_and_size(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        """
        hosts = set()

        HUGE = ["RFC_V1", "RFC_V2", "IN_PLACE"]

        @pytest.mark.gmem(lineages=HUGE, page_sizes=["4K", "2M"], pages=2)
        def test_all(gmem_audit, gmem_host, gmem_vm, gmem_inode, guest_memory,
                     gmem_lineage, gmem_page_size):
            hosts.add(gmem_host.run_dir)
            assert gmem_inode.size == 2 * gmem_page_size
            assert gmem_inode.fstat().st_blksize == gmem_page_size
            guest_memory.store(gmem_page_size, b"A")
            assert guest_memory.load(gmem_page_size) == b"A"

        @pytest.mark.gmem(lineages=["RFC_V2"], private=True)
        def test_starts_private(gmem_audit, guest_memory):
            assert guest_memory.load(0) == Died(signal.SIGBUS)

        def test_default(gmem_inode, gmem_lineage, gmem_page_size, gmem_host):
            assert (gmem_lineage, gmem_page_size) == ("RFC_V1", 4096)
            hosts.add(gmem_host.run_dir)
            assert len(hosts) == 1

        @pytest.mark.gmem(host="test")
        def test_own_host(gmem_host):
            assert gmem_host.run_dir not in hosts
        """,
    )
    assert ended.status == 0, ended.out
    lineages = ("RFC_V1", "RFC_V2", "IN_PLACE")
    names = [f"test_all[{x}-{y}]" for x in lineages for y in ("4K", "2M")]
    others = ["test_starts_private[RFC_V2]", "test_default", "test_own_host"]
    assert ended.outcomes() == dict.fromkeys([*names, *others], "passed")
    assert ended.artifacts == []


def test_the_audit_names_everything_that_is_left(tmp_path: Path) -> None:
    ended = run(tmp_path, LEAVING)
    clean = {"test_inode_is_there_and_is_not_mine", "test_nothing", "test_tidy_up"}
    outcomes = ended.outcomes()
    assert {name for name, how in outcomes.items() if how == "passed"} == clean, (
        ended.out
    )
    for sentence in (
        "guestMemfds/1 is there",
        "descriptor of socket is open",
        "is there: sleep 60",
        "mine is there",
        "mount is still mounted",
        "mine.sock is still open",
    ):
        assert sentence in ended.out, sentence


def test_a_failure_leaves_logs_trace_and_state(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        """
        def test_before(gmem_inode):
            pass

        def test_wrong(gmem_vm, gmem_inode):
            gmem_inode.allocate(0, 4096)
            assert gmem_inode.fstat().st_size == 0
        """,
        "--gmem-artifacts=kept",
    )
    assert ended.outcomes() == {"test_before": "passed", "test_wrong": "failure"}
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == "test_mine.py_test_wrong"
    assert str(kept) in ended.out
    trace = (kept / "trace.txt").read_text()
    # Of this test alone, and in order.
    assert trace.count("vmm-0 CreateVm answered") == 1
    assert trace.index("CreateVm ") < trace.index("CreateGuestMemfd ")
    assert "guestMemfds/2" in (kept / "state.json").read_text()
    assert (kept / "vmm-0.jsonl").stat().st_size > 0


def test_a_marker_that_is_wrong_says_what_there_is(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        """
        @pytest.mark.gmem(lineage="RFC_V2")
        def test_wrong(gmem_vm):
            pass
        """,
    )
    assert ended.status != 0
    assert "gmem(lineage): write gmem(lineages=[...], page_sizes=[...]" in ended.out
