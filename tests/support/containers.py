"""A compose project of its own for a test, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from tests.support.sources import REPOSITORY

SERVICES = ("pause", "keeper", "host_allocator", "guest_memfd", "vmm-0", "vmm-1")
GRPC_SERVICES = ("host_allocator", "guest_memfd", "vmm-0", "vmm-1")
DEPLOY = REPOSITORY / "deploy"
LATEST = "gmem:latest"
COMMAND_SECONDS_MAX = 110.0
BUILD_SECONDS_MAX = 400.0


@dataclass(frozen=True)
class Project:
    """One emulated host in containers; `name` is its compose project."""

    name: str
    image: str

    @property
    def environ(self) -> dict[str, str]:
        return os.environ | {"GMEM_PROJECT": self.name, "GMEM_IMAGE": self.image}

    def compose(self, *words: str, check: bool = True) -> str:
        """Run `deploy/compose words...`; return what it wrote to standard output."""
        return run([str(DEPLOY / "compose"), *words], self.environ, check=check)

    def demo(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run deploy/demo.sh."""
        return subprocess.run(
            [str(DEPLOY / "demo.sh"), *words],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS_MAX,
        )

    def client(self, *words: str) -> str:
        """Run a command in a client's container of its own."""
        return self.compose("run", "--rm", "-T", "client", *words)

    def script(self, source: str, *words: str) -> subprocess.Popen[str]:
        """Start a Python program in a client's container; it is read from a pipe."""
        command = [str(DEPLOY / "compose"), "run", "--rm", "-T", "client"]
        program = subprocess.Popen(
            [*command, "python", "-", *words],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stdin = program.stdin
        assert stdin is not None
        stdin.write(source)
        stdin.close()
        program.stdin = None
        return program

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        (found,) = json.loads(docker("inspect", self.container(service)))
        return dict(found)

    def state(self, service: str) -> dict[str, Any]:
        """How a container is: Status, ExitCode, Health."""
        return dict(self.inspect(service)["State"])

    def logs(self, service: str) -> str:
        """What a service has written."""
        return self.compose("logs", "--no-color", service)

    def leftovers(self) -> list[str]:
        """Containers, networks and volumes that still carry the project's label."""
        label = f"label=com.docker.compose.project={self.name}"
        found = docker("ps", "--all", "--quiet", "--filter", label).split()
        found += docker("network", "ls", "--quiet", "--filter", label).split()
        return found + docker("volume", "ls", "--quiet", "--filter", label).split()


def docker(*words: str) -> str:
    """Run `docker words...`; return its standard output."""
    return run(["docker", *words], dict(os.environ))


def run(
    command: Sequence[str],
    environ: dict[str, str],
    *,
    check: bool = True,
    timeout: float = COMMAND_SECONDS_MAX,
) -> str:
    """Run a command to its end; what it said is part of the failure."""
    ended = subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if check and ended.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {ended.returncode}: "
            f"{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        )
    return ended.stdout


@contextmanager
def built_image() -> Iterator[str]:
    """The image of this tree; what was not there before is removed again."""
    before = _images()
    latest = docker("image", "ls", "--quiet", LATEST).strip()
    try:
        yield run(
            [str(DEPLOY / "image.sh")], dict(os.environ), timeout=BUILD_SECONDS_MAX
        ).strip()
    finally:
        if latest:
            docker("tag", latest, LATEST)
        # By name, newest layer first: a base in use cannot be removed.
        for name in sorted(_images() - before, key=lambda name: "base" in name):
            docker("image", "rm", name)


@contextmanager
def running_project(image: str) -> Iterator[Project]:
    """A host that answers; afterwards nothing of it is left, whatever happened."""
    project = Project(f"gmemtest{os.getpid()}", image)
    try:
        project.compose("up", "--detach")
        try:
            project.client("gmemctl", "status", "--wait", "100")
        except AssertionError as error:
            said = project.compose("logs", "--no-color", "--tail", "10", check=False)
            raise AssertionError(f"{error}\n{said[-6000:]}") from None
        yield project
    finally:
        project.compose(
            *("--profile", "demo", "--profile", "client"),
            *("down", "--volumes", "--remove-orphans", "--timeout", "10"),
        )
        assert project.leftovers() == []


def json_lines(stream: IO[str] | None) -> Iterator[dict[str, Any]]:
    """The JSON lines of a program, as they come."""
    assert stream is not None
    for line in stream:
        yield json.loads(line)


def _images() -> set[str]:
    listed = docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}")
    return {name for name in listed.split() if name.startswith("gmem")}
