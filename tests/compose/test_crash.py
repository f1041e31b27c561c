"""`docker kill` under a writing client: of the service, and of its stand-in too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmem.uapi.pages import SIZE_1G
from tests.support.containers import Project, docker, json_lines, running_project

HERE = Path(__file__).parent
PREPARE = (HERE / "prepare.py").read_text()
WRITER = (HERE / "writer.py").read_text()
# In the volume `run`, where every client can see it.
STOP = "/run/gmem/stop"
WRITE_SECONDS_MAX = 300.0
END_SECONDS_MAX = 120.0


@pytest.fixture
def own_project(image: str) -> Iterator[Project]:
    """A host for one test, which may kill what it likes."""
    with running_project(image) as made:
        yield made


def prepared(project: Project, name: str = "") -> dict[str, str]:
    """Make an inode, or take one, and mint a token for its host view."""
    program = project.script(PREPARE, str(SIZE_1G), name)
    out, err = program.communicate(timeout=END_SECONDS_MAX)
    assert program.returncode == 0, err
    return dict(json.loads(out))


@contextmanager
def writing(project: Project, view: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A client that writes in a container of its own, and has begun to."""
    words = (view["token"], view["at"], view["name"], STOP, str(WRITE_SECONDS_MAX))
    program = project.script(WRITER, *words)
    try:
        first = next(json_lines(program.stdout), None)
        assert first is not None, program.communicate()[1]
        assert first.get("writes", 0) > 0, first
        yield program
    finally:
        program.kill()
        program.communicate()


def stop_writing(project: Project) -> None:
    """Have the writer look at what it has written, and end."""
    code = f"open({STOP!r}, 'w').close()"
    project.compose("exec", "-T", "host_allocator", "python", "-c", code)


def last_word(program: subprocess.Popen[str]) -> dict[str, Any]:
    """What the writer said at its end."""
    lines = list(json_lines(program.stdout))
    program.wait(timeout=END_SECONDS_MAX)
    return lines[-1]


def kill_and_start(project: Project, service: str) -> None:
    """`docker kill`, which an engine takes for somebody's wish; then start again."""
    docker("kill", project.container(service))
    assert project.state(service)["ExitCode"] == 137
    project.compose("start", service)


def crash(project: Project, service: str) -> None:
    """SIGKILL that the engine knows nothing of: it starts the service again."""
    before = project.inspect(service)
    os.kill(before["State"]["Pid"], signal.SIGKILL)

    def restarted() -> bool:
        found = project.inspect(service)
        again = bool(found["RestartCount"] > before["RestartCount"])
        return again and bool(found["State"]["Status"] == "running")

    deadline = time.monotonic() + END_SECONDS_MAX
    while not restarted():
        assert time.monotonic() < deadline, f"{service} was not started again"
        time.sleep(0.1)


@pytest.mark.parametrize("end_it", [kill_and_start, crash])
def test_a_writer_does_not_notice_that_services_are_killed(
    own_project: Project,
    report_line: Callable[[str], None],
    end_it: Callable[[Project, str], None],
) -> None:
    view = prepared(own_project)
    with writing(own_project, view) as program:
        end_it(own_project, "guest_memfd")
        own_project.client("gmemctl", "status", "--wait", "60")
        end_it(own_project, "keeper")
        wait_for_log(own_project, "guest_memfd", "a new keeper has everything")
        # The new keeper stands in as the old one did.
        end_it(own_project, "guest_memfd")
        own_project.client("gmemctl", "status", "--wait", "60")
        stop_writing(own_project)
        end = last_word(program)
    assert end.get("done"), end
    assert end["lost"] == []
    assert program.returncode == 0
    report_line(
        f"{end_it.__name__} of guest_memfd, keeper, guest_memfd: {end['writes']} "
        f"writes, none lost, longest stall {end['longest']:.2f} s"
    )
    # The inode is the same, and goes on to serve.
    again = prepared(own_project, view["name"])
    with writing(own_project, again) as program:
        assert last_word(program)["lost"] == []


def wait_for_log(project: Project, service: str, words: str) -> None:
    """Wait until a service has written something."""
    deadline = time.monotonic() + END_SECONDS_MAX
    while words not in project.logs(service):
        assert time.monotonic() < deadline, project.logs(service)[-2000:]
        time.sleep(0.2)


def test_both_killed_fails_closed_and_is_reported(own_project: Project) -> None:
    view = prepared(own_project)
    with writing(own_project, view) as program:
        both = [own_project.container(name) for name in ("keeper", "guest_memfd")]
        docker("kill", *both)
        end = last_word(program)
    assert "dead" in end, end
    assert end["service"] in {"guest_memfd", "broker"}
    assert program.returncode == 3
