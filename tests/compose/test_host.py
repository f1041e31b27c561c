"""The host in containers: what it is made of, what it may do, and the demo on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.containers import GRPC_SERVICES, SERVICES, Project, docker

IMAGE_BYTES_MAX = 250 * 10**6
HEALTHY_SECONDS_MAX = 60.0
CAP_SYS_ADMIN = 1 << 21
USER = "10001"
STEPS = 16


def test_the_image_is_small_and_has_the_entry_points(image: str) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    assert found["Size"] < IMAGE_BYTES_MAX
    assert found["Config"]["User"].split(":")[0] not in {"", "0", "root"}
    version = docker("run", "--rm", "--network", "none", image, "gmemctl", "version")
    assert version.startswith("gmem-emulator ")
    modules = "gmem.host_allocator", "gmem.guest_memfd", "gmem.vmm", "gmem.keeper"
    for module in modules:
        docker("run", "--rm", "--network", "none", image, "python", "-m", module, "-h")


def test_every_service_becomes_healthy(project: Project) -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS_MAX
    waiting = {*GRPC_SERVICES, "keeper"}
    while waiting:
        assert time.monotonic() < deadline, f"not healthy: {sorted(waiting)}"
        waiting = {name for name in waiting if not is_healthy(project, name)}
        time.sleep(0.5)


def is_healthy(project: Project, service: str) -> bool:
    return bool(project.state(service)["Health"]["Status"] == "healthy")


def test_a_health_check_fails_where_nobody_answers(project: Project) -> None:
    with pytest.raises(AssertionError, match="nobody answers at vmm-0:1"):
        project.client("python", "-m", "gmem.client.health", "vmm-0:1")


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_has_more_rights_than_needed(project: Project, service: str) -> None:
    found = project.inspect(service)
    host: dict[str, Any] = found["HostConfig"]
    is_keeper = service == "keeper"
    assert not host["Privileged"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert (host["CapAdd"] or []) == (["SYS_ADMIN"] if is_keeper else [])
    devices = [device["PathOnHost"] for device in host["Devices"] or []]
    assert devices == (["/dev/fuse"] if is_keeper else [])
    assert host["PortBindings"] in ({}, None)

    status = process_status(found["State"]["Pid"])
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == (CAP_SYS_ADMIN if is_keeper else 0)
    assert int(status["CapBnd"], 16) == (CAP_SYS_ADMIN if is_keeper else 0)
    assert set(status["Uid"].split()) == {"0" if is_keeper else USER}


def process_status(pid: int) -> dict[str, str]:
    """What the kernel says of a process: the engine runs on this machine."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (x.partition(":") for x in lines)}


def test_the_network_leads_nowhere_else(project: Project) -> None:
    (network,) = json.loads(docker("network", "inspect", f"{project.name}_host"))
    assert network["Internal"]


def test_clients_cannot_put_a_socket_in_a_services_place(project: Project) -> None:
    code = "import os; os.unlink('/run/gmem/keeper.sock')"
    with pytest.raises(AssertionError, match="Read-only file system"):
        project.client("python", "-c", code)


def test_gmemctl_asks_the_host(project: Project) -> None:
    meminfo = project.client("gmemctl", "meminfo")
    assert "HugePages_Total:" in meminfo
    found = json.loads(project.client("gmemctl", "status", "--json"))
    states = {s["service"]: s["state"] for s in found["services"]}
    assert states == dict.fromkeys(GRPC_SERVICES, "serving")


def test_the_demo_holds_and_the_victims_container_dies_of_sigbus(
    project: Project,
) -> None:
    since = int(time.time())
    ended = project.demo("--json")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    told = json.loads(ended.stdout)
    failed = [
        f"{step['name']}: {check['sentence']} ({check['found']})"
        for step in told["steps"]
        for check in step["checks"]
        if not check["held"]
    ]
    assert failed == []
    assert told["held"]
    assert len(told["steps"]) == STEPS
    said = {step["name"]: " ".join(step["said"]) for step in told["steps"]}
    assert "gmem-loader in another pid namespace" in said["forgotten mapping"]
    assert "gmem-victim (container" in said["victim"]
    # What the engine itself saw, whatever the demo made of it.
    assert exit_codes(project, "victim", since) == ["135"]
    assert exit_codes(project, "device", since) == ["0"]


def exit_codes(project: Project, service: str, since: int) -> list[str]:
    """How the containers of a service have ended since a time."""
    events = docker(
        *("events", "--since", str(since), "--until", str(int(time.time()) + 1)),
        *("--filter", "event=die"),
        *("--filter", f"label=com.docker.compose.project={project.name}"),
        *("--filter", f"label=com.docker.compose.service={service}"),
        *("--format", "{{.Actor.Attributes.exitCode}}"),
    )
    return events.split()
