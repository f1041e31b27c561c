"""Processes are known by pid and start time, never by name."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gmem.ctl import processes
from gmem.ctl.processes import ProcessRecord, child_environment

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]


@contextmanager
def sleeper(tag: str = "none") -> Iterator[ProcessRecord]:
    environ = os.environ | {processes.TAG_VARIABLE: tag}
    with subprocess.Popen(SLEEP, env=environ) as child:
        found = processes.record("sleeper", child.pid)
        assert found is not None
        try:
            yield found
        finally:
            child.kill()


def test_a_process_is_signalled_and_waited_for() -> None:
    with sleeper() as process:
        assert process.alive
        assert processes.wait_gone([process], 0.05) == [process]
        assert processes.send(process, signal.SIGTERM)
        assert processes.wait_gone([process], 20) == []
        assert not process.alive  # A zombie: its parent has not looked yet.


def test_another_process_with_the_pid_is_left_alone() -> None:
    with sleeper() as process:
        earlier = replace(process, start_time=process.start_time - 1)
        assert not earlier.alive
        assert not processes.send(earlier, signal.SIGKILL)
        assert processes.wait_gone([earlier], 5) == []
        assert process.alive


def test_a_process_that_is_gone_is_none() -> None:
    with sleeper() as process:
        pass
    assert processes.record("sleeper", process.pid) is None
    assert not processes.send(process, signal.SIGTERM)
    assert processes.wait_gone([process], 0) == []


def test_processes_of_one_up_are_found_by_their_mark() -> None:
    tag = secrets.token_hex(16)
    with sleeper(tag) as process, sleeper(tag[:-1]), sleeper("x" + tag):
        found = processes.tagged(tag)
        assert [one.pid for one in found] == [process.pid]
        assert found[0].start_time == process.start_time
        assert "time.sleep(60)" in found[0].name


def test_a_name_with_parentheses_does_not_confuse(tmp_path: Path) -> None:
    name = tmp_path / "a) S 1 (b"
    name.symlink_to(sys.executable)
    code = "import time; time.sleep(60)"
    with subprocess.Popen([name, "-I", "-S", "-c", code]) as child:
        try:
            found = processes.record("odd", child.pid)
            assert found is not None
            assert found.alive
        finally:
            child.kill()


def test_settings_of_the_caller_do_not_reach_the_services(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {
        "PATH": "/bin",
        "GMEM_RUN_DIR": "/x",
        "GMEM_LOG_LEVEL": "debug",
        "PYTHONPATH": "a:/b",
    }
    assert child_environment(environ, "tag") == {
        "PATH": "/bin",
        "GMEM_LOG_LEVEL": "debug",
        "PYTHONPATH": f"{tmp_path}/a:/b",
        processes.TAG_VARIABLE: "tag",
    }


def test_a_spawned_process_has_a_session_a_log_and_an_exit_status(
    tmp_path: Path,
) -> None:
    code = "import os, sys; print(os.getsid(0) == os.getpid()); sys.exit(7)"
    log = tmp_path / "log"
    child = processes.spawn([sys.executable, "-c", code], "tag", log)
    child.wait(timeout=60)
    assert processes.exit_status(child.pid) == 7
    assert processes.exit_status(os.getpid()) is None
    assert log.read_text() == "True\n"
