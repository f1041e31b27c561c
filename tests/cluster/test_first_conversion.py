"""What README.md and docs/semantics.md show: the examples, run, print just that."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gmemctl import Gmemctl, gmemctl
from tests.support.requirements import require_fuse, require_root

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SECONDS_MAX = 60
HOST = ("--nodes", "1", "--memory", "8G", "--pool", "1G:2")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def ctl() -> Iterator[Gmemctl]:
    """A host as the documents have it: one node, a pool of two 1G pages."""
    require_fuse()
    require_root()
    with gmemctl() as made:
        assert made("up", *HOST, "--default-hugepagesz", "1G").status == 0
        yield made
        assert made("down").status == 0
        assert made.leftovers() == []


def run(ctl: Gmemctl, example: str) -> str:
    """The output of an example that is run against the host."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / example), str(ctl.base / "local")],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
        stdin=subprocess.DEVNULL,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one kind in a document."""
    text = (ROOT / document).read_text()
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def without_pids(text: str) -> str:
    """The text without what differs from run to run: pids, and Python's own name."""
    return re.sub(r"\bpid \d+( \(python[\d.]*\))?", "pid N", text)


def shown(document: str, output: str) -> bool:
    """Whether a console block of the document has these very lines, but for pids."""
    return any(
        without_pids(output) in without_pids(block)
        for block in blocks(document, "console")
    )


def test_a_conversion_by_hand_prints_what_the_readme_shows(ctl: Gmemctl) -> None:
    before = ctl("meminfo").out
    output = run(ctl, "first_conversion.py")
    assert "EINVAL (page_in_use)" in output
    assert "exit code -7" in output
    assert shown("README.md", output)

    inode = ctl("inode", "show", "1")
    assert (inode.status, inode.err) == (0, "")
    assert shown("README.md", "\n".join(map(str.rstrip, inode.out.splitlines())))
    changed = set(ctl("meminfo").out.splitlines()) ^ set(before.splitlines())
    readme = "\n".join(blocks("README.md", "console"))
    assert [line for line in changed if line not in readme] == []


def test_the_readme_shows_the_script_itself() -> None:
    assert (EXAMPLES / "first_conversion.py").read_text() in blocks(
        "README.md", "python"
    )


def test_one_inode_goes_through_the_states_of_the_semantics(ctl: Gmemctl) -> None:
    assert shown("docs/semantics.md", run(ctl, "one_inode.py"))
