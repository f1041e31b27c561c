"""Whether a keeper that is started finds the service of an earlier one alive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmem.keeper import keep, pids


def note(run_dir: Path, pid: int) -> None:
    line = f"{pid} {pids.start_time(pid)}\n"
    (run_dir / pids.SERVICE).write_text(line)


def test_a_service_that_lives_is_found(tmp_path: Path) -> None:
    note(tmp_path, os.getpid())
    assert keep.is_served(tmp_path)


def test_a_service_that_is_gone_is_not(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    note(tmp_path, child.pid)
    child.communicate()
    assert not keep.is_served(tmp_path)


@pytest.mark.parametrize("line", ["", "x y", "1", "{pid} 1"])
def test_what_is_no_note_of_a_living_service_counts_as_none(
    tmp_path: Path, line: str
) -> None:
    assert not keep.is_served(tmp_path)
    (tmp_path / pids.SERVICE).write_text(line.format(pid=os.getpid()))
    assert not keep.is_served(tmp_path)
